//! Volumes over iSCSI on this host: the agent's program, tgtd, and guests whose QEMU is the
//! initiator. Needs root, tgt, QEMU with its iSCSI client, and the guest's kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "support/machine.rs"]
mod machine;

/// Named `guest` because that is how the test tiers know it, see `.config/nextest.toml`.
mod guest {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::{Value, json};
    use stackhand_bus::local::LocalTransport;
    use stackhand_model::{AgentKind, Document, Kind, ObjectRef, State};
    use stackhand_runtime::client::AgentClient;
    use stackhand_storage::export::Exporter;
    use stackhand_storage::export::tgt::Tgt;
    use stackhand_testkit::{Spawned, free_port, wait_for, wait_for_sync};
    use tempfile::TempDir;
    use uuid::Uuid;

    use super::machine::{Guest, Iscsi, digest};

    const LIMIT: Duration = Duration::from_secs(90);

    /// A host with tgtd, and settings for an agent.
    struct Bench {
        root: TempDir,
        port: u16,
        socket: PathBuf,
    }

    impl Bench {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let port = free_port();
            // Its number of the socket ends at 32767; the folder is ours alone.
            let socket = root.path().join("tgtd.1");
            let settings = format!(
                "host = \"here\"\nstate_dir = \"{0}/state\"\nrun_dir = \"{0}/run\"\n\
                 [storage.export]\ntype = \"tgt\"\nportals = [\"127.0.0.1:{port}\"]\n\
                 tgt_socket = \"{1}\"\n[storage.backends.default]\novercommit_percent = 10000\nreserved_percent = 0\n",
                root.path().display(),
                socket.display(),
            );
            fs::create_dir(root.path().join("etc")).unwrap();
            fs::write(root.path().join("etc/stackhand.toml"), settings).unwrap();
            Self { root, port, socket }
        }

        fn tgtd(&self) -> Spawned {
            #[expect(clippy::disallowed_methods, reason = "a daemon of the test, ended with it")]
            let mut command = Command::new("/usr/bin/setpriv");
            // Killed with the test, however that ends.
            command
                .args(["--pdeathsig", "KILL", "--", "/usr/sbin/tgtd"])
                .args(["-f", "--control-port", "1", "--iscsi"])
                .arg(format!("portal=127.0.0.1:{}", self.port))
                .env("TGT_IPC_SOCKET", self.root.path().join("tgtd"));
            let mut daemon = Spawned::start_command(command);
            wait_for_sync(Duration::from_secs(20), "tgtd to answer", || {
                assert!(daemon.is_running(), "{daemon:?}");
                self.exporter().observe().ok()
            });
            daemon
        }

        fn exporter(&self) -> Tgt {
            Tgt::new(&self.socket, vec![])
        }

        fn agent(&self) -> Spawned {
            let etc = self.root.path().join("etc").display().to_string();
            let program = env!("CARGO_BIN_EXE_storage-agent");
            let mut agent = Spawned::start(program, ["--config-dir", &etc]);
            agent.wait_for_output(Duration::from_secs(20), "ready");
            agent
        }

        fn client(&self) -> AgentClient {
            let socket = self.root.path().join("run/storage.sock");
            AgentClient::new(Arc::new(LocalTransport::connect(socket)), AgentKind::Storage, "here")
        }

        async fn apply(&self, documents: &[Document]) {
            self.client().apply(documents).await.unwrap();
            for document in documents {
                self.until(document.object(), State::Active).await;
            }
        }

        async fn until(&self, object: ObjectRef, state: State) -> Value {
            let what = format!("{object} to be {state:?}");
            wait_for(LIMIT, &what, async || {
                let entries =
                    self.client().get(Some(object.kind), Some(&[object.id])).await.ok()?;
                let status = &entries.first()?.status;
                (status.state == state).then(|| status.observed.clone())
            })
            .await
        }

        async fn until_gone(&self, object: ObjectRef) {
            wait_for(LIMIT, &format!("{object} to be gone"), async || {
                let found = self.client().get(Some(object.kind), Some(&[object.id])).await.ok()?;
                found.is_empty().then_some(())
            })
            .await;
        }

