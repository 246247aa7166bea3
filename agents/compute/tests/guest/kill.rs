//! The agent's own program, killed at each step of making and removing an instance.

/// They run guests.
mod lab {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::json;
    use stackhand_bus::local::LocalTransport;
    use stackhand_model::{AgentKind, Document, ObjectRef};
    use stackhand_runtime::client::AgentClient;
    use stackhand_testkit::guest::Libvirtd;
    use stackhand_testkit::{Spawned, bin, in_netns, wait_for, wait_for_sync};
    use uuid::Uuid;

    use crate::lab::{NAME, Scene};
    use crate::support::document;

    /// The agent's program with its folders.
    struct Program<'a> {
        root: &'a Path,
        running: Option<Spawned>,
    }

    impl<'a> Program<'a> {
        fn new(root: &'a Path, libvirtd: &Libvirtd) -> Self {
            for folder in ["agent/etc", "agent/run", "agent/state"] {
                fs::create_dir_all(root.join(folder)).unwrap();
            }
            let at = |path: &str| root.join(path);
            let shared = format!("host = \"here\"\nrun_dir = {:?}\n", at("agent/run"));
            fs::write(at("agent/etc/stackhand.toml"), shared).unwrap();
            let own = format!(
                "state_dir = {:?}\n[compute]\nvirt_type = \"qemu\"\nlibvirt_uri = {:?}\n",
                at("agent/state"),
                libvirtd.uri()
            );
            fs::write(at("agent/etc/compute.toml"), own).unwrap();
            Self { root, running: None }
        }

        /// Starts it and speaks to it.
        async fn start(&mut self) -> AgentClient {
            let etc = self.root.join("agent/etc");
            let args = [Path::new("--config-dir"), &etc];
            self.running = Some(Spawned::start(bin("compute-agent"), args));
            let socket = self.root.join("agent/run/compute.sock");
            let transport = Arc::new(LocalTransport::connect(socket));
            let client = AgentClient::new(transport, AgentKind::Compute, "here");
            wait_for(Duration::from_secs(30), "the agent to answer", async || {
                client.ping().await.ok()
            })
            .await;
            client
        }

        /// Kills it as soon as a trace of its work is there.
        fn kill_when(&mut self, what: &str, there: impl Fn() -> bool) {
            wait_for_sync(Duration::from_secs(30), what, || there().then_some(()));
            self.running = None;
        }

        fn folder(&self, id: Uuid) -> PathBuf {
            self.root.join(format!("agent/state/instances/{id}"))
        }

        /// libvirt's files of the domain: its definition, and the process id of its guest.
        fn domain(&self) -> (PathBuf, PathBuf) {
            let root = self.root.join("libvirt");
            (
                root.join(format!("etc/qemu/{NAME}.xml")),
                root.join(format!("run/libvirt/qemu/{NAME}.pid")),
            )
        }
    }

    async fn until_state(client: &AgentClient, object: ObjectRef, state: Option<&str>) {
        wait_for(Duration::from_secs(60), &format!("{object} to be {state:?}"), async || {
            let entries = client.get(Some(object.kind), Some(&[object.id])).await.ok()?;
            let found = entries.first().map(|entry| entry.status.state.as_str());
            (found == state).then_some(())
        })
        .await;
    }

    #[test]
    fn an_agent_killed_at_any_step_of_making_and_removing_leaves_nothing_half_done() {
        in_netns(async || {
            let scene = Scene::new();
            let disk = scene.root.path().join("root.img");
            fs::write(&disk, vec![0xeb; 1 << 20]).unwrap();
            let image = document("Image", 0xa3, 1, &json!({"source": disk, "format": "raw"}));
            let fields = json!({
                "image": Uuid::from_u128(0xa3), "config_drive": true, "swap_mib": 16,
            });
            let instance = Scene::instance(1, fields);
            let object = instance.object();
            let mut program = Program::new(scene.root.path(), &scene.libvirtd);
            let mut images: Vec<Document> = scene.images.clone();
            images.push(image);
            let client = program.start().await;
            client.apply(&images).await.unwrap();
            for image in &images {
                until_state(&client, image.object(), Some("active")).await;
            }
            drop(client);

            let folder = program.folder(object.id);
            let (definition, pid) = program.domain();
            let makes = [
                folder.clone(),
                folder.join("instance.json"),
                folder.join("disk"),
                folder.join("disk.swap"),
                folder.join("disk.config"),
                definition.clone(),
                pid.clone(),
            ];
            for (round, trace) in makes.iter().enumerate() {
                let client = program.start().await;
                client.apply(std::slice::from_ref(&instance)).await.unwrap();
                let what = format!("{} to be made", trace.display());
                program.kill_when(&what, || trace.exists());
                let client = program.start().await;
                until_state(&client, object, Some("active")).await;
                assert_eq!(scene.libvirtd.virsh(["domstate", NAME]).trim(), "running");
                let parts = ["disk", "disk.swap", "disk.config"];
                assert!(parts.iter().all(|part| folder.join(part).is_file()), "round {round}");

                // And away again, killed at another step each time.
                client.delete(&[object]).await.unwrap();
                let goes = [&pid, &definition, &folder][round % 3].clone();
                let what = format!("{} to go", goes.display());
                program.kill_when(&what, || !goes.exists());
                let client = program.start().await;
                until_state(&client, object, None).await;
                assert_eq!(scene.libvirtd.virsh(["list", "--all"]).trim(), "");
                let left = fs::read_dir(folder.parent().unwrap()).unwrap();
                let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(left.len(), 0, "round {round}: {left:?}");
                program.running = None;
            }
        });
    }
}
