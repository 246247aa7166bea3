//! The textbook case: volume group `cinder-volumes` on a loop device, a volume `demo-v1` of 1 GB,
//! and instances of another host that have it as `/dev/vdb`.

use stackhand_runtime::api::Condition;

use super::agent::{Agent, sized, snapshot, volumes};
use super::*;
use crate::guests::{Ask, put};
use crate::machine::digest;

/// What is shared with the host.
const SHARED: &str = "/lab/results";

/// Bytes that guests write and read, in MiB.
const HASHED: &str = "dd if=/dev/vdb bs=1M count=24 2>/dev/null | sha256sum";

/// A guest of the host.
struct Guest(u32);

impl Guest {
    fn start(number: u32, connection: Connection, script: &str) -> Self {
        let ask = serde_json::to_string(&Ask { connection, script: script.to_owned() }).unwrap();
        put(Path::new(SHARED), &format!("ask-{number}"), &ask);
        Self(number)
    }

    fn file(&self, name: &str) -> Option<String> {
        fs::read_to_string(Path::new(SHARED).join(format!("{name}-{}", self.0))).ok()
    }

    async fn until_it_says(&self, word: &str) {
        wait_for(Duration::from_secs(180), &format!("a guest to say {word}"), async || {
            self.file("said")?.contains(word).then_some(())
        })
        .await;
    }

    async fn finish(self) -> String {
        wait_for(Duration::from_secs(180), "a guest to end", async || self.file("done")).await
    }
}

fn given(id: u128, volume: u128, host: &str) -> Document {
    let spec = json!({"volume": Uuid::from_u128(volume), "connector": {"host": host}});
    document("Attachment", id, 1, &spec)
}

#[test]
#[ignore = "run by `lab` inside a machine"]
fn demo_v1() {
    let port = fs::read_to_string(Path::new(SHARED).join("port")).unwrap();
    // The first is where the host reaches it; behind that is the second.
    let mut agent = Agent::new(&[&format!("127.0.0.1:{port}"), &format!("10.0.2.15:{port}")], 1000);
    agent.start();
    runtime().block_on(async {
        let client = Agent::client();
        let has = |facts: Option<&Value>, gib: u64| {
            facts.is_some_and(|facts| facts["size_bytes"] == gib << 30)
        };
        let mut demo_v1 = sized(1, "thin", 1);
        demo_v1.name = "demo-v1".parse().unwrap();
        let link = given(30, 1, "compute1");
        client.apply(&[demo_v1.clone(), link.clone()]).await.unwrap();
        let connection = Agent::connection(30).await;
        assert_eq!(volumes(), [vol(1).to_string()]);

        // It is written to while the agent is killed and comes back.
        let script = format!(
            "test $(cat /sys/block/vdb/size) = 2097152\n\
             for turn in 1 2 3 4 5 6; do dd if=/dev/urandom of=/dev/vdb bs=1M count=24 2>/dev/null\n\
             sync; echo turn-$turn; sleep 1; done\n\
             echo 3 >/proc/sys/vm/drop_caches\necho wrote $({HASHED})"
        );
        let guest = Guest::start(1, connection, &script);
        guest.until_it_says("turn-1").await;
        agent.process.take().unwrap().kill();
        guest.until_it_says("turn-2").await;
        agent.start();
        let wrote = digest(&guest.finish().await, "wrote ");
        println!("ok: /dev/vdb has 1 GiB; killed and started under a guest's writes");

        // Let go, grown, kept; another host's instance has the same bytes, and spoils them.
        client.delete(&[link.object()]).await.unwrap();
        Agent::until(Kind::Attachment, 30, |facts| facts.is_none()).await;
        (demo_v1.spec, demo_v1.generation) = (sized(1, "thin", 2).spec, 2);
        client.apply(&[demo_v1, snapshot(20, 1)]).await.unwrap();
        Agent::until(Kind::Snapshot, 20, |facts| has(facts, 2)).await;
        let link = given(31, 1, "compute2");
        client.apply(std::slice::from_ref(&link)).await.unwrap();
        let script = format!(
            "test $(cat /sys/block/vdb/size) = 4194304\necho read $({HASHED})\n\
             dd if=/dev/urandom of=/dev/vdb bs=1M count=24 2>/dev/null; sync"
        );
        let guest = Guest::start(2, Agent::connection(31).await, &script);
        assert_eq!(digest(&guest.finish().await, "read "), wrote);
        client.delete(&[link.object()]).await.unwrap();
        Agent::until(Kind::Attachment, 31, |facts| facts.is_none()).await;
        println!("ok: another guest reads what the first one wrote");

        // A clone of the snapshot, and the volume itself set back to it.
        let spec = json!({"host": "here", "size_gib": 3, "backend": "thin",
                          "source": {"snapshot": Uuid::from_u128(20)}});
        client.apply(&[document("Volume", 2, 1, &spec)]).await.unwrap();
        Agent::until(Kind::Volume, 2, |facts| has(facts, 3)).await;
        Agent::revert(&client, 1, 20).await;
        let hash = |id: u128| {
            let disk = Path::new("/dev/cinder-volumes").join(vol(id).to_string());
            let script = HASHED.replace("/dev/vdb", &disk.display().to_string());
            digest(&must("sh", &["-c", &script]), "")
        };
        assert_eq!(hash(2), wrote, "a clone");
        client.wait(&[vol(1).object()], Condition::Done, PATIENCE).await.unwrap();
        assert_eq!(hash(1), wrote, "the volume set back");
        let link = given(32, 1, "compute3");
        client.apply(std::slice::from_ref(&link)).await.unwrap();
        let script = format!("echo read $({HASHED})");
        let guest = Guest::start(3, Agent::connection(32).await, &script);
        assert_eq!(digest(&guest.finish().await, "read "), wrote);
        println!("ok: a clone and the volume set back have the bytes of the snapshot");

        let all = [link.object(), snap(20).object(), vol(1).object(), vol(2).object()];
        client.delete(&all).await.unwrap();
        wait_for(PATIENCE, "nothing to be left", async || {
            (volumes().is_empty() && client.get(None, None).await.ok()?.is_empty()).then_some(())
        })
        .await;
        println!("ok: nothing is left");
    });
    agent.stop();
}
