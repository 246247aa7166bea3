//! Where agentctl's defaults come from: flags, environment, two files, built-in values.
//!
//! Every value keeps its source, so that `agentctl config` can tell why something is as it is.

use std::convert::identity;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use stackhand_runtime::config::BusUrl;

use crate::console::Output;
use crate::exit::Usage;

/// The file that all users of a host share.
const SYSTEM_FILE: &str = "/etc/stackhand/agentctl.toml";

/// Options that every command takes.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Common options")]
pub(crate) struct Globals {
    /// How to print results [env: AGENTCTL_OUTPUT] [default: table]
    #[arg(short, long, global = true, value_enum, value_name = "FORM")]
    pub(crate) output: Option<Output>,

    /// Speak to the agents of this host over their sockets, without a broker
    #[arg(long, global = true, conflicts_with = "url")]
    pub(crate) local: bool,

    /// Folder of the agents' sockets [env: AGENTCTL_RUN_DIR] [default: /run/stackhand]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,

    /// Speak to the agents of all hosts over this broker, such as
    /// rabbit://user:password@broker1,broker2/ [env: AGENTCTL_URL]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,

    /// Private key that signs commands sent over a broker, see `agentctl keygen`
    /// [env: AGENTCTL_KEY] [default: ~/.config/agentctl/key.pem where it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,

    /// The cloud that names belong to; ids are derived from it [env: AGENTCTL_CLOUD]
    /// [default: default]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) cloud: Option<String>,

    /// Seconds that one call may take, 1 to 3600 [env: AGENTCTL_TIMEOUT] [default: 60]
    #[arg(long, global = true, value_name = "SECONDS")]
    pub(crate) timeout: Option<u32>,
}

/// What a file may set.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    output: Option<String>,
    local: Option<bool>,
    run_dir: Option<PathBuf>,
    url: Option<String>,
    key: Option<PathBuf>,
    cloud: Option<String>,
    timeout_seconds: Option<u32>,
}

/// Which layer a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    File(PathBuf),
    Environment(&'static str),
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "option {name}"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Sourced<T> {
    pub(crate) value: T,
    pub(crate) source: Source,
}

/// Everything a command needs to know about its surroundings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) output: Sourced<Output>,
    /// The broker; none means the sockets of this host.
    pub(crate) url: Sourced<Option<BusUrl>>,
    pub(crate) run_dir: Sourced<PathBuf>,
    pub(crate) key: Sourced<Option<PathBuf>>,
    pub(crate) cloud: Sourced<String>,
    pub(crate) timeout: Sourced<Duration>,
}

/// The folder of this user's settings and key.
pub(crate) fn user_folder() -> Option<PathBuf> {
    std::env::var_os("XDG_CONFIG_HOME")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".config")))
        .map(|config| config.join("agentctl"))
}

/// One setting, as `agentctl config` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SettingRow {
    pub(crate) setting: &'static str,
    pub(crate) value: String,
    pub(crate) source: String,
}

impl Settings {
    /// Reads the layers of this process.
    ///
    /// # Errors
    ///
    /// A value that makes no sense, with the layer it stands in.
    pub(crate) fn load(flags: &Globals) -> Result<Self, Usage> {
        let home = user_folder();
        let environment = |name: &str| std::env::var_os(name);
        Self::from_layers(flags, environment, home.as_deref(), Path::new(SYSTEM_FILE))
    }

    fn from_layers(
        flags: &Globals,
        environment: impl Fn(&str) -> Option<OsString>,
        user_folder: Option<&Path>,
        system_file: &Path,
    ) -> Result<Self, Usage> {
        let mut layers = Layers { environment: &environment, files: Vec::new() };
        for path in user_folder.map(|it| it.join("config.toml")).iter().map(PathBuf::as_path) {
            layers.add_file(path)?;
        }
        layers.add_file(system_file)?;

        let output = layers.pick(
            flags.output.map(|output| (output.as_str().to_owned(), "--output")),
            ("AGENTCTL_OUTPUT", identity),
            |file| file.output.clone(),
            || Output::default().as_str().to_owned(),
        )?;
        let output = output.parse(|text| {
            Output::from_str(text, false)
                .map_err(|_| format!("output {text:?} is none of table, wide, json, yaml"))
        })?;
        let run_dir = layers.pick(
            flags.run_dir.clone().map(|path| (path, "--run-dir")),
            ("AGENTCTL_RUN_DIR", PathBuf::from),
            |file| file.run_dir.clone(),
            || "/run/stackhand".into(),
        )?;
        let cloud = layers.pick(
            flags.cloud.clone().map(|cloud| (cloud, "--cloud")),
            ("AGENTCTL_CLOUD", identity),
            |file| file.cloud.clone(),
            || "default".to_owned(),
        )?;
        if cloud.value.is_empty() || cloud.value.contains('/') {
            return Err(Usage::new(format!(
                "cloud {:?} must not be empty or contain a slash (from {})",
                cloud.value, cloud.source
            )));
        }
        let seconds = layers.pick(
            flags.timeout.map(|seconds| (seconds.to_string(), "--timeout")),
            ("AGENTCTL_TIMEOUT", identity),
            |file| file.timeout_seconds.map(|seconds| seconds.to_string()),
            || "60".to_owned(),
        )?;
        let timeout = seconds.parse(|text| match text.parse::<u64>() {
            Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
            _ => Err(format!("timeout {text:?} is not a number of seconds from 1 to 3600")),
        })?;
        let own_key = user_folder.map(|it| it.join("key.pem")).filter(|path| path.exists());
        let key = layers.pick(
            flags.key.clone().map(|path| (Some(path), "--key")),
            ("AGENTCTL_KEY", |path| Some(path.into())),
            |file| file.key.clone().map(Some),
            || own_key,
        )?;
        Ok(Self { output, url: layers.url(flags)?, run_dir, key, cloud, timeout })
    }

