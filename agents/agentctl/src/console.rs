//! The only way out: everything agentctl prints goes through a [`Console`].
//!
//! Results go to standard output in the form asked for; notes, progress and errors go to standard
//! error. Nothing here panics on a closed pipe: the error travels up and `main` ends quietly.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::table::Table;

/// How to print results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// Aligned columns for people. May change between releases.
    #[default]
    Table,
    /// The table with more columns.
    Wide,
    /// One JSON document for scripts. Fields are only ever added.
    Json,
    /// The same as YAML.
    Yaml,
}

impl Output {
    /// The name as written on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Wide => "wide",
            Self::Json => "json",
            Self::Yaml => "yaml",
        }
    }
}

/// Standard output and standard error, with the form asked for.
pub(crate) struct Console {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    output: Output,
    colour: bool,
    live: bool,
}

impl Console {
    /// The process's own streams.
    pub(crate) fn of_process(output: Output) -> Self {
        let stdout = io::stdout();
        let colour = stdout.is_terminal() && colour_wanted(|name| std::env::var_os(name));
        Self {
            colour,
            out: Box::new(io::BufWriter::new(stdout)),
            live: io::stderr().is_terminal(),
            err: Box::new(io::stderr()),
            output,
        }
    }

    /// A console over any two streams, without colours.
    #[cfg(test)]
    pub(crate) fn over(
        out: impl Write + Send + 'static,
        err: impl Write + Send + 'static,
        output: Output,
    ) -> Self {
        Self { out: Box::new(out), err: Box::new(err), output, colour: false, live: false }
    }

    /// The form asked for.
    pub(crate) fn output(&self) -> Output {
        self.output
    }

    /// Whether standard error is a terminal, on which lines can be drawn again.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Prints a result: `table` for people, `data` for programs.
    pub(crate) fn print(
        &mut self,
        data: &impl Serialize,
        table: impl FnOnce(&mut Table),
    ) -> io::Result<()> {
        match self.output {
            Output::Json => self.json(data)?,
            Output::Yaml => self.yaml(data)?,
            Output::Table | Output::Wide => {
                let mut rendered = Table::new(self.output == Output::Wide);
                table(&mut rendered);
                self.out.write_all(rendered.render(self.colour).as_bytes())?;
            }
        }
        self.out.flush()
    }

    /// Prints a result that has no table: YAML for people, JSON when asked for.
    pub(crate) fn print_tree(&mut self, data: &impl Serialize) -> io::Result<()> {
        match self.output {
            Output::Json => self.json(data)?,
            _ => self.yaml(data)?,
        }
        self.out.flush()
    }

    /// Prints text as it is.
    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// Prints one JSON value a line, for results that never end.
    pub(crate) fn json_line(&mut self, data: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, data)?;
        writeln!(self.out)?;
        self.out.flush()
    }

    /// Tells something on standard error. Nobody reading it is no reason to fail.
    pub(crate) fn note(&mut self, line: &str) {
        let _ = writeln!(self.err, "{}", tame(line)).and_then(|()| self.err.flush());
    }

    /// Asks a person whether. Nobody at a terminal means no.
    pub(crate) fn ask(&mut self, question: &str) -> io::Result<bool> {
        let answer = self.read_line(question)?;
        Ok(matches!(answer.as_deref(), Some("y" | "Y" | "yes")))
    }

    /// Asks a person for a line. Nothing where nobody is at a terminal.
    pub(crate) fn read_line(&mut self, question: &str) -> io::Result<Option<String>> {
        if !self.live || !io::stdin().is_terminal() {
            return Ok(None);
        }
        self.draw(question);
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(Some(answer.trim().to_owned()))
    }

    /// Writes to standard error as it is, for drawing progress.
    pub(crate) fn draw(&mut self, text: &str) {
        let _ = self.err.write_all(text.as_bytes()).and_then(|()| self.err.flush());
    }

    fn json(&mut self, data: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.out, data)?;
        writeln!(self.out)
    }

    fn yaml(&mut self, data: &impl Serialize) -> io::Result<()> {
        let text = serde_saphyr::to_string(data).map_err(io::Error::other)?;
        self.out.write_all(text.as_bytes())?;
        if text.ends_with('\n') { Ok(()) } else { writeln!(self.out) }
    }
}

/// Whether the environment lets us colour a terminal. See <https://no-color.org>.
fn colour_wanted(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    variable("NO_COLOR").is_none_or(|value| value.is_empty())
        && variable("TERM").is_none_or(|value| value != "dumb")
}

/// Replaces control characters: names and reasons come from other machines and must not drive
/// the reader's terminal.
pub(crate) fn tame(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_color_and_dumb_terminals_turn_colours_off() {
        let with = |set: &'static [(&str, &str)]| {
            colour_wanted(move |name| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
            })
        };
        assert!(with(&[]));
        assert!(with(&[("NO_COLOR", "")]));
        assert!(!with(&[("NO_COLOR", "1")]));
        assert!(!with(&[("TERM", "dumb")]));
    }

    #[test]
    fn escape_sequences_from_other_machines_are_disarmed() {
        assert_eq!(tame("a\u{1b}[2Jb\nc"), "a [2Jb c");
    }
}