        async fn connection(&self, attachment: &Document) -> Iscsi {
            let observed = self.until(attachment.object(), State::Active).await;
            Iscsi::new(&serde_json::from_value(observed["connection"].clone()).unwrap())
        }
    }

    fn document(kind: &str, id: u128, generation: u64, spec: &Value) -> Document {
        let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
        Document::from_value(&json!({
            "kind": kind, "id": id, "name": name, "generation": generation, "spec": spec,
        }))
        .unwrap()
    }

    fn volume(id: u128, more: &Value) -> Document {
        let mut spec = json!({"host": "here", "size_gib": 1});
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        document("Volume", id, 1, &spec)
    }

    fn attachment(id: u128, volume: u128, host: &str) -> Document {
        let spec = json!({"volume": Uuid::from_u128(volume), "connector": {"host": host}});
        document("Attachment", id, 1, &spec)
    }

    #[tokio::test]
    async fn what_one_guest_writes_over_iscsi_another_reads_and_agents_may_die_meanwhile() {
        let bench = Bench::new();
        let mut tgtd = bench.tgtd();
        let agent = bench.agent();
        let link = attachment(30, 1, "there");
        bench.apply(&[volume(1, &json!({})), link.clone()]).await;
        let disk = bench.connection(&link).await;

        // Who may not, may not.
        let info = disk.info();
        assert!(info.status.success(), "{}", String::from_utf8_lossy(&info.stderr));
        let stranger = Iscsi { initiator: "iqn.2026-11.org.x:stranger".into(), ..disk.clone() };
        assert!(!stranger.info().status.success(), "another initiator must not get in");
        let liar = Iscsi { password: "wrongwrongwrong1".into(), ..disk.clone() };
        assert!(!liar.info().status.success(), "a wrong password must not get in");

        // A guest writes; the agent is killed under it and comes back with nothing to do.
        let guest = Guest::start(
            &disk,
            "for turn in 1 2 3 4; do dd if=/dev/urandom of=/dev/vdb bs=1M count=8 2>/dev/null; \
             sync; echo turn-$turn; sleep 1; done\n\
             echo 3 >/proc/sys/vm/drop_caches\n\
             echo wrote $(dd if=/dev/vdb bs=1M count=8 2>/dev/null | sha256sum)",
        );
        let mut agent = agent;
        wait_for_sync(LIMIT, "the guest to write", || {
            guest.output().contains("turn-1").then_some(())
        });
        agent.kill();
        let mut agent = bench.agent();
        let seen = bench.exporter().observe().unwrap();
        assert_eq!(seen.len(), 1);
        assert!(seen.values().all(|seen| seen.sessions.contains(&disk.initiator)), "{seen:?}");
        // Deleting the attachment waits for the guest.
        bench.client().delete(&[link.object()]).await.unwrap();
        let wrote = digest(&guest.finish(), "wrote ");
        bench.until_gone(link.object()).await;
        assert!(bench.exporter().observe().unwrap().is_empty());
        assert!(!disk.info().status.success(), "a host that let go must not get in again");

        // A snapshot, then the volume goes to another host's guest, and so does a copy.
        let snapshot = document("Snapshot", 20, 1, &json!({"volume": Uuid::from_u128(1)}));
        bench.apply(&[snapshot]).await;
        let again = attachment(31, 1, "yonder");
        bench.apply(std::slice::from_ref(&again)).await;
        let second = bench.connection(&again).await;
        assert_ne!(second.password, disk.password);
        let script = "echo read $(dd if=/dev/vdb bs=1M count=8 2>/dev/null | sha256sum)\n\
                      dd if=/dev/zero of=/dev/vdb bs=1M count=8 2>/dev/null; sync";
        let said = Guest::start(&second, script).finish();
        assert_eq!(digest(&said, "read "), wrote);

        let copy = volume(2, &json!({"source": {"snapshot": Uuid::from_u128(20)}}));
        let third = attachment(32, 2, "yonder");
        bench.apply(&[copy, third.clone()]).await;

        // tgtd forgets everything when it ends; the next pass puts it back.
        tgtd.kill();
        drop(tgtd);
        let _gone = fs::remove_file(&bench.socket);
        let _tgtd = bench.tgtd();
        agent.kill();
        let mut agent = bench.agent();
        let third = bench.connection(&third).await;
        let script = "echo read $(dd if=/dev/vdb bs=1M count=8 2>/dev/null | sha256sum)";
        wait_for_sync(LIMIT, "the targets to be back", || {
            (bench.exporter().observe().unwrap().len() == 2).then_some(())
        });
        let said = Guest::start(&third, script).finish();
        assert_eq!(digest(&said, "read "), wrote, "the snapshot kept what was overwritten");
        for secret in [&disk.password, &second.password, &third.password] {
            assert!(!agent.output().contains(secret.as_str()), "a password is in the log");
        }
        assert_eq!(bench.client().get(Some(Kind::Volume), None).await.unwrap().len(), 2);
        agent.terminate(Duration::from_secs(20));
    }

    #[tokio::test]
    async fn two_hundred_exported_volumes_are_adopted_without_a_write() {
        let bench = Bench::new();
        let _tgtd = bench.tgtd();
        let mut agent = bench.agent();
        let mut documents = Vec::new();
        for id in 1..=200 {
            documents.push(volume(id, &json!({})));
            documents.push(attachment(1000 + id, id, "there"));
        }
        bench.client().apply(&documents).await.unwrap();
        wait_for(LIMIT, "200 targets", async || {
            let observed = bench.exporter().observe().ok()?;
            (observed.len() == 200).then_some(())
        })
        .await;
        bench.until(documents[399].object(), State::Active).await;
        agent.kill();
        let mut agent = bench.agent();
        let said = agent.wait_for_output(LIMIT, "first look at the backends is done");
        assert!(said.contains("steps=0"), "{said}");
        bench.until(documents[399].object(), State::Active).await;
        assert!(!agent.output().contains("applying"), "{}", agent.output());
        agent.terminate(Duration::from_secs(20));
    }
}
