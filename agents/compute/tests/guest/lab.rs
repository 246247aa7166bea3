//! The tests; they boot machines, so they belong to the slow ones.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{Driven, Libvirtd, UP, document, kernel, ramdisk, run};
use serde_json::{Value, json};
use stackhand_compute::config::VirtType;
use stackhand_compute::domain::Engine;
use stackhand_compute::hypervisor::Hypervisor;
use stackhand_compute::initiator::Initiator;
use stackhand_compute::libvirt::Libvirt;
use stackhand_model::{Document, ErrorCode};
use stackhand_runtime::agent::Agent;
use stackhand_testkit::in_netns;
use tempfile::TempDir;
use uuid::Uuid;

const KERNEL: u128 = 0xa1;
const RAMDISK: u128 = 0xa2;
const INSTANCE: u128 = 0x1234_5678_0000_0000_0000_0000_0000_0001;
pub(crate) const NAME: &str = "instance-12345678";

/// Folders, images and documents that every test starts from.
pub(crate) struct Scene {
    // Before its folder, in which it finds the guests that a failed test has left.
    pub(crate) libvirtd: Libvirtd,
    pub(crate) root: TempDir,
    pub(crate) images: Vec<Document>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        run("ip", ["link", "set", "lo", "up"]);
        let root = tempfile::tempdir().unwrap();
        let libvirtd = Libvirtd::start(&root.path().join("libvirt"));
        let kernel = kernel("cloud");
        let initrd = root.path().join("initrd");
        fs::write(&initrd, ramdisk(&kernel, &[])).unwrap();
        let images = vec![
            document(
                "Image",
                KERNEL,
                1,
                &json!({"source": kernel.join("vmlinuz"), "format": "kernel"}),
            ),
            document("Image", RAMDISK, 1, &json!({"source": initrd, "format": "ramdisk"})),
        ];
        Self { libvirtd, root, images }
    }

    pub(crate) fn driven(&self) -> Driven {
        Driven::new(&self.root.path().join("state"), &self.libvirtd.uri())
    }

    /// The same with guests on that engine, and with an initiator of its host.
    pub(crate) fn driven_with(&self, virt_type: VirtType, initiator: Arc<dyn Initiator>) -> Driven {
        let (state, uri) = (self.root.path().join("state"), self.libvirtd.uri());
        Driven::with(&state, &uri, virt_type, |agent| agent.with_initiator(initiator))
    }

    pub(crate) fn instance(generation: u64, fields: Value) -> Document {
        Self::another(INSTANCE, generation, fields)
    }

    /// An instance beside the usual one.
    pub(crate) fn another(id: u128, generation: u64, fields: Value) -> Document {
        let mut spec = json!({
            "host": "here", "vcpus": 1, "memory_mib": 192,
            "kernel": Uuid::from_u128(KERNEL), "ramdisk": Uuid::from_u128(RAMDISK),
            "command_line": "console=ttyS0 quiet panic=-1", "vnc": false,
        });
        if let Value::Object(fields) = fields {
            for (key, value) in fields {
                spec[key] = value;
            }
        }
        document("Instance", id, generation, &spec)
    }
}

