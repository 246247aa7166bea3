//! The agent's own program, killed at each step of making and removing an instance.

/// They run guests.
mod lab {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};
    use stackhand_bus::local::LocalTransport;
    use stackhand_model::{AgentKind, Document, ObjectRef};
    use stackhand_runtime::client::AgentClient;
    use stackhand_testkit::guest::Libvirtd;
    use stackhand_testkit::{Spawned, bin, in_netns, wait_for, wait_for_sync};
    use uuid::Uuid;

    use crate::lab::{NAME, Scene};
    use crate::support::{UP, document};

    const LIMIT: Duration = Duration::from_secs(60);

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

        /// Starts it and speaks to it. What the one before was running may hold its ledger for a
        /// moment longer: it is started again then, as a supervisor does.
        async fn start(&mut self) -> AgentClient {
            self.running = None;
            let socket = self.root.join("agent/run/compute.sock");
            let transport = Arc::new(LocalTransport::connect(socket));
            let client = AgentClient::new(transport, AgentKind::Compute, "here");
            let etc = self.root.join("agent/etc");
            let begin = Instant::now();
            while client.ping().await.is_err() {
                assert!(begin.elapsed() < LIMIT, "the agent does not answer: {:?}", self.running);
                if !self.running.as_mut().is_some_and(Spawned::is_running) {
                    let args = [Path::new("--config-dir"), &etc];
                    self.running = Some(Spawned::start(bin("compute-agent"), args));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
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

    #[test]
    fn an_agent_killed_amid_a_long_operation_ends_it_or_takes_it_back() {
        in_netns(async || {
            let scene = Scene::new();
            let volume = scene.root.path().join("volume-7");
            fs::File::create(&volume).unwrap().set_len(16 << 20).unwrap();
            let plain = json!({"root_disk_gib": 1});
            let with_volume = json!({"root_disk_gib": 1, "volumes": [{
                "volume": Uuid::from_u128(7),
                "connection": {"type": "file", "path": volume, "format": "raw"},
            }]});
            let instance = Scene::instance(1, plain.clone());
            let object = instance.object();
            let mut program = Program::new(scene.root.path(), &scene.libvirtd);
            let client = program.start().await;
            let mut all = scene.images.clone();
            all.push(instance);
            client.apply(&all).await.unwrap();
            until_state(&client, object, Some("active")).await;
            let folder = program.folder(object.id);
            let said = |text: &str| {
                let log = fs::read_to_string(folder.join("console.log")).unwrap_or_default();
                log.contains(text)
            };
            wait_for(LIMIT, "the guest to be up", async || said(UP).then_some(())).await;
            let noted = |text: &str| {
                let record = fs::read_to_string(folder.join("instance.json")).unwrap_or_default();
                record.replace([' ', '\n'], "").contains(text)
            };
            let state = || scene.libvirtd.virsh(["domstate", NAME]).trim().to_owned();
            // An answer that never comes, because who would give it is killed.
            let ask = |client: AgentClient, action: &'static str| {
                tokio::spawn(async move { client.act(object, action, Value::Null).await })
            };

            // The picture is taken back, and another can be taken.
            let asked = ask(client, "snapshot");
            let copy = folder.join("disk.copy");
            wait_for(LIMIT, "a copy to begin", async || copy.exists().then_some(())).await;
            program.running = None;
            let _cut_off = asked.await;
            let client = program.start().await;
            wait_for(LIMIT, "the copy to be gone", async || {
                (!copy.exists() && !noted("snapshot")).then_some(())
            })
            .await;
            until_state(&client, object, Some("active")).await;
            let job = scene.libvirtd.virsh(["domjobinfo", NAME]);
            assert!(job.contains("None"), "{job}");
            let image = client.act(object, "snapshot", json!({"name": "whole"})).await.unwrap();
            assert!(Path::new(image["path"].as_str().unwrap()).exists());

            // What was accepted is done: its memory goes to disk and comes back.
            let asked = ask(client, "suspend");
            wait_for(LIMIT, "it to be noted", async || {
                noted("\"state\":\"suspended\"").then_some(())
            })
            .await;
            program.running = None;
            let _cut_off = asked.await;
            let client = program.start().await;
            wait_for(LIMIT, "it to be saved", async || (state() == "shut off").then_some(())).await;
            let saved = async || {
                let info = scene.libvirtd.virsh(["dominfo", NAME]);
                let line = info.lines().find(|line| line.starts_with("Managed save:"));
                line.is_some_and(|line| line.ends_with("yes")).then_some(())
            };
            wait_for(LIMIT, "its memory to be on disk", saved).await;
            let asked = ask(client, "resume");
            wait_for(LIMIT, "it to be noted", async || {
                noted("\"state\":\"running\"").then_some(())
            })
            .await;
            program.running = None;
            let _cut_off = asked.await;
            let client = program.start().await;
            wait_for(LIMIT, "it to run", async || (state() == "running").then_some(())).await;
            until_state(&client, object, Some("active")).await;

            // A volume is in, and out, whenever the agent dies.
            for (generation, spec, line) in
                [(2, &with_volume, "vdb 32768."), (3, &plain, "vda 2097152.")]
            {
                let changed = Scene::instance(generation, spec.clone());
                let before = fs::metadata(folder.join("console.log")).unwrap().len();
                client.apply(&[changed]).await.unwrap();
                program.running = None;
                let client = program.start().await;
                until_state(&client, object, Some("active")).await;
                wait_for(LIMIT, &format!("the guest to see {line}"), async || {
                    let log = fs::read_to_string(folder.join("console.log")).ok()?;
                    let new = usize::try_from(before).ok().and_then(|at| log.get(at..))?;
                    new.lines().any(|it| it.ends_with(line)).then_some(())
                })
                .await;
                drop(client);
            }

            // It is made anew, wherever the agent died.
            let disk = folder.join("disk");
            let running = program.domain().1;
            for round in 0..3 {
                let client = program.start().await;
                let born = || fs::metadata(&disk).and_then(|it| it.created()).ok();
                let pid = || fs::read_to_string(&running).ok();
                let (root, guest) = (born(), pid());
                let asked = ask(client, "rebuild");
                wait_for(LIMIT, &format!("step {round} of the rebuild"), async || {
                    let there = match round {
                        0 => noted("\"rebuild\":true"),
                        1 => pid() != guest,
                        _ => born() != root,
                    };
                    there.then_some(())
                })
                .await;
                program.running = None;
                let _cut_off = asked.await;
                let client = program.start().await;
                until_state(&client, object, Some("active")).await;
                wait_for(LIMIT, "it to be made anew", async || {
                    let anew = born().is_some_and(|it| Some(it) != root);
                    (anew && !noted("rebuild") && state() == "running").then_some(())
                })
                .await;
            }
            let client = program.start().await;
            client.delete(&[object]).await.unwrap();
            until_state(&client, object, None).await;
            assert_eq!(scene.libvirtd.virsh(["list", "--all"]).trim(), "");
        });
    }
}
