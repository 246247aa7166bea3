//! A whole Debian with cloud-init, of which nothing is ours: it is told who it is by the metadata
//! service and by both kinds of config drive, and is reached by ssh. It boots machines, so it
//! belongs to the slow tests.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{ChildStdout, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use assert_cmd::Command;
use serde_json::Value;
use stackhand_testkit::{bin, wait_for_sync};

use crate::cloud::{Cloud, Host, LIMIT, run, top};

/// What three such machines may take to boot where every instruction is translated, and others
/// work beside them.
const BOOT: Duration = Duration::from_secs(420);

/// Who is to get in, and into what.
struct Door<'a> {
    cloud: &'a Cloud,
    key: String,
    /// Network namespace from which it is reached.
    space: String,
    address: String,
}

impl Door<'_> {
    /// Runs a command on the machine, by ssh; what it said if that worked.
    fn ssh(&self, command: &str) -> Option<String> {
        let options = [
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "LogLevel=ERROR",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ConnectTimeout=5",
            "-i",
            &self.key,
        ];
        let who = format!("debian@{}", self.address);
        let arguments = ["exec", self.cloud.host.path(), "ip", "netns", "exec", &self.space, "ssh"];
        let all = arguments.into_iter().chain(options).chain([who.as_str(), command]);
        let output = Command::new(Host::script()).args(all).timeout(LIMIT).output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(said)
    }

    fn check(&self, name: &str, source: &str) {
        let what = format!("{name} to be reached by ssh at {}", self.address);
        wait_for_sync(BOOT, &what, || {
            // It ends when cloud-init has done all that it does.
            let status = self.ssh("cloud-init status --wait")?;
            status.contains("done").then_some(())
        });
        let ask = |command: &str| {
            self.ssh(command).unwrap_or_else(|| panic!("{name} does not do `{command}`"))
        };
        assert_eq!(ask("hostname"), name);
        assert_eq!(ask("cat /etc/seen"), format!("user data of {name}"));
        let result: Value = serde_json::from_str(&ask("cat /run/cloud-init/result.json")).unwrap();
        let found = result["v1"]["datasource"].as_str().unwrap();
        assert!(found.starts_with(source), "{name}: {result}");
        assert_eq!(result["v1"]["errors"], Value::Array(vec![]), "{name}: {result}");
        assert_eq!(ask("sudo id -u"), "0", "the user may become root");
    }
}

/// A command on a terminal of its own, with what it shows.
struct Terminal {
    child: std::process::Child,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    fn start(command: &str) -> Self {
        #[expect(clippy::disallowed_methods, reason = "ended with the test, by its own id")]
        let mut child = std::process::Command::new("/usr/bin/script")
            .args(["--quiet", "--return", "--flush", "--command", command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let shown = Arc::default();
        let (mut from, to): (ChildStdout, Arc<Mutex<String>>) =
            (child.stdout.take().unwrap(), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                to.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Self { child, shown }
    }

    fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).unwrap();
    }

    fn wait_for(&self, text: &str) {
        wait_for_sync(LIMIT, &format!("{text:?} on the terminal"), || {
            self.shown.lock().unwrap().contains(text).then_some(())
        });
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn a_debian_with_cloud_init_takes_its_name_key_and_user_data_and_is_reached_by_ssh() {
    let mut cloud = Cloud::new("cloud-image");
    let key = cloud.at("key").display().to_string();
    let args = ["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", &key];
    run(Path::new("/usr/bin/ssh-keygen"), args);
    let public = std::fs::read_to_string(format!("{key}.pub")).unwrap();
    cloud.start_all();
    let manifest = top().join("tests/tests/first_cloud/cloud-images.yaml");
    cloud.with(&manifest, public.trim(), &["apply"]);
    wait_for_sync(BOOT, "everything to be made", || {
        let held = cloud.held();
        (!held.is_empty() && held.iter().all(|(_, _, state)| state == "active")).then_some(())
    });

    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let router = text(&cloud.get("router", "router1")["id"]);
    let inside = |name: &str| Door {
        cloud: &cloud,
        key: key.clone(),
        space: format!("qrouter-{router}"),
        address: text(
            &cloud.get("port", &format!("{name}-int1"))["document"]["spec"]["fixed_ips"][0]["address"],
        ),
    };
    let floating = text(&cloud.get("floatingip", "reached")["document"]["spec"]["address"]);
    let outside =
        Door { cloud: &cloud, key: key.clone(), space: "provider".into(), address: floating };
    outside.check("by-metadata", "DataSourceOpenStack");
    inside("by-config-drive").check("by-config-drive", "DataSourceConfigDrive");
    inside("by-nocloud").check("by-nocloud", "DataSourceNoCloud");

    // The agent in the guest answers on its channel.
    let id = text(&cloud.get("instance", "by-metadata")["id"]);
    let domain = format!("instance-{}", &id[..8]);
    let ping = ["virsh", "qemu-agent-command", &domain, "{\"execute\":\"guest-ping\"}"];
    assert_eq!(cloud.host.run(ping).trim(), "{\"return\":{}}");

    // What agentctl shows of it.
    let wide = cloud.agentctl(&["get", "instances", "-o", "wide"]);
    let line = wide.lines().find(|line| line.starts_with("by-metadata")).unwrap();
    for shown in ["running", "cloud", "by-metadata-int1"] {
        assert!(line.contains(shown), "{shown} is not in {wide}");
    }
    let described = cloud.agentctl(&["describe", "instance", "by-metadata"]);
    assert!(described.contains(&domain), "{described}");
    let top = cloud.agentctl(&["top", "--once", "--every", "1"]);
    assert!(top.contains("by-nocloud") && top.contains("node1"), "{top}");
    let picture = cloud.at("screen.png");
    cloud.agentctl(&["screenshot", "by-metadata", "--file", picture.to_str().unwrap()]);
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG"));

    // A person at a terminal.
    let command = format!(
        "{} --local --run-dir {} --cloud {} console by-nocloud",
        bin("agentctl").display(),
        cloud.at("run").display(),
        cloud.name
    );
    let mut terminal = Terminal::start(&command);
    terminal.wait_for("leave with Ctrl-]");
    terminal.type_in("\r");
    terminal.wait_for("by-nocloud login:");
    terminal.type_in("\u{1d}");
    terminal.wait_for("left by-nocloud");
    let status =
        wait_for_sync(LIMIT, "agentctl console to end", || terminal.child.try_wait().unwrap());
    assert!(status.success(), "{status}: {}", terminal.shown.lock().unwrap());
    drop(terminal);

    cloud.with(&manifest, public.trim(), &["delete", "--wait"]);
    assert_eq!(cloud.host.run(["virsh", "list", "--all", "--name"]).trim(), "");
}
