//! The file backend on real file systems: XFS and btrfs, which clone, and ext4, which does not.
//! Needs root, loop devices, the mkfs programs and QEMU's tools. The last test drives the program.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stackhand_bus::local::LocalTransport;
use stackhand_model::{AgentKind, Document, Kind, SnapshotId, State, VolumeId};
use stackhand_runtime::client::AgentClient;
use stackhand_storage::backend::file::FileBackend;
use stackhand_storage::backend::{Backend, BackendError, Item, Presence, Progress, Usage};
use stackhand_testkit::{Spawned, wait_for, wait_for_sync};
use tempfile::TempDir;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// A file system in a file, unmounted when dropped.
struct Mounted {
    root: TempDir,
}

impl Mounted {
    fn new(make: &str, size: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let image = root.path().join("image");
        fs::File::create(&image).unwrap().set_len(size).unwrap();
        fs::create_dir(root.path().join("mnt")).unwrap();
        let quiet: &[&str] = if make == "mkfs.ext4" { &["-q", "-F"] } else { &["-q"] };
        run(make, quiet.iter().copied().chain([image.to_str().unwrap()]));
        let mount = root.path().join("mnt");
        run("mount", ["-o", "loop", image.to_str().unwrap(), mount.to_str().unwrap()]);
        Self { root }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("mnt")
    }

    fn backend(&self) -> FileBackend {
        FileBackend::new("test", &self.path(), self.root.path(), false)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", [self.path().to_str().unwrap()]);
    }
}

