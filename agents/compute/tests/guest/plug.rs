//! What is done to a guest that runs: seen from inside.

/// They boot machines.
mod lab {
    use std::fs;
    use std::time::Duration;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::{Value, json};
    use stackhand_model::ErrorCode;
    use stackhand_runtime::agent::Agent;
    use stackhand_testkit::{in_netns, wait_for};
    use uuid::Uuid;

    use crate::lab::{NAME, Scene};
    use crate::support::{UP, run};

    #[test]
    fn devices_come_and_go_while_a_guest_runs_and_it_is_asked_pictured_and_put_to_sleep() {
        in_netns(async || {
            let scene = Scene::new();
            let disk = scene.root.path().join("volume-7");
            fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
            let port: Uuid = "6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11".parse().unwrap();
            let base = json!({
                "root_disk_gib": 1, "vnc": true, "config_drive": true,
                "guest": {"hostname": "plugged", "metadata": {"role": "web"}},
            });
            let with = |more: Value| {
                let mut all = base.clone();
                all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                all
            };
            let instance = Scene::instance(1, base.clone());
            let object = instance.object();
            let driven = scene.driven();
            driven.want(scene.images.clone(), false);
            driven.want([instance.clone()], false);
            driven.until_active(object).await;
            let log = driven.until_console(&instance, UP).await;
            assert!(log.contains("disk vda 2097152"), "{log}");
            assert!(log.contains("config drive: {") && log.contains("\"plugged\""), "{log}");
            let pid = scene.libvirtd.guest_pid(NAME);
            driven.talk(&instance, "hello", "heard hello").await;

            // In.
            run("ip", ["tuntap", "add", "tap6f0c8a8e-0d", "mode", "tap"]);
            let volume = |gib: u64| {
                json!([{
                    "volume": Uuid::from_u128(7), "size_gib": gib,
                    "connection": {"type": "file", "path": disk, "format": "raw"},
                }])
            };
            let ports = json!([{"port": port, "mac": "fa:16:3e:00:00:01"}]);
            let more = Scene::instance(2, with(json!({"volumes": volume(1), "ports": ports})));
            driven.want([more.clone()], false);
            let observed = driven.until_active(object).await;
            let id = Uuid::from_u128(7).to_string();
            assert_eq!(observed["volumes"][id.as_str()], "vdb", "{observed}");
            driven.until_console(&more, "devices: nics 1 vda 2097152 vdb 2097152.").await;

            // Larger.
            fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(2 << 30).unwrap();
            let larger = Scene::instance(3, with(json!({"volumes": volume(2), "ports": ports})));
            driven.want([larger.clone()], false);
            driven.until_active(object).await;
            driven.until_console(&larger, "vdb 4194304.").await;
            let writes = driven.writes();
            driven.passes(3).await;
            assert_eq!(driven.writes(), writes, "a second pass changes nothing");

            // A picture of its disk as it runs, and of its screen.
            driven.talk(&larger, "run echo marked >/dev/vda; sync", "heard run").await;
            let image = driven.act(&larger, "snapshot", json!({"name": "picture"})).await.unwrap();
            let path = image["path"].as_str().unwrap();
            let raw = scene.root.path().join("picture.raw");
            let args = ["convert", "-f", "qcow2", "-O", "raw", path, raw.to_str().unwrap()];
            run("/usr/bin/qemu-img", args);
            assert!(fs::read(&raw).unwrap().starts_with(b"marked\n"));
            let png = driven.act(&larger, "screenshot", Value::Null).await.unwrap();
            let png = STANDARD.decode(png["png"].as_str().unwrap()).unwrap();
            assert!(png.starts_with(b"\x89PNG"));
            let usage = driven.act(&larger, "usage", Value::Null).await.unwrap();
            assert!(usage["cpu_nanoseconds"].as_u64().unwrap() > 0, "{usage}");
            assert!(usage["disk_write_bytes"].as_u64().unwrap() >= 512, "{usage}");
            let xml = driven.act(&larger, "xml", Value::Null).await.unwrap();
            assert!(xml["log"].as_str().unwrap().contains("<domain type='qemu'"), "{xml}");

            // Out.
            let less = Scene::instance(4, base.clone());
            driven.want([less.clone()], false);
            let observed = driven.until_active(object).await;
            assert_eq!(observed.get("volumes"), None, "{observed}");
            wait_for(Duration::from_secs(60), "the guest to see them gone", async || {
                let log = driven.act(&less, "console-log", Value::Null).await.unwrap();
                let log = log["log"].as_str().unwrap();
                let after = log.rfind("vdb 4194304.")?;
                log[after..].contains("devices: nics 0 vda 2097152.").then_some(())
            })
            .await;
            assert_eq!(scene.libvirtd.guest_pid(NAME), pid, "it was not disturbed");

            // To sleep and awake, with the same memory.
            driven.act(&less, "suspend", Value::Null).await.unwrap();
            assert_eq!(scene.libvirtd.virsh(["domstate", NAME]).trim(), "shut off");
            let refusal = driven.act(&less, "pause", Value::Null).await.unwrap_err();
            assert_eq!(refusal.code, ErrorCode::WrongState);
            driven.act(&less, "resume", Value::Null).await.unwrap();
            driven.talk(&less, "awake", "heard awake").await;

            // Made anew: what was written is gone, the guest is there.
            driven.act(&less, "rebuild", Value::Null).await.unwrap();
            driven.until_console(&less, UP).await;
            driven.act(&less, "stop", Value::Null).await.unwrap();
            let image = driven.act(&less, "snapshot", json!({"name": "off"})).await.unwrap();
            let path = image["path"].as_str().unwrap();
            let args = ["convert", "-f", "qcow2", "-O", "raw", path, raw.to_str().unwrap()];
            run("/usr/bin/qemu-img", args);
            assert!(fs::read(&raw).unwrap().iter().take(512).all(|&byte| byte == 0));
            let facts = driven.agent.facts().await;
            assert!(facts["capacity"]["memory_mib"].as_u64().unwrap() > 0, "{facts}");

            driven.want([less], true);
            driven.until_gone(object).await;
            assert_eq!(scene.libvirtd.virsh(["list", "--all"]).trim(), "");
            driven.kill().await;
        });
    }
}
