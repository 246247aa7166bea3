//! Settings: read from layers, checked as a whole, each value with its source.
//!
//! Later layers win, key by key:
//!
//! 1. the built-in defaults;
//! 2. `stackhand.toml`, which all agents of a host share;
//! 3. `<agent>.toml`;
//! 4. drop-ins, by name: `stackhand.d/*.toml`, then `<agent>.d/*.toml`;
//! 5. the environment: `STACKHAND_<SECTION>__<KEY>`, such as `STACKHAND_BUS__URL`, and
//!    `STACKHAND_HOST` for keys without a section. An empty variable unsets an optional value.
//!
//! The folder is `/etc/stackhand` unless `--config-dir` names another; `--config` names a file
//! that takes the place of `<agent>.toml`. The shared layers may hold the sections of all agents
//! (`[compute]`, `[network]`, `[storage]`); each agent reads its own.
//!
//! Every problem is reported, not only the first, with file, line, column and key. The layers
//! are merged into a tree that knows where each value came from; a deserialiser of our own
//! reads the types from it, and a value that cannot be read is reported, taken out, and
//! the reading repeated.

mod de;
mod layers;
mod print;
mod problem;
mod redact;
mod settings;
#[cfg(test)]
mod tests;
mod tree;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use problem::{ConfigErrors, Problem, Problems};
pub use redact::Secret;
pub use settings::{
    BrokerAddress, BusSettings, BusUrl, CommonSettings, HeartbeatSettings, HttpSettings,
    InvalidBusUrl, InvalidListen, Listen, LogFormat, LogSettings, ReconcileSettings,
    ShutdownSettings, SigningSettings,
};
pub use tree::Origin;
use tree::{Node, Value};

/// The agents, which are also the names of their sections.
pub const AGENTS: [&str; 3] = ["compute", "network", "storage"];

/// Where settings are looked for by default.
pub const CONFIG_DIR: &str = "/etc/stackhand";

/// Most problems reported at once.
const MOST_PROBLEMS: usize = 100;

/// The section of one kind of agent, such as `[network]`.
///
/// Derive `Deserialize` and `Serialize` with `#[serde(default, deny_unknown_fields)]`.
pub trait AgentSection:
    DeserializeOwned + Serialize + Default + Clone + fmt::Debug + Send + Sync + 'static
{
    /// Name of the agent and of the section: one of [`AGENTS`].
    const AGENT: &'static str;

    /// Reports values that have the right type and make no sense. Keys are given in full, such as
    /// `network.overlay.local_ip`.
    fn check(&self, problems: &mut Problems) {
        let _ = problems;
    }
}

/// All settings of an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings<S> {
    /// What all agents have.
    pub common: CommonSettings,
    /// The agent's own section.
    pub agent: S,
}

impl<S: AgentSection> Settings<S> {
    /// The agent's local socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.common.socket(S::AGENT)
    }
}

impl<S: AgentSection> Default for Settings<S> {
    fn default() -> Self {
        Self { common: CommonSettings::for_agent(S::AGENT), agent: S::default() }
    }
}

/// Where to read from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The folder with `stackhand.toml` and the others.
    pub config_dir: PathBuf,
    /// A file in place of `<config_dir>/<agent>.toml`. Unlike that one it must exist.
    pub agent_file: Option<PathBuf>,
    /// The environment; names that do not start with `STACKHAND_` are passed over.
    pub environment: Vec<(OsString, OsString)>,
}

/// Settings that were read, and how.
#[derive(Clone, Debug)]
pub struct Loaded<S> {
    /// The settings.
    pub settings: Settings<S>,
    /// What is doubtful but no reason not to start, such as a password that everybody can read.
    pub warnings: Vec<Problem>,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
    origins: tree::Origins,
}

impl<S: AgentSection> Loaded<S> {
    /// The settings as TOML, each with a comment that tells its source; secrets are masked.
    #[must_use]
    pub fn print(&self) -> String {
        print::print(&self.settings, &self.origins)
    }

    /// Where the value of `key`, such as `bus.url`, came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }
}

/// The options of every agent's command line that are about settings.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Folder of the settings
    #[arg(long, value_name = "DIR", env = "STACKHAND_CONFIG_DIR", default_value = CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// File to read in place of the agent's own in the folder of the settings
    #[arg(long, value_name = "FILE", env = "STACKHAND_CONFIG")]
    pub config: Option<PathBuf>,
    /// Check the settings, tell every problem, and exit: 0 if they are good, 1 if not
    #[arg(long, conflicts_with = "print_config")]
    pub check_config: bool,
    /// Print the settings, each with its source, and exit
    #[arg(long)]
    pub print_config: bool,
}

/// What to do after the command line and the settings were read.
#[derive(Debug)]
pub enum Begin<S> {
    /// Run with these.
    Run(Box<Loaded<S>>),
    /// Write these and exit.
    Exit {
        /// For standard output.
        out: String,
        /// For standard error.
        err: String,
        /// Exit status.
        code: u8,
    },
}