/// Runs a program to its end.
fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) {
    #[expect(clippy::disallowed_methods, reason = "set-up of a test, ended by its own time limit")]
    let output = std::process::Command::new(program)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}, is it installed? {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn vol(id: u128) -> Item {
    Item::Volume(VolumeId(Uuid::from_u128(id)))
}

fn snap(id: u128) -> Item {
    Item::Snapshot(SnapshotId(Uuid::from_u128(id)))
}

fn write(folder: &Path, item: Item, bytes: &[u8], offset: u64) {
    let file = fs::OpenOptions::new().write(true).open(folder.join(item.to_string())).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

fn read(folder: &Path, item: Item, length: usize) -> Vec<u8> {
    let file = fs::File::open(folder.join(item.to_string())).unwrap();
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Snapshot, overwrite, clone back: every item keeps what it had.
fn clones_share_blocks_and_nothing_else(make: &str) {
    let mounted = Mounted::new(make, 512 * MIB);
    let (backend, folder) = (mounted.backend(), mounted.path());
    assert!(backend.observe().unwrap().instant.clones, "{make} clones");
    backend.create(vol(1), 200 * MIB).unwrap();
    write(&folder, vol(1), &vec![1; 150 << 20], 0);

    let begin = Instant::now();
    backend.clone_item(snap(2), vol(1), 200 * MIB).unwrap();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(2), "a clone copies nothing, and took {took:?}");
    write(&folder, vol(1), &[9; 4096], 0);
    backend.clone_item(vol(3), snap(2), 300 * MIB).unwrap();
    write(&folder, vol(3), &[7; 4096], 0);

    assert_eq!(read(&folder, vol(1), 4096), [9; 4096]);
    assert_eq!(read(&folder, snap(2), 4096), [1; 4096]);
    assert_eq!(read(&folder, vol(3), 4096), [7; 4096]);
    let observed = backend.observe().unwrap();
    assert_eq!(observed.items[&vol(3)].bytes, 300 * MIB);
    assert!(observed.items.values().all(|seen| seen.shared && seen.presence == Presence::Ready));
    // Three times 150 MiB would not have fitted.
    assert!(observed.free_bytes > 100 * MIB, "{observed:?}");
    for item in [vol(1), snap(2), vol(3)] {
        backend.delete(item).unwrap();
    }
    assert!(backend.observe().unwrap().items.is_empty());
}

#[test]
fn clones_on_xfs_share_blocks_and_nothing_else() {
    clones_share_blocks_and_nothing_else("mkfs.xfs");
}

#[test]
fn clones_on_btrfs_share_blocks_and_nothing_else() {
    clones_share_blocks_and_nothing_else("mkfs.btrfs");
}

#[test]
fn ext4_says_that_it_cannot_clone_and_a_full_disk_leaves_nothing_behind() {
    let mounted = Mounted::new("mkfs.ext4", 64 * MIB);
    let (backend, folder) = (mounted.backend(), mounted.path());
    assert!(!backend.observe().unwrap().instant.clones);
    backend.create(vol(1), 60 * MIB).unwrap();
    write(&folder, vol(1), &vec![1; 40 << 20], 0);

    let path = folder.join(vol(1).to_string());
    let error = backend.copy(vol(2), &path, 60 * MIB, &Progress::default()).unwrap_err();
    let BackendError::Io { source, .. } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    let observed = backend.observe().unwrap();
    assert_eq!(observed.items.keys().collect::<Vec<_>>(), [&vol(1)]);
    assert!(observed.leftovers.is_empty(), "{observed:?}");
    assert!(observed.free_bytes > 8 * MIB, "what was copied is freed: {observed:?}");
}

#[test]
fn what_a_running_qemu_has_open_is_seen_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("volumes");
    let backend = FileBackend::new("default", &folder, root.path(), true);
    backend.create(vol(1), MIB).unwrap();
    let path = folder.join(vol(1).to_string());
    let socket = root.path().join("nbd");
    let usage = || backend.observe().unwrap().items[&vol(1)].usage;
    // It listens before it has opened the file, so only the lock tells that it is ready.
    let serve = |more: &[&'static str], expected: Usage| {
        let mut args = vec!["--format=raw", "--persistent", "--socket", socket.to_str().unwrap()];
        args.extend(more);
        args.push(path.to_str().unwrap());
        let mut server = Spawned::start("/usr/bin/qemu-nbd", args);
        wait_for_sync(Duration::from_secs(20), "qemu-nbd to open the volume", || {
            assert!(server.is_running(), "{server:?}");
            (usage() == expected).then_some(())
        });
        server
    };
    assert_eq!(usage(), Usage::Free);

    let server = serve(&[], Usage::Written);
    let error = backend.delete(vol(1)).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    let error = backend.copy(vol(2), &path, MIB, &Progress::default()).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    drop(server);
    let _gone = fs::remove_file(&socket);

    let reader = serve(&["--read-only"], Usage::Read);
    backend.copy(vol(2), &path, MIB, &Progress::default()).unwrap();
    backend.delete(vol(1)).unwrap_err();
    drop(reader);
    assert_eq!(usage(), Usage::Free);
    backend.delete(vol(1)).unwrap();
}

/// A volume goes back to its snapshot, however the file system copies, and after a crash between
/// the note and the rename.
fn a_volume_goes_back_to_its_snapshot(make: &str) {
    let mounted = Mounted::new(make, 512 * MIB);
    let (backend, folder) = (mounted.backend(), mounted.path());
    backend.create(vol(1), 16 * MIB).unwrap();
    write(&folder, vol(1), &vec![1; 4 << 20], 0);
    let path = folder.join(vol(1).to_string());
    if backend.observe().unwrap().instant.snapshots {
        backend.clone_item(snap(2), vol(1), 16 * MIB).unwrap();
    } else {
        backend.copy(snap(2), &path, 16 * MIB, &Progress::default()).unwrap();
    }
    write(&folder, vol(1), &vec![2; 4 << 20], 0);
    backend.extend(vol(1), 32 * MIB).unwrap();
    backend.revert(vol(1), snap(2), &Progress::default()).unwrap();
    assert!(read(&folder, vol(1), 4 << 20).iter().all(|byte| *byte == 1));
    let observed = backend.observe().unwrap();
    assert_eq!(observed.items[&vol(1)].bytes, 32 * MIB, "it keeps its size");
    assert_eq!(observed.items[&vol(1)].presence, Presence::Ready);
    assert!(observed.leftovers.is_empty(), "{observed:?}");

    // As if it was killed after the record was written and before the rename.
    write(&folder, vol(1), &vec![3; 4 << 20], 0);
    let work = folder.join(".stackhand");
    backend.revert(vol(1), snap(2), &Progress::default()).unwrap();
    fs::rename(&path, work.join(format!("{}.revert", vol(1)))).unwrap();
    fs::write(&path, vec![3; 1024]).unwrap();
    let observed = backend.observe().unwrap();
    assert_eq!(observed.items[&vol(1)].presence, Presence::Ready, "{observed:?}");
    assert!(read(&folder, vol(1), 4 << 20).iter().all(|byte| *byte == 1));
}

#[test]
fn a_volume_on_xfs_goes_back_to_its_snapshot() {
    a_volume_goes_back_to_its_snapshot("mkfs.xfs");
}

#[test]
fn a_volume_on_ext4_goes_back_to_its_snapshot() {
    a_volume_goes_back_to_its_snapshot("mkfs.ext4");
}

fn document(kind: &str, id: u128, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    let document = json!({"kind": kind, "id": id, "name": name, "generation": 1, "spec": spec});
    Document::from_value(&document).unwrap()
}

/// However full this machine's disk is: these volumes hold next to nothing.
const ROOMY: &str =
    "[storage.backends.default]\novercommit_percent = 10000\nreserved_percent = 0\n";

/// Settings for an agent whose folders are under `root`.
fn settings(root: &Path, more: &str) {
    let text = format!(
        "host = \"here\"\nstate_dir = \"{0}/state\"\nrun_dir = \"{0}/run\"\n[storage]\n{more}",
        root.display()
    );
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/stackhand.toml"), text).unwrap();
}

fn client_of(root: &Path) -> AgentClient {
    let transport = Arc::new(LocalTransport::connect(root.join("run/storage.sock")));
    AgentClient::new(transport, AgentKind::Storage, "here")
}

/// Waits until an object is in a state; answers what was observed.
async fn until(client: &AgentClient, kind: Kind, id: u128, state: State) -> (Value, String) {
    wait_for(Duration::from_secs(60), &format!("{kind} {id} to be {state:?}"), async || {
        let entries = client.get(Some(kind), Some(&[Uuid::from_u128(id)])).await.ok()?;
        let status = &entries.first()?.status;
        let told = (status.observed.clone(), status.reason.clone().unwrap_or_default());
        (status.state == state).then_some(told)
    })
    .await
}

#[tokio::test]
async fn an_agent_without_capabilities_grows_what_libvirt_gave_to_its_own_user() {
    const AGENT: u32 = 41_234;
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    settings(root, ROOMY);
    for folder in ["state", "run"] {
        fs::create_dir(root.join(folder)).unwrap();
        std::os::unix::fs::chown(root.join(folder), Some(AGENT), Some(AGENT)).unwrap();
    }
    run("chmod", ["755", root.to_str().unwrap()]);
    let as_unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/as-unit");
    let (etc, user) = (root.join("etc").display().to_string(), AGENT.to_string());
    let program = env!("CARGO_BIN_EXE_storage-agent");
    let args = ["storage", &user, program, "--config-dir", &etc];
    let mut agent = Spawned::start(as_unit.to_str().unwrap(), args);
    agent.wait_for_output(Duration::from_secs(20), "ready");
    let client = client_of(root);
    let sized = |size: u64| {
        let mut volume = document("Volume", 1, &json!({"host": "here", "size_gib": size}));
        volume.generation = size;
        volume
    };
    client.apply(&[sized(1)]).await.unwrap();
    until(&client, Kind::Volume, 1, State::Active).await;
    // What libvirt does when it starts a guest.
    let path = root.join("state/volumes").join(vol(1).to_string());
    std::os::unix::fs::chown(&path, Some(64_055), Some(64_055)).unwrap();
    client.apply(&[sized(2)]).await.unwrap();
    wait_for(Duration::from_secs(30), "the volume to grow", async || {
        (fs::metadata(&path).unwrap().len() == 2 << 30).then_some(())
    })
    .await;
    until(&client, Kind::Volume, 1, State::Active).await;
    agent.terminate(Duration::from_secs(20));
}

#[tokio::test]
async fn volumes_are_made_from_images_and_hostile_ones_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    settings(root, ROOMY);
    let image = |name: &str, size: &str| {
        let path = root.join(name).display().to_string();
        run("qemu-img", ["create", "-q", "-f", "qcow2", &path, size]);
        path
    };
    let good = image("good.qcow2", "64M");
    run("qemu-io", ["-f", "qcow2", "-c", "write -P 7 0 4M", &good]);
    let large = image("large.qcow2", "2100M");
    let leaning = root.join("leaning.qcow2").display().to_string();
    run("qemu-img", ["create", "-q", "-f", "qcow2", "-b", &good, "-F", "qcow2", &leaning, "64M"]);
    let broken = root.join("broken.qcow2").display().to_string();
    fs::write(&broken, [b"QFI\xfb".as_slice(), &[0xff; 4096]].concat()).unwrap();

    let etc = root.join("etc").display().to_string();
    let mut agent = Spawned::start(env!("CARGO_BIN_EXE_storage-agent"), ["--config-dir", &etc]);
    agent.wait_for_output(Duration::from_secs(20), "ready");
    let client = client_of(root);
    let volume = |id: u128, source: &str| {
        let image = Uuid::from_u128(id + 100);
        let spec = json!({
            "host": "here", "size_gib": 1, "source": {"image": image},
            "image": {"source": source, "format": "qcow2"},
        });
        document("Volume", id, &spec)
    };
    let volumes = [volume(1, &good), volume(2, &large), volume(3, &leaning), volume(4, &broken)];
    client.apply(&volumes).await.unwrap();
    until(&client, Kind::Volume, 1, State::Active).await;
    let folder = root.join("state/volumes");
    assert!(read(&folder, vol(1), 4 << 20).iter().all(|byte| *byte == 7));
    assert_eq!(fs::metadata(folder.join(vol(1).to_string())).unwrap().len(), 1 << 30);
    for (id, why) in [(2, "size_gib must be at least 3"), (3, "backing file"), (4, "broken.qcow2")]
    {
        let (_, reason) = until(&client, Kind::Volume, id, State::Error).await;
        assert!(reason.contains(why), "volume {id}: {reason}");
        assert!(!folder.join(vol(id).to_string()).exists());
    }
    let nameless = json!({"host": "here", "size_gib": 1, "source": {"image": Uuid::from_u128(9)}});
    let refused = client.apply(&[document("Volume", 5, &nameless)]).await.unwrap_err().to_string();
    assert!(refused.contains("must be filled in by the controller"), "{refused}");
    agent.terminate(Duration::from_secs(20));
}

