//! How a run ends: exit statuses and what is told about errors.

use std::io;
use std::process::ExitCode;

/// Exit statuses, as `agentctl --help` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done, and all is well.
    Well,
    /// It did not work.
    Failure,
    /// The command line, a setting or a manifest is wrong.
    Usage,
    /// It worked, and shows something that is not well: an agent down, an object in error.
    NotWell,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Well => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::NotWell => 3,
        })
    }
}

/// What the user wrote is wrong; sending it again cannot help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .problems.join("\n"))]
pub(crate) struct Usage {
    problems: Vec<String>,
}

impl Usage {
    /// One problem.
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self { problems: vec![problem.into()] }
    }

    /// Several problems, each told on a line of its own.
    pub(crate) fn several(problems: Vec<String>) -> Self {
        Self { problems }
    }
}

/// Something is not well and it has been told already, or is told by this text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotWell(pub(crate) String);

/// Whether the reader of standard output has gone away, as `| head` does: no failure of ours.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let direct = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let json =
            cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
        direct.or(json) == Some(io::ErrorKind::BrokenPipe)
    })
}

/// The exit status of an error, and the lines that tell it.
pub(crate) fn explain(error: &anyhow::Error) -> (Exit, Vec<String>) {
    if let Some(usage) = error.downcast_ref::<Usage>() {
        return (Exit::Usage, usage.problems.clone());
    }
    let exit = if error.is::<NotWell>() { Exit::NotWell } else { Exit::Failure };
    (exit, vec![chain(error)])
}

/// The error and its causes on one line; a cause that its consequence quotes is not told twice.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn causes_are_told_once_on_one_line() {
        let error = Err::<(), _>(io::Error::other("refused"))
            .context("cannot reach b1: refused")
            .context("cannot list agents")
            .unwrap_err();
        assert_eq!(chain(&error), "cannot list agents: cannot reach b1: refused");
    }

    #[test]
    fn a_closed_pipe_is_recognised_wherever_it_was_noticed() {
        let pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&anyhow::Error::new(pipe()).context("cannot print")));
        assert!(is_closed_pipe(&serde_json::Error::io(pipe()).into()));
        assert!(!is_closed_pipe(&io::Error::other("full").into()));
    }

    #[test]
    fn what_the_user_wrote_wrong_is_told_apart_from_what_failed() {
        assert_eq!(explain(&Usage::new("no such kind").into()).0, Exit::Usage);
        assert_eq!(explain(&NotWell("1 agent down".into()).into()).0, Exit::NotWell);
        assert_eq!(explain(&anyhow::anyhow!("x")).0, Exit::Failure);
    }
}
