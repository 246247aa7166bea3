//! A guest that is given a block device of its host, which the host's kernel took in by iSCSI. In a
//! machine with a full kernel: its open-iscsi logs in to its own target.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_compute::config::VirtType;
use stackhand_compute::initiator::HostInitiator;
use stackhand_model::{Secret, VolumeId};
use stackhand_storage::export::lio::{self, Lio};
use stackhand_storage::export::{Admission, Exporter, Target, target_name};
use stackhand_testkit::{Spawned, wait_for, wait_for_sync};
use uuid::Uuid;

use crate::lab::{NAME, Scene};
use crate::support::{UP, kernel, run};

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    /// Seconds that the machine may take. Its own watch counts slower on a busy host.
    const LIMIT: u64 = 450;

    #[test]
    fn a_guest_has_a_volume_that_its_host_took_in_and_its_host_lets_go_of_it() {
        // Fetched out here, where there is a network.
        let _folder = kernel("cloud");
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let (limit, test) = (LIMIT.to_string(), std::env::current_exe().unwrap());
        let prepare = top.join("agents/storage/tests/lvm/prepare");
        // One processor: the emulated KVM does not bear interrupts from another one. It made the
        // machine's kernel fault without end.
        let arguments = ["--cores", "1", "--memory", "6144", "--time-limit", &limit, "--"];
        let arguments = arguments.into_iter();
        let arguments = arguments.chain([prepare.to_str().unwrap(), test.to_str().unwrap()]);
        let filter = ["--ignored", "--exact", "--nocapture", "initiator::inside"];
        let mut machine = Spawned::start(top.join("tests/lab/run"), arguments.chain(filter));
        let status = machine.wait(Duration::from_secs(LIMIT + 130));
        let said = machine.output();
        assert!(status.success() && said.contains("1 passed"), "{said}");
    }
}

const VOLUME: VolumeId = VolumeId(Uuid::from_u128(7));
const LV: &str = "cinder-volumes/volume-7";
const PASSWORD: &str = "passwordpassword";
/// See `prepare`.
const ME: &str = "iqn.2026-11.org.x:lab";

/// The volume as an instance is told of it.
fn volume(password: &str, size: u64) -> Value {
    json!({
        "volume": VOLUME, "size_gib": size,
        "connection": {
            "type": "iscsi", "portal": "127.0.0.1:3260", "iqn": target_name(VOLUME), "lun": 0,
            "initiator": ME, "client": "host", "username": "sh-user", "password": password,
        },
    })
}

fn export() -> Lio {
    let pool = "cinder-volumes/cinder-volumes-pool";
    run("lvcreate", ["-qq", "-Wn", "-V", "1g", "-T", pool, "-n", "volume-7"]);
    let admission =
        Admission { user: "sh-user".into(), password: Secret(PASSWORD.into()), read_only: false };
    let lio = Lio::new(Path::new(lio::ROOT), vec!["127.0.0.1:3260".parse().unwrap()]);
    lio.publish(&Target {
        volume: VOLUME,
        path: Path::new("/dev").join(LV),
        bytes: 1 << 30,
        is_device: true,
        admitted: [(ME.to_owned(), admission)].into(),
    })
    .unwrap();
    lio
}

/// What compute-initiator.socket does.
fn helper(socket: &Path) -> Spawned {
    let program = env!("CARGO_BIN_EXE_compute-agent");
    let listen = ["--accept", "--inetd", "--listen", socket.to_str().unwrap()];
    let arguments = listen.into_iter().chain([program, "initiator"]);
    let helper = Spawned::start("/usr/bin/systemd-socket-activate", arguments);
    wait_for_sync(Duration::from_secs(20), "the socket", || socket.exists().then_some(()));
    helper
}

fn sessions() -> usize {
    std::fs::read_dir("/sys/class/iscsi_session").map_or(0, Iterator::count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by `lab` inside a machine"]
async fn inside() {
    run("modprobe", ["kvm_amd"]);
    let lio = export();
    let scene = Scene::new();
    let socket = scene.root.path().join("initiator.sock");
    let initiator = || Arc::new(HostInitiator::new(&socket));
    let driven = scene.driven_with(VirtType::Kvm, initiator());
    let with = |generation, password, size| {
        Scene::instance(generation, json!({"volumes": [volume(password, size)]}))
    };
    let instance = with(1, "wrongwrongwrong1", 1);
    let object = instance.object();
    driven.want(scene.images.clone(), false);
    driven.want([instance.clone()], false);
    driven.until_reason(object, "systemctl enable --now compute-initiator.socket").await;
    let _helper = helper(&socket);
    driven.until_reason(object, "cannot log in to").await;
    assert_eq!(sessions(), 0);
    println!("ok: no helper and a wrong password are told");

    let instance = with(2, PASSWORD, 1);
    driven.want([instance.clone()], false);
    driven.until_active(object).await;
    let log = driven.until_console(&instance, UP).await;
    assert!(log.contains("disk vda 2097152"), "{log}");
    let xml = scene.libvirtd.virsh(["dumpxml", NAME]);
    let name = format!("/dev/disk/by-path/ip-127.0.0.1:3260-iscsi-{}-lun-0", target_name(VOLUME));
    assert!(xml.contains(&name) && !xml.contains("/dev/sd"), "{xml}");
    assert!(!xml.contains(PASSWORD), "{xml}");
    let write = "run echo from-the-guest | dd of=/dev/vda bs=512 conv=sync,fsync; echo st''ored";
    driven.talk(&instance, write, "stored").await;
    println!("ok: a guest has it");

    // At rest nothing is written, by a new agent neither.
    let writes = driven.writes();
    driven.passes(3).await;
    assert_eq!(driven.writes(), writes);
    driven.kill().await;
    let driven = scene.driven_with(VirtType::Kvm, initiator());
    driven.want(scene.images.clone(), false);
    driven.want([instance.clone()], false);
    driven.until_active(object).await;
    driven.passes(2).await;
    assert_eq!((driven.writes(), sessions()), (0, 1));

    run("lvextend", ["-qq", "-L", "2g", LV]);
    let instance = with(3, PASSWORD, 2);
    driven.want([instance.clone()], false);
    driven.until_active(object).await;
    driven.until_console(&instance, "vda 4194304").await;
    println!("ok: it has grown under the guest");

    let without = Scene::instance(4, json!({"volumes": []}));
    driven.want([without], false);
    driven.until_active(object).await;
    wait_for(Duration::from_secs(60), "the host to log out", async || {
        (sessions() == 0).then_some(())
    })
    .await;
    assert!(lio.observe().unwrap()[&VOLUME].sessions.is_empty());
    let records = Path::new("/etc/iscsi/nodes");
    assert_eq!(std::fs::read_dir(records).map_or(0, Iterator::count), 0, "records are left");
    let found = run("head", ["-c", "14", &format!("/dev/{LV}")]);
    assert_eq!(found, "from-the-guest");
    println!("ok: let go of, and nothing lost");

    let instance = with(5, PASSWORD, 2);
    driven.want([instance.clone()], false);
    driven.until_active(object).await;
    assert_eq!(sessions(), 1);
    driven.want([instance], true);
    driven.until_gone(object).await;
    assert_eq!(sessions(), 0);
    println!("ok: a deleted instance leaves no session");
    driven.kill().await;
}
