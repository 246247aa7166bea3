//! The program under its real unit and the drop-in for block devices.

use stackhand_attach::helper::{Question, ask};
use stackhand_runtime::api::Entry;
use stackhand_testkit::bin;

use super::*;

/// What the packages and an operator do.
const INSTALL: &str = r#"
set -e
cd "$1"
install -m 755 "$2" /usr/bin/storage-agent
install -m 755 "$3" /usr/bin/compute-agent
install -m 644 systemd/storage-agent.service systemd/compute-initiator* systemd/*.target /usr/lib/systemd/system
install -m 644 systemd/sysusers.d/* /usr/lib/sysusers.d
install -m 644 systemd/tmpfiles.d/* /usr/lib/tmpfiles.d
install -D -m 644 systemd/drop-ins/storage-block.conf /etc/systemd/system/storage-agent.service.d/block.conf
install -d /etc/stackhand
install -m 640 packaging/config/*.toml /etc/stackhand
cat >>/etc/stackhand/storage.toml <<END
[storage.export]
type = "lio"
portals = ["127.0.0.1:3260"]
[storage.backends.thin]
type = "lvm-thin"
volume_group = "cinder-volumes"
overcommit_percent = 1000
[storage.backends.thick]
type = "lvm"
volume_group = "cinder-volumes"
END
systemd-sysusers stackhand.conf
systemd-tmpfiles --create stackhand.conf
systemctl daemon-reload
systemctl start compute-initiator.socket
systemctl start storage-agent || { journalctl --no-pager -u storage-agent; exit 1; }
"#;

#[test]
#[ignore = "run by `lab` inside a machine"]
fn drop_in() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let top = top.canonicalize().unwrap().display().to_string();
    let compute = bin(AgentKind::Compute.binary()).display().to_string();
    let agents = [env!("CARGO_BIN_EXE_storage-agent"), &compute];
    must("bash", &["-c", INSTALL, "install", &top, agents[0], agents[1]]);
    let pid = must("systemctl", &["show", "--property", "MainPID", "--value", "storage-agent"]);
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap();
    let uids = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!uids.split_whitespace().any(|uid| uid == "0"), "{uids}");
    println!("ok: active as {uids}");
    let host = must("hostname", &[]).trim().to_owned();
    let journal = || must("journalctl", &["--no-pager", "-u", "storage-agent", "-n", "60"]);
    runtime().block_on(async {
        let client = || {
            let transport = Arc::new(LocalTransport::connect("/run/stackhand/storage.sock"));
            AgentClient::new(transport, AgentKind::Storage, &host)
        };
        let spec = json!({
            "volume": Uuid::from_u128(1),
            "connector": {"host": "there", "initiator": ME, "client": "host"},
        });
        let sized = |id: u128, backend: &str, size: u64| {
            let spec = json!({"host": host, "size_gib": size, "backend": backend});
            document("Volume", id, size, &spec)
        };
        let link = document("Attachment", 30, 1, &spec);
        let wanted = [sized(1, "thin", 1), sized(2, "thick", 1), link.clone()];
        client().apply(&wanted).await.unwrap();
        let until = async |what: &str, done: &dyn Fn(&[Entry]) -> bool| {
            for _ in 0..240 {
                let entries = client().get(None, None).await.unwrap();
                let settled = entries.iter().all(|it| it.status.state == State::Active);
                if settled && done(&entries) {
                    return entries;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let entries = client().get(None, None).await.unwrap();
            panic!("{what}: {entries:#?}\n{}", journal());
        };
        let entries = until("to be made and exported", &|_| true).await;
        let link_entry = entries.iter().find(|it| it.status.object == link.object()).unwrap();
        let told = link_entry.status.observed["connection"].clone();
        // By the command for hosts without a hypervisor of ours.
        let by_command = |command: &str| {
            let script = "storage-agent \"$1\" \"$2\" <<<\"$3\"";
            let id = Uuid::from_u128(1).to_string();
            let said = must("bash", &["-c", script, "x", command, &id, &told.to_string()]);
            said.trim().to_owned()
        };
        write(Path::new(&by_command("attach")), 3, 8);
        client().apply(&[sized(1, "thin", 2)]).await.unwrap();
        let grown = |entries: &[Entry]| {
            entries.iter().any(|it| it.status.observed["size_bytes"] == 2_u64 << 30)
        };
        until("to grow", &grown).await;
        assert_eq!(by_command("rescan"), (2_u64 << 30).to_string());
        by_command("detach");
        println!("ok: made, exported, logged in to, grown");
        // By the helper of compute-agent, and nobody else may ask it.
        let socket = Path::new("/run/stackhand/initiator.sock");
        let mode = must("stat", &["-c", "%a %G", socket.to_str().unwrap()]);
        assert_eq!(mode.trim(), "660 stackhand-compute");
        let connection: Connection = serde_json::from_value(told).unwrap();
        let volume = VolumeId(Uuid::from_u128(1));
        assert_eq!(ask(socket, &Question::Name).await.unwrap(), ME);
        let attach = Question::Attach { volume, connection: connection.clone() };
        let device = ask(socket, &attach).await.unwrap();
        assert_eq!(filled(Path::new(&device), 8), Some(3));
        assert!(attach::is_attached(&connection, volume).unwrap());
        let rescan = Question::Rescan { volume, connection: connection.clone() };
        assert_eq!(ask(socket, &rescan).await.unwrap(), (2_u64 << 30).to_string());
        ask(socket, &Question::Detach { volume, connection }).await.unwrap();
        println!("ok: the helper attaches and detaches under its unit");
        let all: Vec<_> = wanted.iter().map(Document::object).collect();
        client().delete(&all).await.unwrap();
        wait_for(Duration::from_secs(120), "all to be gone and wiped", async || {
            let left = must("lvs", &["--noheadings", "-o", "lv_name", GROUP]);
            let gone = client().get(None, None).await.ok()?.is_empty();
            (gone && left.trim() == "cinder-volumes-pool").then_some(())
        })
        .await;
        let said = journal();
        assert!(!said.contains("denied") && !said.contains("not permitted"), "{said}");
        println!("ok: deleted and wiped");
    });
}