#[test]
fn a_guest_boots_with_its_volume_and_outlives_agent_and_libvirtd() {
    in_netns(async || {
        let mut scene = Scene::new();
        let disk = scene.root.path().join("volume-7");
        fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
        let volume = json!({
            "volume": Uuid::from_u128(7), "device": "vdb",
            "connection": {"type": "file", "path": disk, "format": "raw"},
        });
        let root_disk = scene.root.path().join("root.img");
        fs::write(&root_disk, vec![0xeb; 1 << 20]).unwrap();
        let image = document("Image", 0xa3, 1, &json!({"source": root_disk, "format": "raw"}));
        scene.images.push(image);
        let fields = json!({"volumes": [volume], "vnc": true, "image": Uuid::from_u128(0xa3)});
        let instance = Scene::instance(1, fields);
        let object = instance.object();

        let driven = scene.driven();
        let begin = Instant::now();
        driven.want(scene.images.clone(), false);
        driven.want([instance.clone()], false);
        let observed = driven.until_active(object).await;
        assert_eq!(observed["power_state"], "running");
        let log = driven.until_console(&instance, UP).await;
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        assert!(log.contains("disk vda 2048 "), "{log}");
        // virtio cuts serial numbers at 20 bytes.
        assert!(log.contains("disk vdb 2097152 00000000-0000-0000-0"), "{log}");
        let cut = driven.act(&instance, "console-log", json!({"kib": 1})).await.unwrap();
        assert!(cut["log"].as_str().unwrap().len() <= 1024);
        let vnc = driven.until_active(object).await["vnc"].as_str().unwrap().to_owned();
        assert!(std::net::TcpStream::connect(&vnc).is_ok(), "{vnc}");

        // At rest nothing is written, and a new agent finds everything as it should be.
        let pid = scene.libvirtd.guest_pid(NAME);
        let writes = driven.writes();
        driven.passes(3).await;
        assert_eq!(driven.writes(), writes);
        driven.kill().await;
        let driven = scene.driven();
        driven.want(scene.images.clone(), false);
        driven.want([instance.clone()], false);
        driven.until_active(object).await;
        driven.passes(2).await;
        assert_eq!((driven.writes(), scene.libvirtd.guest_pid(NAME)), (0, pid.clone()));

        // libvirtd dies and comes back.
        scene.libvirtd.kill();
        driven.until_reason(object, "is away").await;
        assert!(driven.agent.troubles().iter().any(|trouble| trouble.contains("start libvirtd")));
        scene.libvirtd.restart();
        driven.until_active(object).await;
        assert_eq!((driven.writes(), scene.libvirtd.guest_pid(NAME)), (0, pid.clone()));

        // Actions.
        driven.act(&instance, "pause", Value::Null).await.unwrap();
        assert_eq!(scene.libvirtd.virsh(["domstate", NAME]).trim(), "paused");
        driven.act(&instance, "unpause", Value::Null).await.unwrap();
        assert_eq!(scene.libvirtd.guest_pid(NAME), pid);
        let answer = driven.act(&instance, "reboot", json!({"type": "hard"})).await.unwrap();
        assert_eq!(answer["rebooted"], "hard");
        assert_ne!(scene.libvirtd.guest_pid(NAME), pid);
        driven.until_console(&instance, UP).await;
        driven.act(&instance, "stop", Value::Null).await.unwrap();
        assert_eq!(scene.libvirtd.virsh(["domstate", NAME]).trim(), "shut off");
        driven.passes(3).await;
        assert_eq!(scene.libvirtd.virsh(["domstate", NAME]).trim(), "shut off", "it stays so");
        let refusal = driven.act(&instance, "reboot", Value::Null).await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::WrongState);
        let refusal = driven.act(&instance, "explode", Value::Null).await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Unsupported);
        driven.act(&instance, "start", Value::Null).await.unwrap();
        driven.until_console(&instance, UP).await;

        // Facts.
        let facts = driven.agent.facts().await;
        assert_eq!(facts["virt_type"], "qemu");
        assert!(facts["hypervisor_version"].as_str().unwrap().contains('.'), "{facts}");
        assert_eq!(facts["images"].as_array().unwrap().len(), 3);

        // Delete.
        driven.want([instance], true);
        driven.want(scene.images.clone(), true);
        driven.until_gone(object).await;
        driven.passes(2).await;
        assert_eq!(scene.libvirtd.virsh(["list", "--all"]).trim(), "");
        let left = |folder: &str| {
            fs::read_dir(scene.root.path().join("state").join(folder)).unwrap().count()
        };
        assert_eq!((left("instances"), left("images")), (0, 0));
        assert!(disk.exists(), "a volume is not the instance's");
        driven.kill().await;
    });
}

