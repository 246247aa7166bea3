//! What a guest finds in its machine, seen from inside.

/// They boot machines.
mod lab {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use serde_json::{Value, json};
    use stackhand_compute::hypervisor::Hypervisor as _;
    use stackhand_runtime::agent::Outcome;
    use stackhand_testkit::{Spawned, in_netns, wait_for, wait_for_sync};
    use uuid::Uuid;

    use crate::lab::Scene;
    use crate::support::{UP, document, kernel, ramdisk, run};

    const ID: u128 = 0x1234_5678_0000_0000_0000_0000_0000_0001;
    const TAP: &str = "tap6f0c8a8e-0d";
    const PASSWORD: &str = "chap-secret-of-16";

    /// A volume of tgtd's, for whom knows its password.
    struct Target {
        socket: String,
        _daemon: Spawned,
    }

    impl Target {
        const IQN: &'static str = "iqn.2026-11.org.stackhand:volume-9";

        /// In the network namespace of the test.
        fn serve(disk: &Path) -> Self {
            let socket = disk.with_file_name("tgtd").display().to_string();
            #[expect(clippy::disallowed_methods, reason = "a daemon of the test, ended with it")]
            let mut command = std::process::Command::new("/usr/bin/setpriv");
            command
                .args(["--pdeathsig", "KILL", "--", "/usr/sbin/tgtd", "-f"])
                .args(["--control-port", "1", "--iscsi", "portal=127.0.0.1:3260"])
                .env("TGT_IPC_SOCKET", &socket);
            let mut daemon = Spawned::start_command(command);
            wait_for_sync(Duration::from_secs(20), "tgtd to listen", || {
                assert!(daemon.is_running(), "{daemon:?}");
                Path::new(&format!("{socket}.1")).exists().then_some(())
            });
            let target = Self { socket, _daemon: daemon };
            let disk = disk.to_str().unwrap();
            target.tell(&["target", "new", "--tid", "1", "--targetname", Self::IQN]);
            target.tell(&[
                "logicalunit",
                "new",
                "--tid",
                "1",
                "--lun",
                "1",
                "--backing-store",
                disk,
            ]);
            target.tell(&["account", "new", "--user", "guest", "--password", PASSWORD]);
            target.tell(&["account", "bind", "--tid", "1", "--user", "guest"]);
            target.tell(&["target", "bind", "--tid", "1", "--initiator-address", "ALL"]);
            target
        }

        fn tell(&self, words: &[&str]) {
            let socket = format!("TGT_IPC_SOCKET={}", self.socket);
            let (mode, op) = (words[0], words[1]);
            let common =
                [socket.as_str(), "/usr/sbin/tgtadm", "--control-port", "1", "--lld", "iscsi"];
            let verb = ["--mode", mode, "--op", op];
            run("/usr/bin/env", common.into_iter().chain(verb).chain(words[2..].iter().copied()));
        }

        fn connection(password: &str) -> Value {
            json!({
                "type": "iscsi", "portal": "127.0.0.1:3260", "iqn": Self::IQN, "lun": 1,
                "client": "qemu", "username": "guest", "password": password,
            })
        }
    }