    /// The settings as rows, passwords masked.
    pub(crate) fn rows(&self) -> Vec<SettingRow> {
        fn row<T>(setting: &'static str, it: &Sourced<T>, text: String) -> SettingRow {
            SettingRow { setting, value: text, source: it.source.to_string() }
        }
        let url = self.url.value.as_ref();
        let key = self.key.value.as_ref();
        vec![
            row("output", &self.output, self.output.value.as_str().to_owned()),
            row(
                "url",
                &self.url,
                url.map_or_else(|| "none: the sockets of this host".into(), ToString::to_string),
            ),
            row("run_dir", &self.run_dir, self.run_dir.value.display().to_string()),
            row(
                "key",
                &self.key,
                key.map_or_else(|| "none: unsigned".into(), |path| path.display().to_string()),
            ),
            row("cloud", &self.cloud, self.cloud.value.clone()),
            row("timeout_seconds", &self.timeout, self.timeout.value.as_secs().to_string()),
        ]
    }
}

struct Layers<'a> {
    environment: &'a dyn Fn(&str) -> Option<OsString>,
    files: Vec<(PathBuf, File)>,
}

impl Layers<'_> {
    fn add_file(&mut self, path: &Path) -> Result<(), Usage> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return Err(Usage::new(format!("cannot read {}: {error}", path.display())));
            }
        };
        let file = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count()
            });
            Usage::new(format!("{}:{line}: {}", path.display(), error.message()))
        })?;
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// The value of the strongest layer that has one.
    fn pick<T>(
        &self,
        flag: Option<(T, &'static str)>,
        variable: (&'static str, fn(String) -> T),
        from_file: impl Fn(&File) -> Option<T>,
        default: impl FnOnce() -> T,
    ) -> Result<Sourced<T>, Usage> {
        if let Some((value, name)) = flag {
            return Ok(Sourced { value, source: Source::Flag(name) });
        }
        let (name, read) = variable;
        if let Some(text) = (self.environment)(name).filter(|text| !text.is_empty()) {
            let text = text
                .into_string()
                .map_err(|_| Usage::new(format!("environment {name} is not UTF-8")))?;
            return Ok(Sourced { value: read(text), source: Source::Environment(name) });
        }
        Ok(self
            .in_files(from_file)
            .unwrap_or_else(|| Sourced { value: default(), source: Source::Default }))
    }

    fn in_files<T>(&self, from_file: impl Fn(&File) -> Option<T>) -> Option<Sourced<T>> {
        self.files.iter().find_map(|(path, file)| {
            from_file(file).map(|value| Sourced { value, source: Source::File(path.clone()) })
        })
    }

    /// Broker or sockets: each layer may choose either, the strongest choice wins.
    fn url(&self, flags: &Globals) -> Result<Sourced<Option<BusUrl>>, Usage> {
        if flags.local {
            return Ok(Sourced { value: None, source: Source::Flag("--local") });
        }
        let text = if let Some(url) = &flags.url {
            Sourced { value: Some(url.clone()), source: Source::Flag("--url") }
        } else if let Some(url) = (self.environment)("AGENTCTL_URL").filter(|it| !it.is_empty()) {
            let url = url.to_string_lossy().into_owned();
            Sourced { value: Some(url), source: Source::Environment("AGENTCTL_URL") }
        } else {
            self.in_files(|file| match (file.local, &file.url) {
                (Some(true), _) => Some(None),
                (_, Some(url)) => Some(Some(url.clone())),
                _ => None,
            })
            .unwrap_or(Sourced { value: None, source: Source::Default })
        };
        let Some(url) = text.value else {
            return Ok(Sourced { value: None, source: text.source });
        };
        match url.parse::<BusUrl>() {
            Ok(url) => Ok(Sourced { value: Some(url), source: text.source }),
            Err(error) => Err(Usage::new(format!("url: {error} (from {})", text.source))),
        }
    }
}

impl Sourced<String> {
    fn parse<T>(self, read: impl FnOnce(&str) -> Result<T, String>) -> Result<Sourced<T>, Usage> {
        match read(&self.value) {
            Ok(value) => Ok(Sourced { value, source: self.source }),
            Err(problem) => Err(Usage::new(format!("{problem} (from {})", self.source))),
        }
    }
}

#[cfg(test)]
mod tests;
