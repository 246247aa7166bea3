//! What goes wrong, and what is told of it.

/// They boot machines.
mod lab {
    use std::fs;
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};
    use stackhand_model::Document;
    use stackhand_runtime::agent::{Agent, Outcome};
    use stackhand_testkit::{in_netns, on_a_host, wait_for};
    use uuid::Uuid;

    use crate::lab::{NAME, Scene};
    use crate::support::{Driven, UP, document, run};

    #[test]
    fn a_guest_stands_still_while_its_disk_is_full_and_goes_on_when_there_is_room() {
        on_a_host(async || {
            let small = tempfile::tempdir().unwrap();
            let folder = small.path().to_str().unwrap();
            run("mount", ["-t", "tmpfs", "-o", "size=8M", "tmpfs", folder]);
            let disk = small.path().join("volume-7");
            fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
            let scene = Scene::new();
            let instance = Scene::instance(
                1,
                json!({"volumes": [{
                    "volume": Uuid::from_u128(7),
                    "connection": {"type": "file", "path": disk, "format": "raw"},
                }]}),
            );
            let object = instance.object();
            let driven = scene.driven();
            driven.want(scene.images.clone(), false);
            driven.want([instance.clone()], false);
            driven.until_active(object).await;
            driven.until_console(&instance, UP).await;
            let pid = scene.libvirtd.guest_pid(NAME);
            let fill = "run dd if=/dev/zero of=/dev/vda bs=1M count=32; sync; echo [$?]";
            driven.talk(&instance, fill, "dd if").await;
            driven.until_told("make room on the host").await;
            run("mount", ["-o", "remount,size=64M", folder]);
            driven.until_console(&instance, "[0]").await;
            driven.until_active(object).await;
            assert_eq!(scene.libvirtd.guest_pid(NAME), pid, "it went on where it was");
            driven.want([instance], true);
            driven.until_gone(object).await;
            driven.kill().await;
            run("umount", [folder]);
        });
    }

    #[test]
    fn a_qemu_that_does_not_answer_is_told_and_holds_up_no_other() {
        in_netns(async || {
            let scene = Scene::new();
            // The first is the one of the scene. The others stand still, but for the last.
            let first = Scene::instance(1, json!({}));
            let still = (2..=6).map(|id| {
                Scene::another(id << 96, 1, json!({"memory_mib": 64, "power_state": "paused"}))
            });
            let last = Scene::another(7 << 96, 1, json!({}));
            let mut all: Vec<_> = [first.clone()].into_iter().chain(still).collect();
            all.push(last.clone());
            let driven = scene.driven();
            driven.want(scene.images.clone(), false);
            driven.want(all.clone(), false);
            for instance in &all {
                driven.until_active(instance.object()).await;
                let usage = driven.act(instance, "usage", Value::Null).await.unwrap();
                assert!(usage["memory_resident_kib"].as_u64().unwrap() > 0, "{usage}");
            }
            assert_eq!(driven.agent.troubles(), Vec::<String>::new());
            // How old the numbers of an instance's disks are, and how long it took to tell.
            let age = async |of: &Document| {
                let begun = Instant::now();
                let usage = driven.act(of, "usage", Value::Null).await.unwrap();
                let age = usage["disk_age_ms"].as_u64().unwrap();
                (Duration::from_millis(age), begun.elapsed())
            };
            let soon = Duration::from_secs(4);

            scene.libvirtd.signal(NAME, "STOP");
            let (old, _) = age(&first).await;
            assert!(old >= Duration::from_secs(5), "the last: {old:?}");
            let (id, troubles) = (first.object().id.to_string(), driven.agent.troubles());
            assert!(troubles.len() == 1 && troubles[0].contains(&id), "{troubles:?}");
            // Nothing waits for it again, and everything of the others is still counted.
            for (of, fresh) in [(&first, false), (&last, true)] {
                let (old, took) = age(of).await;
                assert!(took < soon && (old < soon) == fresh, "{took:?} {old:?}");
            }

            // With as many that owe an answer no other is asked; the kernel's counts still come.
            let name = |id| format!("instance-0000000{id}");
            (2..=6).for_each(|id| scene.libvirtd.signal(&name(id), "STOP"));
            driven.agent.facts().await;
            let troubles = driven.agent.troubles();
            assert_eq!(troubles.len(), 6, "{troubles:?}");
            // That took five seconds, and it had its turn before, if at all.
            let (old, took) = age(&last).await;
            assert!(took < soon && old >= soon, "{took:?} {old:?}");
            let cpu = async || {
                let begun = Instant::now();
                let facts = driven.agent.facts().await;
                assert!(begun.elapsed() < soon, "{:?}", begun.elapsed());
                facts["usage"][last.object().id.to_string()]["cpu_nanoseconds"].as_u64().unwrap()
            };
            let before = cpu().await;
            wait_for(Duration::from_secs(30), "the last to be seen at work", async || {
                (cpu().await > before).then_some(())
            })
            .await;

            // The others answer again, the first is helped as the trouble says.
            (2..=6).for_each(|id| scene.libvirtd.signal(&name(id), "CONT"));
            driven.act(&first, "reboot", json!({"type": "hard"})).await.unwrap();
            wait_for(Duration::from_secs(60), "all to answer", async || {
                let facts = driven.agent.facts().await;
                let ages = facts["usage"].as_object().unwrap().values();
                let told = ages.filter(|it| it["disk_age_ms"].as_u64() < Some(2000)).count();
                (told == all.len() && driven.agent.troubles().is_empty()).then_some(())
            })
            .await;
            let objects: Vec<_> = all.iter().map(Document::object).collect();
            driven.want(all, true);
            for object in objects {
                driven.until_gone(object).await;
            }
            driven.kill().await;
        });
    }

    #[test]
    fn a_change_by_a_qemu_that_does_not_answer_is_told_and_holds_up_no_other() {
        in_netns(async || {
            let scene = Scene::new();
            let disk = scene.root.path().join("volume-7");
            fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
            let volumes = json!([{
                "volume": Uuid::from_u128(7),
                "connection": {"type": "file", "path": disk, "format": "raw"},
            }]);
            let other = |generation, power| {
                let fields = json!({"memory_mib": 64, "power_state": power});
                Scene::another(2 << 96, generation, fields)
            };
            let driven = scene.driven();
            driven.want(scene.images.clone(), false);
            driven.want([Scene::instance(1, json!({})), other(1, "paused")], false);
            let instance = Scene::instance(2, json!({"volumes": volumes}));
            let (object, other_object) = (instance.object(), other(1, "paused").object());
            driven.until_active(object).await;
            driven.until_active(other_object).await;

            // What waits is left behind.
            scene.libvirtd.signal(NAME, "STOP");
            driven.want([instance.clone()], false);
            let told = driven.until_reason(object, "its QEMU does not answer").await;
            assert!(told.contains("volume") && told.contains("--hard"), "{told}");
            // Others are changed, and nothing waits for it again.
            let begun = Instant::now();
            driven.want([other(2, "running")], false);
            driven.until_active(other_object).await;
            driven.passes(2).await;
            assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
            let usage = driven.act(&instance, "usage", Value::Null).await.unwrap();
            assert!(usage["disk_age_ms"].is_null(), "nobody asked it: {usage}");
            let troubles = driven.agent.troubles();
            assert!(troubles[0].contains(&object.id.to_string()), "{troubles:?}");
            let refused = driven.act(&instance, "screenshot", Value::Null).await.unwrap_err();
            assert!(refused.message.contains("does not answer"), "{refused:?}");

            driven.act(&instance, "reboot", json!({"type": "hard"})).await.unwrap();
            let active =
                |outcome: &Outcome| matches!(outcome, Outcome::Active { .. }).then_some(());
            driven.until(object, "it to have its volume", active).await;
            driven.until_console(&instance, "disk vda 2048").await;
            driven.want([instance, other(2, "running")], true);
            driven.until_gone(object).await;
            driven.until_gone(other_object).await;
            driven.kill().await;
        });
    }

    /// Images that would have this host read its own files for a guest, or fill its disk.
    async fn hostile(scene: &Scene, driven: &Driven) {
        let at = |name: &str| scene.root.path().join(name).to_str().unwrap().to_owned();
        let create = |options: &[&str], name: &str, size: &str| {
            let path = at(name);
            let start = ["create", "-q", "-f", "qcow2"].iter().chain(options);
            run("/usr/bin/qemu-img", start.copied().chain([path.as_str(), size]));
            path
        };
        let data = format!("data_file={},data_file_raw=on", at("data"));
        let descriptor = "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\n\
                          RW 63 FLAT \"/etc/shadow\" 0\n";
        fs::write(at("vmdk"), descriptor).unwrap();
        let images = [
            (
                "qcow2",
                create(&["-u", "-F", "raw", "-b", "/etc/shadow"], "backed", "1M"),
                "refers to another file",
            ),
            ("qcow2", create(&["-o", &data], "with-data", "1M"), "refers to another file"),
            ("qcow2", create(&[], "huge", "1P"), "see max_image_gib"),
            ("vmdk", at("vmdk"), "is refused"),
            ("raw", at("vmdk"), "the bytes are vmdk"),
        ];
        for (id, (format, source, told)) in (0xd0..).zip(images) {
            let image = document("Image", id, 1, &json!({"source": source, "format": format}));
            driven.want([image.clone()], false);
            driven.until_reason(image.object(), told).await;
            driven.want([image.clone()], true);
            driven.until_gone(image.object()).await;
        }
    }

    #[test]
    fn what_cannot_be_is_told_and_nothing_is_half_made() {
        in_netns(async || {
            let scene = Scene::new();
            let image = scene.root.path().join("image");
            fs::write(&image, vec![7; 1 << 20]).unwrap();
            let wrong = format!("sha256:{}", "0".repeat(64));
            let wrong = json!({"source": image, "format": "raw", "checksum": wrong});
            let wrong = document("Image", 0xc1, 1, &wrong);
            let driven = scene.driven();
            driven.want(scene.images.clone(), false);
            driven.want([wrong.clone()], false);
            driven.until_told("was asked for").await;
            hostile(&scene, &driven).await;
            let volume = json!([{
                "volume": Uuid::from_u128(7),
                "connection": {"type": "file", "path": "/nowhere/volume-7", "format": "raw"},
            }]);
            let cases = [
                (json!({"cpu": {"mode": "custom", "model": "NoSuchModel"}}), "NoSuchModel"),
                (json!({"vcpus": 500}), "it needs 500 virtual processors"),
                (json!({"memory_mib": 16_000_000}), "it needs 16000000 MiB of memory"),
                (json!({"volumes": volume}), "there is no /nowhere/volume-7"),
                (json!({"image": Uuid::from_u128(0xc1)}), "which failed: "),
                (json!({"image": Uuid::from_u128(0xc2)}), "it is not known here"),
            ];
            for (generation, (fields, told)) in (1..).zip(cases) {
                let instance = Scene::instance(generation, fields);
                let object = instance.object();
                driven.want([instance.clone()], false);
                driven.until_told(told).await;
                driven.passes(2).await;
                assert_eq!(scene.libvirtd.virsh(["list", "--name"]).trim(), "", "{told}");
                driven.want([instance], true);
                driven.until_gone(object).await;
                assert_eq!(scene.libvirtd.virsh(["list", "--all", "--name"]).trim(), "", "{told}");
                let left = fs::read_dir(scene.root.path().join("state/instances"));
                assert_eq!(left.into_iter().flatten().count(), 0, "{told}");
            }

            // A guest that crashes is told of, and started again.
            let instance = Scene::instance(9, json!({}));
            let object = instance.object();
            driven.want([instance.clone()], false);
            driven.until_active(object).await;
            let pid = scene.libvirtd.guest_pid(NAME);
            scene.libvirtd.signal(NAME, "KILL");
            driven.until_told("the guest crashed").await;
            wait_for(Duration::from_secs(30), "another process", async || {
                (scene.libvirtd.virsh(["domstate", NAME]).trim() == "running").then_some(())
            })
            .await;
            assert_ne!(scene.libvirtd.guest_pid(NAME), pid);
            let answer = driven.act(&instance, "start", Value::Null).await.unwrap();
            assert_eq!(answer["power_state"], "running", "as it is");
            driven.want([instance], true);
            driven.until_gone(object).await;
            driven.kill().await;
        });
    }
}
