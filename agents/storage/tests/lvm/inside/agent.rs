//! The program in its place, and what tests ask of it.

use super::*;

/// The storage agent of this machine, with a thin pool, thick volumes of the same group, and the
/// kernel's target.
pub(super) struct Agent {
    pub(super) process: Option<Spawned>,
}

impl Agent {
    /// Its settings: where other hosts reach volumes, and how much of the pool is promised.
    pub(super) fn new(portals: &[&str], overcommit_percent: u32) -> Self {
        fs::create_dir_all("/var/tmp/lab/etc").unwrap();
        let settings = format!(
            "host = \"here\"\nstate_dir = \"/var/tmp/lab/agent\"\nrun_dir = \"/var/tmp/lab/run\"\n\
             [reconcile]\nresync_seconds = 5\nretry_max_seconds = 5\n\
             [storage]\ndefault_backend = \"thin\"\n\
             [storage.export]\ntype = \"lio\"\nportals = {portals:?}\n\
             [storage.backends.thin]\ntype = \"lvm-thin\"\nvolume_group = \"cinder-volumes\"\n\
             overcommit_percent = {overcommit_percent}\nwarn_percent = 14\nstop_percent = 16\n\
             [storage.backends.thick]\ntype = \"lvm\"\nvolume_group = \"cinder-volumes\"\n"
        );
        fs::write("/var/tmp/lab/etc/stackhand.toml", settings).unwrap();
        Self { process: None }
    }

    pub(super) fn start(&mut self) {
        let program = env!("CARGO_BIN_EXE_storage-agent");
        let mut process = Spawned::start(program, ["--config-dir", "/var/tmp/lab/etc"]);
        process.wait_for_output(Duration::from_secs(60), "ready");
        self.process = Some(process);
    }

    pub(super) fn stop(&mut self) {
        self.process.take().unwrap().terminate(Duration::from_secs(20));
    }

    pub(super) fn client() -> AgentClient {
        let transport = Arc::new(LocalTransport::connect("/var/tmp/lab/run/storage.sock"));
        AgentClient::new(transport, AgentKind::Storage, "here")
    }

    /// Waits until an object is active and has these facts, or is gone.
    pub(super) async fn until(kind: Kind, id: u128, done: impl Fn(Option<&Value>) -> bool) {
        wait_for(PATIENCE, &format!("{kind} {id}"), async || {
            let entries = Self::client().get(Some(kind), Some(&[Uuid::from_u128(id)])).await;
            let entries = entries.ok()?;
            let status = entries.first().map(|entry| &entry.status);
            let settled = status.is_none_or(|status| status.state == State::Active);
            (settled && done(status.map(|status| &status.observed))).then_some(())
        })
        .await;
    }

    /// Waits until an attachment is made; answers how its host reaches the volume.
    pub(super) async fn connection(id: u128) -> Connection {
        Self::until(Kind::Attachment, id, |facts| facts.is_some()).await;
        let key = [Uuid::from_u128(id)];
        let entries = Self::client().get(Some(Kind::Attachment), Some(&key)).await.unwrap();
        serde_json::from_value(entries[0].status.observed["connection"].clone()).unwrap()
    }

    /// Has a volume set back to a snapshot.
    pub(super) async fn revert(client: &AgentClient, volume: u128, snapshot: u128) {
        let params = json!({"snapshot": Uuid::from_u128(snapshot)});
        client.act(vol(volume).object(), "revert", params).await.unwrap();
    }
}

/// A volume of the agent's.
pub(super) fn sized(id: u128, backend: &str, size: u64) -> Document {
    document("Volume", id, size, &json!({"host": "here", "size_gib": size, "backend": backend}))
}

/// A volume given to this machine's own kernel.
pub(super) fn attached(id: u128, volume: u128) -> Document {
    let connector = json!({"host": "there", "initiator": ME, "client": "host"});
    let spec = json!({"volume": Uuid::from_u128(volume), "connector": connector});
    document("Attachment", id, 1, &spec)
}

pub(super) fn snapshot(id: u128, volume: u128) -> Document {
    document("Snapshot", id, 1, &json!({"volume": Uuid::from_u128(volume)}))
}

/// Names of the logical volumes, but for the pool.
pub(super) fn volumes() -> Vec<String> {
    let said = must("lvm", &["lvs", "--noheadings", "-o", "lv_name", GROUP]);
    let names = said.split_whitespace().filter(|name| *name != "cinder-volumes-pool");
    names.map(str::to_owned).collect()
}
