//! The program, killed at each of LVM's changes.

use stackhand_runtime::api::Condition;

use super::agent::{Agent, attached, sized, snapshot, volumes};
use super::*;

/// How long one question waits, so that a kill is seen in between.
const MOMENT: Duration = Duration::from_secs(2);

/// While it is there, each change kills the agent.
const FAULT: &str = "/var/tmp/lab/fault";

/// Stands in for LVM's program: makes a change, then kills the agent before it hears of that, once
/// for each. The next change is begun by the next agent: so each was cut off before and after it.
const LVM: &str = r#"#!/bin/bash
real=/var/tmp/lab/real/lvm
case $1 in lvcreate | lvremove | lvrename | lvextend | lvchange | lvconvert) ;; *) exec $real "$@" ;; esac
[ -e /var/tmp/lab/fault ] || exec $real "$@"
change="$1 ${*:(-2)}"
! grep -qxF "$change" /var/tmp/lab/kills 2>/dev/null || exec $real "$@"
echo "$change" >>/var/tmp/lab/kills
$real "$@"
status=$?
kill -9 $PPID
exit $status
"#;

fn replace_lvm() {
    fs::create_dir_all("/var/tmp/lab/real").unwrap();
    fs::copy("/usr/sbin/lvm", "/var/tmp/lab/real/lvm").unwrap();
    fs::remove_file("/usr/sbin/lvm").unwrap();
    fs::write("/usr/sbin/lvm", LVM).unwrap();
    fs::set_permissions("/usr/sbin/lvm", fs::Permissions::from_mode(0o755)).unwrap();
}

/// Waits for `done` while the agent is killed at each change and started again.
async fn until_killed_through(agent: &mut Agent, what: &str, done: impl AsyncFn() -> bool) {
    let mut kills = 0;
    let end = Instant::now() + 2 * PATIENCE;
    while !done().await {
        if !agent.process.as_mut().unwrap().is_running() {
            kills += 1;
            agent.start();
        }
        let said = agent.process.as_ref().unwrap().output();
        assert!(
            Instant::now() < end,
            "{what}: not after {kills} kills: {:?}\n{:?}\n{said}",
            volumes(),
            fs::read_to_string("/var/tmp/lab/kills").unwrap_or_default(),
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    println!("ok: {what}, killed {kills} times on the way");
}

/// Whether an object is active with that size.
async fn has(kind: Kind, id: u128, gib: u64) -> bool {
    let entries = Agent::client().get(Some(kind), Some(&[Uuid::from_u128(id)])).await;
    entries.is_ok_and(|entries| {
        entries.first().is_some_and(|entry| {
            entry.status.state == State::Active && entry.status.observed["size_bytes"] == gib << 30
        })
    })
}

/// Sends until it is answered: an agent that is killed while it answers has accepted it.
async fn send(agent: &mut Agent, call: impl AsyncFn(&AgentClient) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !call(&Agent::client()).await {
        assert!(Instant::now() < end, "not answered");
        if !agent.process.as_mut().unwrap().is_running() {
            agent.start();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// From the first to the last change of a volume with a snapshot.
async fn life(agent: &mut Agent, backend: &str, id: u128) {
    let disk = Path::new("/dev/cinder-volumes").join(vol(id).to_string());
    let shot = snapshot(id + 100, id);
    send(agent, async |client| client.apply(&[sized(id, backend, 1)]).await.is_ok()).await;
    until_killed_through(agent, "made", async || has(Kind::Volume, id, 1).await).await;
    write(&disk, 5, 8);
    send(agent, async |client| client.apply(std::slice::from_ref(&shot)).await.is_ok()).await;
    until_killed_through(agent, "kept", async || has(Kind::Snapshot, id + 100, 1).await).await;
    write(&disk, 6, 8);
    must("udevadm", &["settle"]);
    send(agent, async |client| {
        let params = json!({"snapshot": Uuid::from_u128(id + 100)});
        client.act(vol(id).object(), "revert", params).await.is_ok()
    })
    .await;
    until_killed_through(agent, "set back", async || {
        let both = [vol(id).object(), snap(id + 100).object()];
        Agent::client().wait(&both, Condition::Done, MOMENT).await.is_ok()
    })
    .await;
    assert_eq!(filled(&disk, 8), Some(5));
    assert_eq!(volumes().len(), 2, "{:?}", volumes());
    let all = [shot.object(), vol(id).object()];
    send(agent, async |client| client.delete(&all).await.is_ok()).await;
    until_killed_through(agent, "deleted and wiped", async || {
        volumes().is_empty()
            && Agent::client().get(None, None).await.is_ok_and(|left| left.is_empty())
    })
    .await;
}

#[test]
#[ignore = "run by `lab` inside a machine"]
fn agent() {
    replace_lvm();
    runtime().block_on(async {
        let mut agent = Agent::new(&["127.0.0.1:3260"], 1000);
        agent.start();
        fs::write(FAULT, "").unwrap();
        life(&mut agent, "thin", 1).await;
        life(&mut agent, "thick", 2).await;
        fs::remove_file(FAULT).unwrap();
        // What the last change was to kill may not have been killed yet.
        agent.process.take().unwrap().kill();
        agent.start();

        // Logged in and written to while the agent is killed and started.
        let client = Agent::client();
        let link = attached(30, 3);
        client.apply(&[sized(3, "thin", 1), link.clone()]).await.unwrap();
        let connection = Agent::connection(30).await;
        let volume = VolumeId(Uuid::from_u128(3));
        let device = attach::attach(&connection, volume).await.unwrap();
        agent.process.take().unwrap().kill();
        write(&device, 4, 32);
        agent.start();
        write(&device, 7, 32);
        assert_eq!(filled(&device, 32), Some(7));
        attach::detach(&connection, volume).await.unwrap();
        println!("ok: killed and started under writes");
        client.delete(&[link.object(), vol(3).object()]).await.unwrap();
        wait_for(PATIENCE, "all to be gone", async || volumes().is_empty().then_some(())).await;
        agent.stop();
    });
}
