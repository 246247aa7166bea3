//! The reference in `docs/reference` is what the programs and the default settings say.
//!
//! `make reference` writes it anew: this test with `STACKHAND_REFERENCE=write`.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;
use stackhand_testkit::bin;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The default settings with their comments, which `default_settings` holds to the programs.
fn settings() -> String {
    let mut out = "# Settings\n\nMade by `make reference` from the files that the packages install into `/etc/stackhand`.\n".to_owned();
    for (file, what) in [
        ("stackhand.toml", "What all agents of a host share"),
        ("network.toml", "The network agent's own"),
        ("compute.toml", "The compute agent's own"),
        ("storage.toml", "The storage agent's own"),
    ] {
        let text = fs::read_to_string(top().join("packaging/config").join(file)).unwrap();
        out += &format!("\n## {file}\n\n{what}.\n\n```toml\n{}\n```\n", text.trim_end());
    }
    out
}

#[test]
fn the_reference_is_what_the_programs_say() {
    let folder = top().join("docs/reference");
    let made = tempfile::tempdir().unwrap();
    let mut agentctl = Command::new(bin("agentctl"));
    agentctl.arg("reference").arg(made.path()).timeout(Duration::from_secs(60)).assert().success();
    fs::write(made.path().join("settings.md"), settings()).unwrap();
    for name in ["documents.md", "commands.md", "settings.md"] {
        let text = fs::read_to_string(made.path().join(name)).unwrap();
        let kept = folder.join(name);
        if std::env::var_os("STACKHAND_REFERENCE").is_some_and(|it| it == "write") {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&kept, &text).unwrap();
        }
        let written = fs::read_to_string(&kept).unwrap_or_default();
        assert!(written == text, "docs/reference/{name} is out of date: run `make reference`");
    }
}
