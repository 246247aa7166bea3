//! `agentctl` with real agents on two hosts, over a real RabbitMQ, every command signed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod broker {
    use std::path::Path;
    use std::process::Output;
    use std::time::Duration;

    use assert_cmd::Command;
    use stackhand_testkit::broker::Broker;
    use stackhand_testkit::{Spawned, bin, wait_for_sync};

    const LIMIT: Duration = Duration::from_secs(30);

    const VOLUMES: &str = "
kind: Volume
name: first
spec: {size_gib: 1}
---
kind: Volume
name: second
spec: {size_gib: 1}
---
kind: Snapshot
name: first-snap
spec: {volume: first}
";

    struct Site<'a> {
        folder: &'a Path,
        url: String,
    }

    impl Site<'_> {
        fn storage_agent(&self, host: &str) -> Spawned {
            let folder = self.folder.join(host);
            let path = folder.display();
            let trusted = self.folder.join("trusted");
            std::fs::create_dir_all(folder.join("run")).unwrap();
            let settings = format!(
                "host = '{host}'\nrun_dir = '{path}/run'\nstate_dir = '{path}/state'\n\
                 [bus]\nurl = '{}'\n[heartbeat]\ninterval_seconds = 1\n\
                 [signing]\ntrusted_controllers = '{}'\n",
                self.url,
                trusted.display()
            );
            std::fs::write(folder.join("stackhand.toml"), settings).unwrap();
            Spawned::start(bin("storage-agent"), ["--config-dir", &path.to_string()])
        }

        fn agentctl(&self, line: &[&str]) -> Output {
            let mut command = Command::cargo_bin("agentctl").unwrap();
            command.env_clear().args(["--url", &self.url, "--timeout", "20"]).args(line);
            command.timeout(Duration::from_secs(60)).output().unwrap()
        }

        fn signed(&self, line: &[&str]) -> Output {
            let key = self.folder.join("controller.pem").display().to_string();
            self.agentctl(&[&["--key", &key], line].concat())
        }

        fn faces(&self) -> (usize, usize) {
            let list = text(&self.agentctl(&["list"]).stdout);
            (list.matches(":-)").count(), list.matches("xxx").count())
        }
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn agents_are_seen_driven_with_a_key_alone_lost_and_found_again() {
        let broker = Broker::start();
        let folder = tempfile::tempdir().unwrap();
        let site = Site { folder: folder.path(), url: broker.url() };
        let key = folder.path().join("controller.pem").display().to_string();
        assert!(site.agentctl(&["keygen", "--out", &key]).status.success());
        std::fs::create_dir(folder.path().join("trusted")).unwrap();
        let trusted = folder.path().join("trusted/controller.pub");
        std::fs::copy(folder.path().join("controller.pem.pub"), trusted).unwrap();
        let manifest = folder.path().join("m.yaml");
        std::fs::write(&manifest, VOLUMES).unwrap();
        let manifest = manifest.display().to_string();

        let _first = site.storage_agent("node1");
        let mut second = site.storage_agent("node2");
        wait_for_sync(LIMIT, "two agents alive", || (site.faces() == (2, 0)).then_some(()));

        let unsigned = site.agentctl(&["apply", "-f", &manifest]);
        assert_ne!(unsigned.status.code(), Some(0), "{unsigned:?}");
        assert!(text(&unsigned.stderr).contains("sign"), "{unsigned:?}");
        let ping = site.agentctl(&["ping"]);
        assert_eq!(ping.status.code(), Some(0), "ping needs no key: {ping:?}");

        let applied = site.signed(&["apply", "-f", &manifest, "--wait=30"]);
        assert_eq!(applied.status.code(), Some(0), "{applied:?}");
        let shown = text(&applied.stdout);
        for line in ["Volume    first       node1", "Volume    second      node2"] {
            assert!(shown.contains(line), "{shown}");
        }
        assert!(shown.contains("Snapshot  first-snap  node1"), "{shown}");
        let again = site.signed(&["apply", "-f", &manifest]);
        assert_eq!(text(&again.stdout).matches("unchanged").count(), 3, "{again:?}");

        second.kill();
        wait_for_sync(LIMIT, "one agent down", || (site.faces() == (1, 1)).then_some(()));
        let list = site.agentctl(&["list"]);
        assert_eq!(list.status.code(), Some(3), "{list:?}");
        assert!(text(&list.stdout).contains("no heartbeat for"), "{list:?}");
        // The second volume is out of sight, and is not made anew on the other host.
        let unsure = site.signed(&["apply", "-f", &manifest]);
        assert_eq!(unsure.status.code(), Some(2), "{unsure:?}");
        let why = "Volume second: spec.host: cannot be chosen while storage-agent on node2 is down";
        assert!(text(&unsure.stderr).contains(why), "{unsure:?}");

        let _again = site.storage_agent("node2");
        wait_for_sync(LIMIT, "two agents alive again", || (site.faces() == (2, 0)).then_some(()));
        let volumes = site.signed(&["get", "volumes"]);
        assert_eq!(volumes.status.code(), Some(0), "{volumes:?}");
        assert!(text(&volumes.stdout).contains("second"), "{volumes:?}");
        let events = site.agentctl(&["events", "--since", "5m", "--host", "node2"]);
        assert!(text(&events.stdout).contains("second is active"), "{events:?}");

        let deleted = site.signed(&["delete", "-f", &manifest, "--wait=30"]);
        assert_eq!(deleted.status.code(), Some(0), "{deleted:?}");
        let left = site.signed(&["get", "-o", "json"]);
        assert_eq!(text(&left.stdout), "[]\n");
    }
}