#[test]
fn a_guest_waits_for_its_tap_and_one_that_powers_itself_off_stays_off() {
    in_netns(async || {
        let scene = Scene::new();
        let port: Uuid = "6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11".parse().unwrap();
        let port = json!({"port": port, "mac": "fa:16:3e:00:00:01", "mtu": 1400});
        let instance = Scene::instance(1, json!({"ports": [port]}));
        let object = instance.object();
        let driven = scene.driven();
        driven.want(scene.images.clone(), false);
        driven.want([instance.clone()], false);
        driven.until_reason(object, "waits for tap tap6f0c8a8e-0d").await;
        run("ip", ["tuntap", "add", "tap6f0c8a8e-0d", "mode", "tap"]);
        driven.until_active(object).await;
        let log = driven.until_console(&instance, UP).await;
        assert!(log.contains("network device"), "{log}");

        let off = json!({"ports": [], "command_line": "console=ttyS0 quiet stackhand.off"});
        let changed = Scene::instance(2, off);
        driven.want([changed.clone()], false);
        driven.until_reason(object, "reboot it hard to apply it").await;
        driven.act(&changed, "reboot", json!({"type": "hard"})).await.unwrap();
        let observed = driven.until(object, "the guest to be off", |outcome| match outcome {
            stackhand_runtime::agent::Outcome::Active { observed } => {
                let observed = observed.facts(&object);
                (observed["power_state"] == "shutoff").then_some(observed)
            }
            _ => None,
        });
        let observed = observed.await;
        assert!(
            observed["power_reason"].as_str().unwrap().starts_with("the guest shut itself down")
        );
        let writes = driven.writes();
        driven.passes(3).await;
        assert_eq!(driven.writes(), writes, "and it stays off");

        // The tap is the network agent's.
        driven.want([changed], true);
        driven.until_gone(object).await;
        run("ip", ["link", "show", "tap6f0c8a8e-0d"]);
        driven.kill().await;
    });
}

#[test]
fn a_root_disk_is_made_over_its_image_and_a_foreign_domain_is_left_alone() {
    in_netns(async || {
        let scene = Scene::new();
        let source = scene.root.path().join("cloud.qcow2");
        run("/usr/bin/qemu-img", ["create", "-q", "-f", "qcow2", source.to_str().unwrap(), "64M"]);
        let image = document("Image", 0xa3, 1, &json!({"source": source, "format": "qcow2"}));
        let hostile = scene.root.path().join("hostile.qcow2");
        let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"];
        run("/usr/bin/qemu-img", args.into_iter().chain([hostile.to_str().unwrap(), "1M"]));
        let hostile = document("Image", 0xa4, 1, &json!({"source": hostile, "format": "qcow2"}));
        let fields = json!({"image": Uuid::from_u128(0xa3), "root_disk_gib": 2});
        let instance = Scene::instance(1, fields);

        let foreign = "<domain type='qemu'><name>instance-12345678</name><memory>65536</memory>\
                       <os><type>hvm</type></os></domain>";
        let path = scene.root.path().join("foreign.xml");
        fs::write(&path, foreign).unwrap();
        scene.libvirtd.virsh(["define", path.to_str().unwrap()]);

        let driven = scene.driven();
        driven.want(scene.images.clone(), false);
        driven.want([image, hostile.clone(), instance.clone()], false);
        driven.until_reason(hostile.object(), "refers to another file").await;
        driven.until_reason(instance.object(), "was not made by this agent").await;
        let uuid = scene.libvirtd.virsh(["domuuid", NAME]);
        driven.want([instance.clone()], true);
        driven.until_gone(instance.object()).await;
        assert_eq!(scene.libvirtd.virsh(["domuuid", NAME]), uuid);
        scene.libvirtd.virsh(["undefine", NAME]);

        driven.want([instance.clone()], false);
        driven.until_active(instance.object()).await;
        let log = driven.until_console(&instance, UP).await;
        assert!(log.contains("disk vda 4194304"), "2 GiB in sectors: {log}");
        driven.want([instance.clone()], true);
        driven.until_gone(instance.object()).await;
        driven.kill().await;
    });
}

#[test]
fn the_probe_says_whether_kvm_runs_guests_and_leaves_nothing() {
    in_netns(async || {
        let root = tempfile::tempdir().unwrap();
        let libvirtd = Libvirtd::start(&root.path().join("libvirt"));
        let folder = root.path().join("state");
        let libvirt = Libvirt::new(&libvirtd.uri(), Arc::new(|_| {})).unwrap();
        // Where it must work, it does, and quickly; KVM may or may not.
        libvirt.probe(&folder, Engine::Qemu).await.unwrap();
        if let Err(error) = libvirt.probe_kvm(&folder).await {
            assert!(error.to_string().starts_with("cannot run a probe guest on KVM"), "{error}");
        }
        assert_eq!(libvirtd.virsh(["list", "--all"]).trim(), "");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    });
}