    #[test]
    fn a_guest_finds_all_that_its_document_says() {
        in_netns(async || {
            let scene = Scene::new();
            let at = |name: &str| scene.root.path().join(name);
            // A kernel with every driver, that of a watchdog too.
            let kernel = kernel("full");
            fs::write(at("full"), ramdisk(&kernel, &["i6300esb"])).unwrap();
            fs::File::create(at("root")).unwrap().set_len(16 << 20).unwrap();
            run(
                "/usr/sbin/mke2fs",
                ["-q", "-t", "ext4", "-L", "ami-root", at("root").to_str().unwrap()],
            );
            let image = |id: u128, format: &str, path: &Path| {
                document("Image", id, 1, &json!({"source": path, "format": format}))
            };
            let ami = document(
                "Image",
                0xb3,
                1,
                &json!({
                    "source": at("root"), "format": "ami", "kernel": Uuid::from_u128(0xb1),
                    "ramdisk": Uuid::from_u128(0xb2), "command_line": "console=ttyS0 quiet panic=-1",
                }),
            );
            let images = [
                image(0xb1, "kernel", &kernel.join("vmlinuz")),
                image(0xb2, "ramdisk", &at("full")),
                ami,
            ];
            fs::write(at("volume-9"), vec![0; 8 << 20]).unwrap();
            let _target = Target::serve(&at("volume-9"));
            run("ip", ["tuntap", "add", TAP, "mode", "tap", "multi_queue"]);
            let spec = |password: &str| {
                json!({
                    "host": "here", "vcpus": 2, "memory_mib": 256, "image": Uuid::from_u128(0xb3),
                    "ephemeral_gib": 1, "swap_mib": 16, "vnc": true, "guest_agent": true,
                    "watchdog": "pause",
                    "ports": [{
                        "port": "6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11", "mac": "fa:16:3e:00:00:01",
                        "mtu": 1400, "queues": 2,
                    }],
                    "volumes": [{
                        "volume": Uuid::from_u128(9), "connection": Target::connection(password),
                    }],
                })
            };
            let instance = |generation: u64, password: &str| {
                document("Instance", ID, generation, &spec(password))
            };
            let driven = scene.driven();
            driven.want(images, false);

            // A wrong password is told, and nothing runs.
            let wrong = instance(1, "not-the-password");
            let object = wrong.object();
            driven.want([wrong], false);
            let told =
                driven.until(object, "the password to be refused", |outcome| match outcome {
                    Outcome::Failed { reason, .. } => Some(reason.clone()),
                    _ => None,
                });
            let told = told.await;
            assert!(told.contains("start the domain") && !told.contains("not-the-pass"), "{told}");

            let guest = instance(2, PASSWORD);
            driven.want([guest.clone()], false);
            driven.until_active(object).await;
            let log = driven.until_console(&guest, UP).await;
            assert!(log.contains("disk vda 32768 "), "{log}");
            let ask = async |what: &str, expected: &str| {
                // What is typed is echoed, so the answer is told apart by its brackets.
                driven.talk(&guest, &format!("run echo [$({what})]"), expected).await
            };
            ask("head -c 2048 /dev/vda | grep -c ami-root", "[1]").await;
            ask("mount -t ext4 /dev/vdb /mnt && df -m /mnt | tail -n 1", "% /mnt]").await;
            ask("head -c 2048 /dev/vdb | grep -c ephemeral0", "[1]").await;
            ask("umount /mnt; swapon /dev/vdc; tail -n 1 /proc/swaps | cut -c 1-8", "[/dev/vdc]")
                .await;
            // The volume: written through CHAP and iSCSI to its file.
            ask("echo by-iscsi >/dev/vdd; sync; cat /sys/block/vdd/size", "[16384]").await;
            let written = || fs::read(at("volume-9")).unwrap().starts_with(b"by-iscsi\n");
            wait_for(Duration::from_secs(20), "the volume to be written", async || {
                written().then_some(())
            })
            .await;
            let xml = driven.act(&guest, "xml", Value::Null).await.unwrap().to_string();
            assert!(!xml.contains(PASSWORD), "{xml}");

            ask(
                "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu",
                "fa:16:3e:00:00:01 1400]",
            )
            .await;
            ask("ls /sys/class/net/eth0/queues | grep -c rx", "[2]").await;
            ask("cat /sys/class/virtio-ports/*/name", "[org.qemu.guest_agent.0]").await;
            ask("cat /sys/class/misc/hw_random/rng_current", "[virtio_rng").await;
            ask("grep -c ^processor /proc/cpuinfo", "[2]").await;
            let product = "cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name";
            ask(product, "[Stackhand OpenStack Compute]").await;

            // Nobody but this host gets at its screen.
            let vnc = driven.until_active(object).await["vnc"].as_str().unwrap().to_owned();
            assert!(vnc.starts_with("127.0.0.1:"), "{vnc}");
            let port: u16 = vnc.rsplit_once(':').unwrap().1.parse().unwrap();
            let listening = run("ss", ["-Hltn", &format!("sport = :{port}")]);
            assert_eq!(listening.lines().count(), 1, "{listening}");
            assert!(listening.contains(&format!("127.0.0.1:{port}")), "{listening}");

            // Its balloon tells how much of its memory it uses.
            let usage = wait_for(Duration::from_secs(60), "the balloon to tell", async || {
                let usage = driven.act(&guest, "usage", Value::Null).await.unwrap();
                usage["memory_unused_kib"].as_u64().map(|_| usage)
            });
            let usage = usage.await;
            assert_eq!(usage["memory_kib"], 256 << 10, "{usage}");
            assert!(usage["memory_unused_kib"].as_u64() < usage["memory_kib"].as_u64(), "{usage}");
            // Its disks are counted together, of whatever kind they are.
            assert!(usage["disk_read_bytes"].as_u64() > Some(0), "{usage}");

            // A guest that stops to feed its watchdog stands still, until it is rebooted.
            let feed = "watchdog -T 2 -t 1 /dev/watchdog; echo [fed $((40 + 2))]";
            driven.talk(&guest, &format!("run {feed}; killall -9 watchdog"), "[fed 42]").await;
            driven.until_reason(object, "did not feed its watchdog").await;
            driven.act(&guest, "reboot", json!({"type": "hard"})).await.unwrap();
            driven.until_active(object).await;
            driven.until_console(&guest, UP).await;

            // virtlogd makes long logs files of root's; then libvirt hands them out.
            let folder = scene.root.path().join("state/instances").join(guest.id.to_string());
            let log = folder.join("console.log");
            let all = fs::read(&log).unwrap();
            let hypervisor = driven.agent.hypervisor();
            let (start, part) = hypervisor.read_log(&log, Some(5), 20).await.unwrap();
            assert_eq!((start, &part[..]), (5, &all[5..25]));
            let (one, other) = tokio::join!(
                hypervisor.read_log(&log, Some(0), 10),
                hypervisor.read_log(&log, Some(5), 10),
            );
            let (one, other) = (one.unwrap().1, other.unwrap().1);
            assert_eq!((&one[..], &other[..]), (&all[..10], &all[5..15]), "two readers at once");
            let (start, part) = hypervisor.read_log(&log, None, 64 << 10).await.unwrap();
            assert!(start == 0 && part.starts_with(&all), "{start}");
            assert_eq!(scene.libvirtd.virsh(["pool-list", "--all", "--name"]).trim(), "");

            driven.want([guest], true);
            driven.until_gone(object).await;
            driven.kill().await;
        });
    }

