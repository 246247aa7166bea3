use std::os::unix::fs::symlink;

use stackhand_model::{SnapshotId, VolumeId};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;

const MIB: u64 = 1 << 20;

struct Bench {
    root: TempDir,
    backend: FileBackend,
}

fn bench() -> Bench {
    let root = tempfile::tempdir().unwrap();
    let backend = FileBackend::new("default", &root.path().join("volumes"), root.path(), true);
    Bench { root, backend }
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("volumes").join(name)
    }

    fn presence(&self, item: Item) -> Option<Presence> {
        self.backend.observe().unwrap().items.remove(&item).map(|seen| seen.presence)
    }

    fn leftovers(&self) -> Vec<String> {
        self.backend.observe().unwrap().leftovers.into_iter().map(|left| left.name).collect()
    }
}

fn vol(id: u128) -> Item {
    Item::Volume(VolumeId(Uuid::from_u128(id)))
}

fn snap(id: u128) -> Item {
    Item::Snapshot(SnapshotId(Uuid::from_u128(id)))
}

#[test]
fn a_volume_is_made_sparse_grown_and_deleted() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    bench.backend.create(vol(1), MIB).unwrap();
    bench.backend.extend(vol(1), 3 * MIB).unwrap();
    bench.backend.extend(vol(1), 2 * MIB).unwrap();
    let seen = bench.backend.observe().unwrap().items.remove(&vol(1)).unwrap();
    assert_eq!((seen.bytes, seen.usage), (3 * MIB, Usage::Free));
    assert_eq!(seen.presence, Presence::Ready);
    assert!(seen.allocated_bytes < MIB, "{seen:?}");
    let mode = fs::metadata(bench.path(&vol(1).to_string())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else reads a volume");

    bench.backend.delete(vol(1)).unwrap();
    bench.backend.delete(vol(1)).unwrap();
    assert_eq!(bench.presence(vol(1)), None);
    let left: Vec<_> = names(&bench.path(WORK)).unwrap();
    assert_eq!(left, ["backend.json"]);
}

#[test]
fn guests_can_pass_through_the_folder_whatever_the_umask() {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&bench.path("")), 0o711);
    assert_eq!(mode(&bench.path(WORK)), 0o700, "and no further");
}

#[test]
fn a_copy_has_the_same_bytes_and_holes_and_its_own_life() {
    let bench = bench();
    bench.backend.create(vol(1), 64 * MIB).unwrap();
    let path = bench.path(&vol(1).to_string());
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"begin", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", 64 * MIB - 3).unwrap();
    drop(file);
    let progress = Progress::default();
    bench.backend.copy(snap(2), &path, 64 * MIB, &progress).unwrap();
    assert_eq!(progress.percent(), 100);
    let copy = bench.path(&snap(2).to_string());
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&path).unwrap());
    let seen = bench.backend.observe().unwrap().items.remove(&snap(2)).unwrap();
    assert!(seen.allocated_bytes < MIB, "holes stay holes: {seen:?}");
    assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o400);
    fs::write(&path, b"other").unwrap();
    assert_eq!(&fs::read(&copy).unwrap()[..5], b"begin");
}

#[test]
fn a_copy_that_is_called_off_leaves_nothing() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    let path = bench.path(&vol(1).to_string());
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let progress = Progress { cancelled: true.into(), ..Progress::default() };
    let error = bench.backend.copy(vol(2), &path, MIB, &progress).unwrap_err();
    assert!(matches!(error, BackendError::Cancelled { .. }), "{error}");
    assert_eq!(bench.presence(vol(2)), None);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[test]
fn foreign_things_that_hold_a_name_of_ours_survive_everything() {
    let bench = bench();
    bench.backend.observe().unwrap();
    let secret = bench.root.path().join("secret");
    fs::write(&secret, "theirs").unwrap();
    fs::write(bench.path(&vol(1).to_string()), "theirs").unwrap();
    symlink(&secret, bench.path(&vol(2).to_string())).unwrap();
    fs::create_dir(bench.path(&vol(3).to_string())).unwrap();
    fs::write(bench.path("notes.txt"), "theirs").unwrap();

    for item in [vol(1), vol(2), vol(3)] {
        assert!(matches!(bench.presence(item), Some(Presence::Foreign { .. })), "{item}");
        for refused in [
            bench.backend.create(item, MIB),
            bench.backend.extend(item, MIB),
            bench.backend.delete(item),
            bench.backend.clone_item(vol(9), item, MIB),
        ] {
            let error = refused.unwrap_err();
            assert!(matches!(error, BackendError::InTheWay { .. }), "{item}: {error}");
        }
        bench.backend.discard(item).unwrap();
    }
    assert_eq!(fs::read_to_string(bench.path(&vol(1).to_string())).unwrap(), "theirs");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "theirs");
    assert_eq!(fs::read_to_string(bench.path("notes.txt")).unwrap(), "theirs");
}

#[test]
fn a_file_put_in_place_of_ours_is_foreign() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    let other = bench.root.path().join("other");
    fs::write(&other, vec![1; 512]).unwrap();
    fs::rename(&other, bench.path(&vol(1).to_string())).unwrap();
    assert!(matches!(bench.presence(vol(1)), Some(Presence::Foreign { .. })));
    bench.backend.delete(vol(1)).unwrap_err();

    bench.backend.adopt(vol(1)).unwrap();
    assert_eq!(bench.presence(vol(1)), Some(Presence::Ready));
}

