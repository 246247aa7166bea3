//! What every user meets first: help, exit statuses, closed pipes, colours.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::time::Duration;

use assert_cmd::Command;

fn agentctl(run_dir: &std::path::Path) -> Command {
    let mut command = Command::cargo_bin("agentctl").unwrap();
    command.env_clear().args(["--run-dir", &run_dir.display().to_string()]);
    command.timeout(Duration::from_secs(30));
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn without_agents_the_remedy_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let output = agentctl(folder.path()).args(["get", "ports"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.starts_with("agentctl: no agent has a socket here"), "{told}");
    let list = agentctl(folder.path()).args(["list", "-o", "json"]).output().unwrap();
    assert_eq!((list.status.code(), text(&list.stdout)), (Some(0), "[]\n".to_owned()));
}

#[test]
fn a_socket_that_nobody_answers_on_is_an_agent_that_is_down() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let output = agentctl(folder.path()).arg("list").output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let row = text(&output.stdout);
    assert!(row.contains("xxx") && row.contains("network"), "{row}");
    let ping = agentctl(folder.path()).args(["ping"]).output().unwrap();
    assert_eq!(ping.status.code(), Some(3), "{ping:?}");
}

#[test]
fn wrong_usage_ends_with_two() {
    let folder = tempfile::tempdir().unwrap();
    for line in [
        &["frobnicate"][..],
        &["get", "prot"],
        &["list", "--type", "disk"],
        &["apply", "-f", "/nonexistent.yaml"],
        &["--timeout", "0", "list"],
        &["--url", "http://x", "list"],
        &["wait", "web"],
        &["delete"],
    ] {
        let output = agentctl(folder.path()).args(line).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{line:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{line:?}");
    }
    let output = agentctl(folder.path()).args(["get", "prot"]).output().unwrap();
    assert!(text(&output.stderr).contains("did you mean Port?"), "{output:?}");
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    use std::os::fd::OwnedFd;
    use std::process::Stdio;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    // A schema is longer than any buffer.
    #[expect(clippy::disallowed_methods, reason = "a closed standard output needs std's own")]
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("agentctl"))
        .env_clear()
        .arg("schema")
        .stdout(Stdio::from(OwnedFd::from(writer)))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn no_colours_go_into_a_file() {
    let folder = tempfile::tempdir().unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.path().join("compute.sock")).unwrap());
    let output = agentctl(folder.path()).arg("list").output().unwrap();
    assert!(!text(&output.stdout).contains('\u{1b}'), "{output:?}");
}

#[test]
fn help_teaches_with_examples_and_exit_statuses() {
    let folder = tempfile::tempdir().unwrap();
    let help = agentctl(folder.path()).arg("--help").output().unwrap();
    let help = text(&help.stdout);
    for expected in ["Examples:", "Exit status:", "agentctl apply -f cloud.yaml --wait"] {
        assert!(help.contains(expected), "{help}");
    }
    let apply = agentctl(folder.path()).args(["apply", "--help"]).output().unwrap();
    assert!(text(&apply.stdout).contains("Short forms"), "{apply:?}");
}

#[test]
fn manual_pages_and_completions_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let man = folder.path().display().to_string();
    agentctl(folder.path()).args(["man", &man]).assert().success();
    let page = std::fs::read_to_string(folder.path().join("agentctl-apply.1")).unwrap();
    assert!(page.contains(".TH agentctl-apply 1"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let output = agentctl(folder.path()).args(["completion", shell]).output().unwrap();
        assert!(text(&output.stdout).contains("agentctl"), "{shell}");
    }
}

#[test]
fn config_tells_where_settings_come_from() {
    let folder = tempfile::tempdir().unwrap();
    let output = agentctl(folder.path())
        .env("AGENTCTL_URL", "rabbit://u:hunter2@b1/")
        .env("AGENTCTL_CLOUD", "lab")
        .arg("config")
        .output()
        .unwrap();
    let shown = text(&output.stdout);
    assert!(shown.contains("environment AGENTCTL_CLOUD"), "{shown}");
    assert!(shown.contains("option --run-dir") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_key_pair_is_made_once_and_only_its_owner_reads_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("controller.pem");
    let line = ["keygen", "--out", &key.display().to_string(), "--comment", "ops"];
    let made = agentctl(folder.path()).args(line).args(["-o", "json"]).output().unwrap();
    assert_eq!(made.status.code(), Some(0), "{made:?}");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let public = std::fs::read_to_string(folder.path().join("controller.pem.pub")).unwrap();
    assert!(public.starts_with("stackhand-ed25519 ") && public.ends_with(" ops\n"), "{public}");
    let again = agentctl(folder.path()).args(line).output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(text(&again.stderr).contains("never overwritten"), "{again:?}");
    let home = agentctl(folder.path())
        .env("XDG_CONFIG_HOME", folder.path())
        .arg("keygen")
        .output()
        .unwrap();
    assert_eq!(home.status.code(), Some(0), "{home:?}");
    let config = agentctl(folder.path())
        .env("XDG_CONFIG_HOME", folder.path())
        .arg("config")
        .output()
        .unwrap();
    assert!(text(&config.stdout).contains("agentctl/key.pem"), "{config:?}");
}
