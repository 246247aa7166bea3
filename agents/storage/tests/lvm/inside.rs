//! What runs inside the machines, and what its tests share.

mod agent;
mod exports;
mod killed;
mod pool;
mod textbook;
mod unit;
mod volumes;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stackhand_attach as attach;
use stackhand_bus::local::LocalTransport;
use stackhand_model::{
    AgentKind, Connection, Document, IscsiClient, Kind, Secret, SnapshotId, State, VolumeId,
};
use stackhand_runtime::client::AgentClient;
use stackhand_storage::backend::lvm::{Allocation, LvmBackend, Options};
use stackhand_storage::backend::{Backend, BackendError, Item, Presence, Progress, Usage};
use stackhand_storage::export::lio::{self, Lio};
use stackhand_storage::export::{Admission, Exporter, Target, target_name};
use stackhand_testkit::{Spawned, wait_for, wait_for_sync};
use uuid::Uuid;

pub(super) const GROUP: &str = "cinder-volumes";
pub(super) const MIB: u64 = 1 << 20;
/// How long things may take, in a machine without hardware help on a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
pub(super) const ME: &str = "iqn.2026-11.org.x:lab";

pub(super) fn run(program: &str, args: &[&str]) -> Output {
    #[expect(clippy::disallowed_methods, reason = "inside a machine with a time limit")]
    std::process::Command::new(program).args(args).output().unwrap()
}

pub(super) fn must(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(super) fn backend(name: &str, allocation: Allocation) -> LvmBackend {
    let options = Options {
        group: GROUP.into(),
        allocation,
        devices: vec![],
        wipe_rate: 2 << 30,
        wipe: true,
        turn: Arc::default(),
    };
    LvmBackend::new(name, Path::new("/var/tmp/lab/state"), options)
}

pub(super) fn vol(id: u128) -> Item {
    Item::Volume(VolumeId(Uuid::from_u128(id)))
}

pub(super) fn snap(id: u128) -> Item {
    Item::Snapshot(SnapshotId(Uuid::from_u128(id)))
}

pub(super) fn path(backend: &LvmBackend, item: Item) -> PathBuf {
    backend.observe().unwrap().place.path(item)
}

pub(super) fn write(path: &Path, byte: u8, mib: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![byte; usize::try_from(mib * MIB).unwrap()], 0).unwrap();
    file.sync_all().unwrap();
}

/// The byte that fills the first `mib` MiB, or nothing if they differ.
pub(super) fn filled(path: &Path, mib: u64) -> Option<u8> {
    let file = File::options().read(true).open(path).unwrap();
    let mut bytes = vec![0; usize::try_from(mib * MIB).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let same = vec![bytes[0]; bytes.len()];
    // Compared as a whole: byte by byte takes minutes in a machine without optimisation.
    (bytes == same).then_some(bytes[0])
}

pub(super) fn presences(backend: &LvmBackend) -> BTreeMap<Item, Presence> {
    backend.observe().unwrap().items.into_iter().map(|(item, it)| (item, it.presence)).collect()
}

pub(super) fn target(
    volume: u128,
    path: &Path,
    bytes: u64,
    admitted: &[(&str, &str, bool)],
) -> Target {
    let admitted = admitted
        .iter()
        .map(|(name, password, read_only)| {
            let admission = Admission {
                user: "sh-user".into(),
                password: Secret((*password).into()),
                read_only: *read_only,
            };
            ((*name).to_owned(), admission)
        })
        .collect();
    let volume = VolumeId(Uuid::from_u128(volume));
    Target { volume, path: path.to_owned(), bytes, is_device: true, admitted }
}

pub(super) fn connection(volume: VolumeId, password: &str) -> Connection {
    Connection::Iscsi {
        portal: "127.0.0.1:3260".into(),
        iqn: target_name(volume),
        lun: 0,
        initiator: Some(ME.into()),
        client: IscsiClient::Host,
        username: Some("sh-user".into()),
        password: Some(Secret(password.into())),
    }
}

pub(super) fn document(kind: &str, id: u128, generation: u64, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    Document::from_value(&json!({
        "kind": kind, "id": id, "name": name, "generation": generation, "spec": spec,
    }))
    .unwrap()
}
