//! The layers: files found, read and merged, then the environment.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::DeTable;

use super::problem::{Problem, suggestion};
use super::tree::{Node, Origin, Source, Value};
use super::{AGENTS, Sources, drop_in_dir, holds_secret};

/// Largest file read, in bytes. Settings are small; a log file given by mistake is not.
const MOST_BYTES: u64 = 1 << 20;

/// Variables that are options of the command line, not settings.
const OPTIONS: [&str; 2] = ["STACKHAND_CONFIG", "STACKHAND_CONFIG_DIR"];

/// All layers merged.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) root: Node,
    pub(super) files: Vec<PathBuf>,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
}

/// Who reads a file.
#[derive(Clone, Copy, PartialEq)]
enum Readers {
    AllAgents,
    OneAgent,
}

/// Reads all layers of the agent called `agent`. `known` are the keys at the top of a file.
pub(super) fn read(agent: &str, sources: &Sources, known: &[String]) -> Layers {
    let mut layers = Layers {
        root: defaults(agent, &sources.config_dir),
        files: Vec::new(),
        problems: Vec::new(),
        warnings: Vec::new(),
    };
    let dir = &sources.config_dir;
    layers.add_file(agent, &dir.join("stackhand.toml"), Readers::AllAgents, false);
    match &sources.agent_file {
        Some(file) => layers.add_file(agent, file, Readers::OneAgent, true),
        None => {
            layers.add_file(agent, &dir.join(format!("{agent}.toml")), Readers::OneAgent, false);
        }
    }
    layers.add_drop_ins(agent, &drop_in_dir(dir, "stackhand"), Readers::AllAgents);
    layers.add_drop_ins(agent, &drop_in_dir(dir, agent), Readers::OneAgent);
    layers.add_environment(&sources.environment, known);
    layers
}

/// The defaults that depend on agent, host and folder.
fn defaults(agent: &str, config_dir: &Path) -> Node {
    let common = super::CommonSettings::for_agent(agent);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut root = Node::table(Origin::Default);
    for (path, value) in [
        (&["host"][..], common.host),
        (&["state_dir"], text(&common.state_dir)),
        (&["signing", "trusted_controllers"], text(&config_dir.join("trusted_controllers"))),
    ] {
        root.put(path, Node { value: Value::String(value), origin: Origin::Default });
    }
    root
}

impl Layers {
    fn add_file(&mut self, agent: &str, path: &Path, readers: Readers, must_exist: bool) {
        let shared: Arc<Path> = Arc::from(path);
        let whole =
            |message: String| Problem::new(Origin::WholeFile(Arc::clone(&shared)), "", message);
        let (text, mode) = match read_text(path) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => return,
            Err(error) => {
                self.problems.push(whole(format!("cannot read: {error}")));
                return;
            }
        };
        self.files.push(path.to_owned());
        let source = Source::new(Arc::clone(&shared), &text);
        let (document, errors) = DeTable::parse_recoverable(&text);
        for error in &errors {
            let origin = error.span().map_or_else(
                || Origin::WholeFile(Arc::clone(&shared)),
                |span| source.at(span.start),
            );
            let message = format!("not TOML: {}", error.message());
            self.problems.push(Problem::new(origin, "", message));
        }
        if !errors.is_empty() {
            // What recovery made of the rest would only give misleading errors.
            return;
        }
        let node = Node::from_document(&document, &source);
        if readers == Readers::OneAgent {
            self.refuse_other_agents(agent, &node);
        }
        if mode & 0o004 != 0 && holds_secret(&node, "") {
            let shown = path.display();
            let remedy = format!("chgrp stackhand-agents {shown} && chmod 0640 {shown}");
            let what = "holds a password and everybody can read it";
            self.warnings.push(whole(what.into()).with_remedy(remedy));
        }
        if mode & 0o002 != 0 {
            let shown = path.display();
            let remedy = format!("chmod o-w {shown}");
            self.warnings.push(whole("everybody can write to it".into()).with_remedy(remedy));
        }
        self.root.merge(node);
    }

    /// A file of one agent must not hold the section of another: it would have no effect.
    fn refuse_other_agents(&mut self, agent: &str, node: &Node) {
        let Value::Table(table) = &node.value else { return };
        for (name, entry) in table {
            if name != agent && AGENTS.contains(&name.as_str()) {
                let message = format!(
                    "`{name}` is the section of another agent; put it into {name}.toml or \
                     stackhand.toml"
                );
                self.problems.push(Problem::new(entry.key.clone(), name.as_str(), message));
            }
        }
    }

    fn add_drop_ins(&mut self, agent: &str, dir: &Path, readers: Readers) {
        let list = fs::read_dir(dir)
            .and_then(|entries| entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>());
        let mut paths = match list {
            Ok(paths) => paths,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                let origin = Origin::WholeFile(Arc::from(dir));
                self.problems.push(Problem::new(origin, "", format!("cannot list: {error}")));
                return;
            }
        };
        paths.retain(|path| {
            path.extension().is_some_and(|extension| extension == "toml")
                && path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'))
        });
        paths.sort();
        for path in paths {
            self.add_file(agent, &path, readers, true);
        }
    }

    fn add_environment(&mut self, environment: &[(OsString, OsString)], known: &[String]) {
        let mut variables: Vec<(String, &OsString)> = environment
            .iter()
            .filter_map(|(name, value)| Some((name.to_str()?.to_owned(), value)))
            .filter(|(name, _)| name.starts_with("STACKHAND_") && !OPTIONS.contains(&name.as_str()))
            .collect();
        variables.sort();
        for (name, value) in variables {
            let lower = name["STACKHAND_".len()..].to_ascii_lowercase();
            let path: Vec<&str> = lower.split("__").collect();
            let origin = Origin::Environment(Arc::from(name.as_str()));
            let problem = |message: String| Problem::new(origin.clone(), path.join("."), message);
            if path.iter().any(|part| part.is_empty()) {
                self.problems.push(problem("needs a name on each side of `__`".into()));
            } else if path.len() == 1 && !known.iter().any(|known| known == path[0]) {
                // Other programs and container runtimes set variables of this form.
                let hint = suggestion(path[0], known.iter().map(String::as_str));
                self.warnings.push(problem(format!("is not a setting and has no effect{hint}")));
            } else if let Some(text) = value.to_str() {
                let value = Value::Environment(text.to_owned());
                self.root.put(&path, Node { value, origin });
            } else {
                self.problems.push(problem("is not UTF-8".into()));
            }
        }
    }
}

/// The text of a file and its permission bits.
fn read_text(path: &Path) -> io::Result<(String, u32)> {
    let mut file = fs::File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("larger than {MOST_BYTES} bytes")));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((text, metadata.mode())),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            Err(io::Error::other(format!("not UTF-8 at byte {at}")))
        }
    }
}
