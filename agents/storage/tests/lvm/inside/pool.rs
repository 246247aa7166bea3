//! A thin pool that fills up.

use super::agent::{Agent, sized, snapshot};
use super::*;

/// Waits until an object has failed; answers why.
async fn refused(kind: Kind, id: u128) -> String {
    wait_for(PATIENCE, &format!("{kind} {id} to be refused"), async || {
        let entries = Agent::client().get(Some(kind), Some(&[Uuid::from_u128(id)])).await.ok()?;
        let status = &entries.first()?.status;
        (status.state == State::Error).then(|| status.reason.clone().unwrap_or_default())
    })
    .await
}

/// 1.8 GiB, whose small map is an eighth full from the start, and of which every promise is kept, see `plan::capacity`.
pub(super) fn fills_up() {
    let mut agent = Agent::new(&["127.0.0.1:3260"], 100);
    agent.start();
    runtime().block_on(async {
        let client = Agent::client();
        let active = async |kind, id| Agent::until(kind, id, |facts| facts.is_some()).await;
        let disk = Path::new("/dev/cinder-volumes").join(vol(1).to_string());
        client.apply(&[sized(1, "thin", 1)]).await.unwrap();
        active(Kind::Volume, 1).await;
        client.apply(&[sized(2, "thin", 1)]).await.unwrap();
        let why = refused(Kind::Volume, 2).await;
        assert!(why.contains("do not fit: backend thin can promise"), "{why}");
        client.delete(&[vol(2).object()]).await.unwrap();
        write(&disk, 1, 64);
        client.apply(&[snapshot(20, 1)]).await.unwrap();
        active(Kind::Snapshot, 20).await;
        println!("ok: what would not fit is refused, what fits is not");

        // What is shared with the snapshot is written anew, and takes space of its own.
        write(&disk, 2, 240);
        let fill = wait_for(PATIENCE, "the agent to see it", async || {
            let facts = client.facts().await.ok()?;
            let fill = facts["backends"]["thin"]["data_percent"].as_f64()?;
            (fill > 16.0).then_some(fill)
        })
        .await;
        client.apply(&[snapshot(21, 1)]).await.unwrap();
        let why = refused(Kind::Snapshot, 21).await;
        assert!(why.contains("takes nothing more") && why.contains("the limit is 16 %"), "{why}");
        wait_for(PATIENCE, "the agent to tell that it is not well", async || {
            let reasons = client.report().await.ok()?.reasons;
            reasons.iter().any(|reason| reason.contains("the limit is 14 %")).then_some(())
        })
        .await;
        write(&disk, 3, 256);
        assert_eq!(filled(&disk, 256), Some(3));
        println!("ok: at {fill} % nothing new is taken, and who is there writes on");

        // Space that comes free is used without being asked for again.
        client.delete(&[snap(20).object()]).await.unwrap();
        active(Kind::Snapshot, 21).await;
        client.delete(&[snap(21).object(), vol(1).object()]).await.unwrap();
        Agent::until(Kind::Volume, 1, |facts| facts.is_none()).await;
        println!("ok: deleted; the pool is free again");
    });
    agent.stop();
}