#[test]
fn what_cannot_be_a_raw_disk_is_not_adopted() {
    let bench = bench();
    bench.backend.observe().unwrap();
    fs::write(bench.path(&vol(1).to_string()), "odd").unwrap();
    fs::create_dir(bench.path(&vol(2).to_string())).unwrap();
    fs::write(bench.root.path().join("x"), vec![0; 512]).unwrap();
    fs::hard_link(bench.root.path().join("x"), bench.path(&vol(3).to_string())).unwrap();
    for item in [vol(1), vol(2), vol(3), vol(4)] {
        let error = bench.backend.adopt(item).unwrap_err();
        assert!(matches!(error, BackendError::InTheWay { .. }), "{item}: {error}");
    }
}

#[test]
fn a_file_that_vanished_is_lost_and_never_made_again_as_an_empty_one() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    fs::remove_file(bench.path(&vol(1).to_string())).unwrap();
    assert_eq!(bench.presence(vol(1)), Some(Presence::Lost));
    let error = bench.backend.create(vol(1), MIB).unwrap_err();
    assert!(error.to_string().contains("is gone"), "{error}");
    bench.backend.delete(vol(1)).unwrap();
    assert_eq!(bench.presence(vol(1)), None);
}

/// What a power cut leaves behind at each step of making and deleting.
#[test]
fn every_half_done_state_is_told_for_what_it_is_and_healed() {
    let work = |bench: &Bench, name: String| bench.path(WORK).join(name);

    // Made, no record yet.
    let bench = bench();
    bench.backend.observe().unwrap();
    fs::write(work(&bench, format!("{}.partial", vol(1))), "x").unwrap();
    assert_eq!((bench.presence(vol(1)), bench.leftovers().len()), (None, 1));
    bench.backend.sweep(&bench.leftovers()[0]).unwrap();
    assert_eq!(bench.leftovers(), Vec::<String>::new());

    // Made, recorded, not renamed.
    bench.backend.create(vol(1), MIB).unwrap();
    let partial = work(&bench, format!("{}.partial", vol(1)));
    fs::rename(bench.path(&vol(1).to_string()), &partial).unwrap();
    assert_eq!(bench.presence(vol(1)), Some(Presence::Partial));
    bench.backend.discard(vol(1)).unwrap();
    assert_eq!((bench.presence(vol(1)), partial.exists()), (None, false));

    // A record half written.
    fs::write(work(&bench, format!("{}.json.tmp", vol(1))), "{").unwrap();
    bench.backend.sweep(&bench.leftovers()[0]).unwrap();

    // Deleted: renamed away, the record still there, and then without it.
    bench.backend.create(vol(1), MIB).unwrap();
    let deleted = work(&bench, format!("{}.deleted", vol(1)));
    fs::rename(bench.path(&vol(1).to_string()), &deleted).unwrap();
    assert_eq!(bench.presence(vol(1)), None, "deleted, not lost");
    bench.backend.sweep(&bench.leftovers()[0]).unwrap();
    assert_eq!((bench.presence(vol(1)), bench.leftovers().len()), (None, 0));
    fs::write(&deleted, "x").unwrap();
    bench.backend.sweep(&bench.leftovers()[0]).unwrap();
    assert!(!deleted.exists());
    bench.backend.create(vol(1), MIB).unwrap();
    assert_eq!(bench.presence(vol(1)), Some(Presence::Ready));
}

#[test]
fn only_what_was_listed_is_swept() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    for name in ["backend.json".to_owned(), format!("../{}", vol(1)), "notes".into()] {
        let error = bench.backend.sweep(&name).unwrap_err();
        assert!(matches!(error, BackendError::InTheWay { .. }), "{name}: {error}");
    }
    assert_eq!(bench.presence(vol(1)), Some(Presence::Ready));
}

#[test]
fn a_folder_that_is_not_mounted_is_away_instead_of_empty() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    let (there, aside) = (bench.path(""), bench.root.path().join("unmounted"));
    fs::rename(&there, &aside).unwrap();
    let error = bench.backend.observe().unwrap_err().to_string();
    assert!(error.contains("there is no folder"), "{error}");
    fs::create_dir(&there).unwrap();
    for error in
        [bench.backend.observe().unwrap_err(), bench.backend.create(vol(1), MIB).unwrap_err()]
    {
        assert!(error.to_string().contains("mount the right file system"), "{error}");
    }
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    fs::remove_dir(&there).unwrap();
    fs::rename(&aside, &there).unwrap();
    assert_eq!(bench.presence(vol(1)), Some(Presence::Ready));
}

#[test]
fn a_folder_of_an_agent_that_lost_its_state_is_adopted() {
    let bench = bench();
    bench.backend.create(vol(1), MIB).unwrap();
    let folder = bench.path("");
    let state = bench.root.path().join("fresh");
    let fresh = FileBackend::new("default", &folder, &state, false);
    assert_eq!(fresh.observe().unwrap().items[&vol(1)].presence, Presence::Ready);
    let unmade = FileBackend::new("other", &bench.root.path().join("none"), &state, false);
    assert!(unmade.observe().unwrap_err().to_string().contains("make it"));
}