#[tokio::test]
async fn a_killed_agent_finishes_its_copies_and_loses_nothing() {
    let mounted = Mounted::new("mkfs.ext4", 4096 * MIB);
    let root = mounted.root.path();
    let settings = format!(
        "host = \"here\"\nstate_dir = \"{0}/state\"\nrun_dir = \"{0}/run\"\n[storage]\n\
         default_backend = \"loop\"\n[storage.backends.loop]\npath = \"{0}/mnt\"\n",
        root.display()
    );
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/stackhand.toml"), settings).unwrap();
    let config = root.join("etc").display().to_string();
    let start = || {
        let args = ["--config-dir", &config];
        let mut agent = Spawned::start(env!("CARGO_BIN_EXE_storage-agent"), args);
        agent.wait_for_output(Duration::from_secs(20), "ready");
        agent
    };
    let client = || {
        let transport = Arc::new(LocalTransport::connect(root.join("run/storage.sock")));
        AgentClient::new(transport, AgentKind::Storage, "here")
    };
    let until_active = async |kind: Kind, id: u128| {
        wait_for(Duration::from_secs(60), &format!("{kind} {id} to be active"), async || {
            let entries = client().get(Some(kind), Some(&[Uuid::from_u128(id)])).await.ok()?;
            let active = entries.first().is_some_and(|entry| entry.status.state == State::Active);
            active.then_some(())
        })
        .await;
    };
    let mut agent = start();
    client()
        .apply(&[document("Volume", 1, &json!({"host": "here", "size_gib": 1}))])
        .await
        .unwrap();
    until_active(Kind::Volume, 1).await;
    let data: Vec<u8> = (0..256_u64 << 20).map(|n| (n % 251).to_le_bytes()[0]).collect();
    write(&mounted.path(), vol(1), &data, 0);

    for id in 2..5 {
        let source = Uuid::from_u128(1);
        client().apply(&[document("Snapshot", id, &json!({"volume": source}))]).await.unwrap();
        let partial = mounted.path().join(format!(".stackhand/{}.partial", snap(id)));
        let complete = mounted.path().join(snap(id).to_string());
        wait_for(Duration::from_secs(20), "the copy to begin", async || {
            (partial.exists() || complete.exists()).then_some(())
        })
        .await;
        agent.signal(nix::sys::signal::Signal::SIGKILL);
        drop(agent);
        agent = start();
        until_active(Kind::Snapshot, id).await;
        assert!(read(&mounted.path(), snap(id), data.len()) == data, "snapshot {id} differs");
        assert!(!partial.exists());
    }
    let entries = client().get(None, None).await.unwrap();
    assert_eq!(entries.len(), 4);
    let objects: Vec<_> = entries.iter().map(|entry| entry.status.object).collect();
    client().delete(&objects).await.unwrap();
    wait_for(Duration::from_secs(20), "all to be gone", async || {
        client().get(None, None).await.unwrap().is_empty().then_some(())
    })
    .await;
    let left: Vec<_> = fs::read_dir(mounted.path().join(".stackhand")).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    agent.terminate(Duration::from_secs(20));
}