    /// A CD that boots the guest, by either firmware; copied to a disk, that boots it too.
    fn bootable(scene: &Scene) -> std::path::PathBuf {
        let (tree, iso) = (scene.root.path().join("tree"), scene.root.path().join("boot.iso"));
        fs::create_dir_all(tree.join("boot/grub")).unwrap();
        let kernel = kernel("cloud");
        fs::copy(kernel.join("vmlinuz"), tree.join("vmlinuz")).unwrap();
        fs::copy(scene.root.path().join("initrd"), tree.join("initrd")).unwrap();
        let menu = "linux /vmlinuz console=ttyS0 quiet panic=-1\ninitrd /initrd\nboot\n";
        fs::write(tree.join("boot/grub/grub.cfg"), menu).unwrap();
        let [tree, to] = [&tree, &iso].map(|path| path.to_str().unwrap().to_owned());
        run("/usr/bin/grub-mkrescue", ["-o", &to, &tree]);
        iso
    }

    #[test]
    fn a_guest_boots_from_cd_volume_image_and_its_own_snapshot_by_either_firmware() {
        in_netns(async || {
            let scene = Scene::new();
            let iso = bootable(&scene);
            let image = |id: u128, format: &str, source: &str| {
                document("Image", id, 1, &json!({"source": source, "format": format}))
            };
            let path = iso.to_str().unwrap();
            let volume = scene.root.path().join("volume-8");
            fs::copy(&iso, &volume).unwrap();
            let driven = scene.driven();
            driven.want([image(0xb4, "iso", path), image(0xb5, "raw", path)], false);
            let volumes = json!([{
                "volume": Uuid::from_u128(8), "boot": true,
                "connection": {"type": "file", "path": volume, "format": "raw"},
            }]);
            let cases = [
                ("bios", json!({"cdrom": Uuid::from_u128(0xb4), "root_disk_gib": 1})),
                ("uefi", json!({"volumes": volumes})),
                ("uefi", json!({"image": Uuid::from_u128(0xb5), "root_disk_gib": 1})),
                // What the one before has taken.
                ("uefi", json!({"image": Uuid::from_u128(0xb6)})),
            ];
            for (generation, (firmware, fields)) in (1..).zip(cases) {
                let mut spec = json!({
                    "host": "here", "vcpus": 1, "memory_mib": 256, "vnc": false,
                    "firmware": firmware,
                });
                spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
                let guest = document("Instance", ID, generation, &spec);
                driven.want([guest.clone()], false);
                driven.until_active(guest.object()).await;
                let log = driven.until_console(&guest, UP).await;
                assert!(log.contains(&format!("firmware {firmware}")), "{log}");
                assert!(log.contains("disk vda "), "{log}");
                if fields["image"] == json!(Uuid::from_u128(0xb5)) {
                    let name = json!({"name": "taken"});
                    let taken = driven.act(&guest, "snapshot", name).await.unwrap();
                    let taken = json!({
                        "source": taken["path"], "format": taken["format"],
                        "checksum": taken["checksum"],
                    });
                    driven.want([document("Image", 0xb6, 1, &taken)], false);
                }
                driven.want([guest.clone()], true);
                driven.until_gone(guest.object()).await;
                let nvram = scene.root.path().join("libvirt/lib/qemu/nvram");
                let left = fs::read_dir(nvram).into_iter().flatten().count();
                assert_eq!(left, 0, "settings of the firmware are left");
            }
            driven.kill().await;
        });
    }
}