impl ConfigArgs {
    /// The sources that the options name, with the process's environment.
    #[must_use]
    pub fn sources(&self) -> Sources {
        Sources {
            config_dir: self.config_dir.clone(),
            agent_file: self.config.clone(),
            environment: std::env::vars_os().collect(),
        }
    }

    /// Reads the settings and does what the options ask for.
    #[must_use]
    pub fn begin<S: AgentSection>(&self) -> Begin<S> {
        self.begin_with(&self.sources())
    }

    fn begin_with<S: AgentSection>(&self, sources: &Sources) -> Begin<S> {
        let lines = |problems: &[Problem], word: &str| {
            problems.iter().map(|problem| format!("{word}: {problem}\n")).collect::<String>()
        };
        match load::<S>(sources) {
            Err(errors) => {
                let code = if self.check_config || self.print_config {
                    crate::lifecycle::exit::FAILED
                } else {
                    crate::lifecycle::exit::CONFIG
                };
                let err = lines(&errors.problems, "error") + &lines(&errors.warnings, "warning");
                Begin::Exit { out: String::new(), err, code }
            }
            Ok(loaded) if self.print_config => Begin::Exit {
                out: loaded.print(),
                err: lines(&loaded.warnings, "warning"),
                code: 0,
            },
            Ok(loaded) if self.check_config => {
                let out = format!("settings of the {} agent are good\n", S::AGENT);
                Begin::Exit { out, err: lines(&loaded.warnings, "warning"), code: 0 }
            }
            Ok(loaded) => Begin::Run(Box::new(loaded)),
        }
    }
}

/// Reads and checks the settings of the agent that `S` belongs to.
///
/// # Errors
///
/// Fails with every problem found: files that cannot be read or parsed, unknown keys, wrong types,
/// values outside their limits.
pub fn load<S: AgentSection>(sources: &Sources) -> Result<Loaded<S>, ConfigErrors> {
    let known = known_keys();
    let mut layers = layers::read(S::AGENT, sources, &known);
    let mut root = layers.root;
    let own = root.take(S::AGENT).unwrap_or_else(|| Node::table(Origin::Default));
    for other in AGENTS {
        root.take(other);
    }
    let mut problems = Problems::new(root.origins("").chain(own.origins(S::AGENT)).collect());
    let mut broken = Vec::new();
    let common = read_all::<CommonSettings>(root, "", &mut layers.problems, &mut broken)
        .unwrap_or_else(|| CommonSettings::for_agent(S::AGENT));
    let agent: S = read_all(own, S::AGENT, &mut layers.problems, &mut broken).unwrap_or_default();

    common.check(&mut problems);
    agent.check(&mut problems);
    let (origins, mut found) = problems.into_parts();
    // A value that was taken out because it cannot be read is not missing as well.
    found.retain(|problem| !broken.contains(&problem.key));
    layers.problems.extend(found);
    if layers.problems.is_empty() {
        let settings = Settings { common, agent };
        Ok(Loaded { settings, warnings: layers.warnings, files: layers.files, origins })
    } else {
        layers.problems.truncate(MOST_PROBLEMS);
        Err(ConfigErrors { problems: layers.problems, warnings: layers.warnings })
    }
}

/// The keys and sections that stand at the top of a file.
fn known_keys() -> Vec<String> {
    let common = serde_json::to_value(CommonSettings::for_agent("")).unwrap_or_default();
    let keys = common.as_object().into_iter().flat_map(|table| table.keys().cloned());
    keys.chain(AGENTS.map(str::to_owned)).collect()
}

/// Reads a `T` from `tree`, taking out what cannot be read until the rest can. The keys of what
/// was taken out go to `broken`.
fn read_all<T: DeserializeOwned>(
    mut tree: Node,
    prefix: &str,
    problems: &mut Vec<Problem>,
    broken: &mut Vec<String>,
) -> Option<T> {
    loop {
        let error = match T::deserialize(de::NodeDeserializer(&tree)) {
            Ok(settings) => return Some(settings),
            Err(error) => error.or_at(&tree.origin),
        };
        let removed = tree.remove(&error.path);
        let problem = error.into_problem(prefix);
        broken.push(problem.key.clone());
        problems.push(problem);
        if !removed || problems.len() >= MOST_PROBLEMS {
            return None;
        }
    }
}

/// Whether any value in the tree is a password.
fn holds_secret(node: &Node, key: &str) -> bool {
    match &node.value {
        Value::String(text) | Value::Environment(text) => {
            redact::text(text).is_some() || (redact::is_secret_key(key) && !text.is_empty())
        }
        Value::Array(items) => items.iter().any(|item| holds_secret(item, key)),
        Value::Table(table) => table.iter().any(|(key, entry)| holds_secret(&entry.node, key)),
        _ => false,
    }
}

/// The folder that holds drop-ins beside the file called `name`.toml.
fn drop_in_dir(config_dir: &Path, name: &str) -> PathBuf {
    config_dir.join(format!("{name}.d"))
}
