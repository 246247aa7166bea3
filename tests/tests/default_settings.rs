//! The settings files that the packages ship: they say what the defaults are, so they must be right.
//!
//! Every key stands in them as a comment, `#key = value`. The value is the default, unless the words above
//! it end with `Example:`. The agents' own files are put before the agents themselves.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde::{Deserialize, Serialize};
use stackhand_runtime::config::{self, AgentSection, Problems, Settings, Sources};

/// A section without keys: what all agents share is looked at here, not what one of them adds.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct NoSection {}

impl AgentSection for NoSection {
    const AGENT: &'static str = "network";

    fn check(&self, _problems: &mut Problems) {}
}

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/config")
}

/// The file with its comments taken for settings; examples too, if wanted.
fn uncommented(file: &str, with_examples: bool) -> String {
    let text = fs::read_to_string(shipped().join(file)).unwrap();
    let mut is_example = false;
    let mut out = String::new();
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("# ") {
            is_example = words.ends_with("Example:");
        } else if let Some(setting) = line.strip_prefix('#').filter(|rest| !rest.is_empty()) {
            if with_examples || !is_example {
                out.push_str(setting);
            }
        } else {
            out.push_str(line);
            is_example &= !line.is_empty();
        }
        out.push('\n');
    }
    out
}

fn load(dir: &Path) -> Settings<NoSection> {
    let sources = Sources { config_dir: dir.to_owned(), agent_file: None, environment: Vec::new() };
    match config::load::<NoSection>(&sources) {
        Ok(loaded) => {
            let warnings: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
            assert!(warnings.iter().all(|warning| warning.contains("password")), "{warnings:?}");
            loaded.settings
        }
        Err(errors) => panic!("{:#?}", errors.problems),
    }
}

#[test]
fn the_shared_file_as_shipped_changes_no_default() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(shipped().join("stackhand.toml"), dir.path().join("stackhand.toml")).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let mut defaults = load(empty.path());
    defaults.common.signing.trusted_controllers = dir.path().join("trusted_controllers");
    assert_eq!(load(dir.path()), defaults);
}

#[test]
fn every_value_in_the_shared_file_is_the_default() {
    let text = uncommented("stackhand.toml", false);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("stackhand.toml"), &text).unwrap();
    assert_eq!(load(dir.path()), Settings::default());
}

#[test]
fn every_example_in_the_shared_file_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("stackhand.toml"), uncommented("stackhand.toml", true)).unwrap();
    let settings = load(dir.path());
    assert_eq!(settings.common.host, "compute1");
    assert!(settings.common.bus.url.is_some() && settings.common.http.listen.is_some());
}

#[test]
fn the_shared_file_names_every_key_there_is() {
    let text = uncommented("stackhand.toml", true);
    let told: toml::Table = text.parse().unwrap();
    let known = serde_json::to_value(Settings::<NoSection>::default().common).unwrap();
    for (key, value) in known.as_object().unwrap() {
        if key == "state_dir" {
            continue; // each agent has its own; its own file tells
        }
        assert!(told.contains_key(key), "stackhand.toml does not tell of `{key}`");
        for inner in value.as_object().into_iter().flat_map(|table| table.keys()) {
            // Options handed to the AMQP transport as they are.
            assert!(
                inner == "amqp" || told[key].as_table().unwrap().contains_key(inner),
                "stackhand.toml does not tell of `{key}.{inner}`"
            );
        }
    }
}

/// What an agent says its settings are: `key = value` of each section, without the sources.
fn printed(agent: &str, dir: &Path) -> Vec<String> {
    let output = Command::new(stackhand_testkit::bin(&format!("{agent}-agent")))
        .args(["--print-config", "--config-dir"])
        .arg(dir)
        .env_clear()
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && error.is_empty(), "{agent}-agent: {error}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("[{agent}]")), "{agent}-agent prints no settings: {text}");
    let without_source =
        |line: &str| line.split("  #").next().unwrap_or_default().trim().to_owned();
    text.lines().map(without_source).filter(|line| !line.contains("trusted_controllers")).collect()
}

#[test]
fn every_value_in_an_agents_own_file_is_its_default() {
    let empty = tempfile::tempdir().unwrap();
    for agent in config::AGENTS {
        let dir = tempfile::tempdir().unwrap();
        let file = format!("{agent}.toml");
        fs::write(dir.path().join(&file), uncommented(&file, false)).unwrap();
        assert_eq!(printed(agent, dir.path()), printed(agent, empty.path()), "{file}");
    }
}

#[test]
fn every_example_in_an_agents_own_file_is_accepted_and_every_key_told() {
    for agent in config::AGENTS {
        let dir = tempfile::tempdir().unwrap();
        let file = format!("{agent}.toml");
        let text = uncommented(&file, true);
        fs::write(dir.path().join(&file), &text).unwrap();
        let told: toml::Table = text.parse().unwrap();
        let printed: toml::Table = printed(agent, dir.path()).join("\n").parse().unwrap();
        for key in printed[agent].as_table().unwrap().keys() {
            assert!(told[agent].get(key).is_some(), "{file} does not tell of `{agent}.{key}`");
        }
    }
}
