//! Who may import whom, among our own crates. ARCHITECTURE.md tells it to people; this keeps it true.
//!
//! Imports point down: model; metadata, bus and kernel; runtime; attach and image; the programs. Programs never import
//! one another.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::collections::{BTreeMap, BTreeSet};

use assert_cmd::Command;
use serde_json::Value;

/// What each crate's own code may import. Tests, benches and fixtures may import more.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("model", &[]),
    ("metadata", &["model"]),
    ("bus", &["model"]),
    ("kernel", &["model"]),
    ("runtime", &["model", "bus", "kernel"]),
    ("attach", &["model", "kernel", "runtime"]),
    ("image", &["model", "kernel", "runtime"]),
    ("compute", &["model", "metadata", "bus", "kernel", "attach", "runtime", "image"]),
    ("network", &["model", "metadata", "bus", "kernel", "runtime"]),
    ("storage", &["model", "bus", "kernel", "attach", "runtime", "image"]),
    ("agentctl", &["model", "bus", "runtime"]),
];

/// Crates that no program is linked with.
const FOR_TESTS: [&str; 4] = ["testkit", "tests", "bench", "fuzz"];

/// For each of our crates, what its own code imports of ours.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ours = |name: &Value| name.as_str().unwrap().strip_prefix("stackhand-").map(str::to_owned);
    let mut imports = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let linked = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|dependency| dependency["kind"] != "dev")
            .filter_map(|dependency| ours(&dependency["name"]))
            .collect();
        let name = ours(&package["name"]).expect("our crates are called stackhand-<folder>");
        imports.insert(name, linked);
    }
    imports
}

#[test]
fn imports_point_down() {
    let imports = imports();
    for (name, may) in MAY_IMPORT {
        let may: BTreeSet<String> = may.iter().map(|&name| name.to_owned()).collect();
        let more: Vec<&String> = imports[name].difference(&may).collect();
        assert!(more.is_empty(), "stackhand-{name} must not import {more:?}");
    }
    let known: BTreeSet<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).chain(FOR_TESTS).collect();
    let all: BTreeSet<&str> = imports.keys().map(String::as_str).collect();
    assert_eq!(all, known, "a new crate has no place in the order of imports yet");
}
