//! Thin and thick volumes.

use super::*;

#[test]
#[ignore = "run by `lab` inside a machine"]
fn thin_then_thick() {
    let runtime = runtime();
    let _in = runtime.enter();
    thin();
    thick();
}

/// Between looks, what the backend remembers of its own changes is what a look finds.
fn remembers(thin: &LvmBackend) {
    let (kept, mine, theirs) = (vol(11), vol(12), vol(13));
    thin.create(mine, 64 * MIB).unwrap();
    let pool = format!("{GROUP}/cinder-volumes-pool");
    let name = theirs.to_string();
    must("lvcreate", &["-qq", "-V", "64m", "-T", &pool, "-n", &name, "--addtag", "stackhand"]);
    thin.create(kept, 64 * MIB).unwrap();
    let recalled = thin.recall().unwrap().items;
    assert!(!recalled.contains_key(&theirs), "a look was taken: {recalled:?}");
    let error = stackhand_runtime::chain(&thin.create(theirs, 64 * MIB).unwrap_err());
    assert!(error.contains("already exists"), "{error}");
    let found = thin.observe().unwrap().items;
    assert_eq!(found.get(&kept), recalled.get(&kept));
    assert_eq!(found.get(&mine), recalled.get(&mine));
    assert!(found.contains_key(&theirs), "what was refused is known after a look");

    thin.delete(theirs).unwrap();
    thin.delete(mine).unwrap();
    let recalled = thin.recall().unwrap().items;
    thin.delete(kept).unwrap();
    let left = thin.recall().unwrap().items;
    assert_eq!(thin.observe().unwrap().items, left);
    assert_eq!(recalled.len(), left.len() + 1);
    println!("ok: remembers its own changes between looks");
}

fn thin() {
    let thin = backend("thin", Allocation::Thin { pool: "cinder-volumes-pool".into() });
    let first = vol(1);
    thin.create(first, 128 * MIB).unwrap();
    thin.create(first, 128 * MIB).unwrap();
    let device = path(&thin, first);
    assert_eq!(device, Path::new("/dev/cinder-volumes").join(first.to_string()));
    assert_eq!(filled(&device, 8), Some(0), "a new volume reads as zeroes");
    write(&device, 1, 8);

    remembers(&thin);

    thin.clone_item(snap(20), first, 0).unwrap();
    write(&device, 2, 8);
    thin.clone_item(vol(2), snap(20), 192 * MIB).unwrap();
    assert_eq!(filled(&path(&thin, snap(20)), 8), Some(1));
    assert_eq!(filled(&path(&thin, vol(2)), 8), Some(1));
    let observed = thin.observe().unwrap();
    assert_eq!(observed.items[&vol(2)].bytes, 192 * MIB);
    assert!(observed.items[&first].shared && observed.fill.unwrap().data > 0);
    println!("ok: snapshot and clone keep what they had");

    // Grown and kept while somebody has it open.
    let open = File::open(&device).unwrap();
    thin.extend(first, 160 * MIB).unwrap();
    let seen = thin.observe().unwrap().items.remove(&first).unwrap();
    assert_eq!((seen.bytes, seen.usage), (160 * MIB, Usage::Written));
    let error = thin.delete(first).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    let error = thin.revert(first, snap(20), &Progress::default()).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    drop(open);
    println!("ok: grown under use, and nothing worse done to it");

    thin.revert(first, snap(20), &Progress::default()).unwrap();
    assert_eq!(filled(&device, 8), Some(1));
    let seen = thin.observe().unwrap().items.remove(&first).unwrap();
    assert_eq!(seen.bytes, 160 * MIB, "a volume that is set back keeps its size");
    // Cut off between its two renames.
    let names = [vol(1).to_string(), format!("stackhand-old-{}", vol(1))];
    must(
        "lvcreate",
        &[
            "-qq",
            "-s",
            "-kn",
            "-ay",
            "--addtag",
            "stackhand",
            "-n",
            "stackhand-revert-x",
            &format!("{GROUP}/_{}", snap(20)),
        ],
    );
    must(
        "lvrename",
        &["-qq", GROUP, "stackhand-revert-x", &format!("stackhand-revert-{}", vol(1))],
    );
    must("lvrename", &["-qq", GROUP, &names[0], &names[1]]);
    assert_eq!(presences(&thin)[&vol(1)], Presence::Lost);
    thin.revert(first, snap(20), &Progress::default()).unwrap();
    assert_eq!(filled(&device, 8), Some(1));
    assert!(!must("lvs", &["--noheadings", "-o", "lv_name", GROUP]).contains("stackhand-"));
    println!("ok: set back, also after a crash in between");

    // What is not ours survives.
    must(
        "lvcreate",
        &[
            "-qq",
            "-an",
            "-kn",
            "-V",
            "64m",
            "-T",
            "cinder-volumes/cinder-volumes-pool",
            "-n",
            &vol(3).to_string(),
        ],
    );
    assert!(matches!(presences(&thin)[&vol(3)], Presence::Foreign { .. }));
    for error in [thin.create(vol(3), MIB), thin.delete(vol(3)), thin.extend(vol(3), MIB)] {
        assert!(matches!(error, Err(BackendError::InTheWay { .. })), "{error:?}");
    }
    thin.adopt(vol(3)).unwrap();
    assert_eq!(presences(&thin)[&vol(3)], Presence::Inactive);
    thin.activate(vol(3)).unwrap();
    assert_eq!(presences(&thin)[&vol(3)], Presence::Ready);
    println!("ok: foreign volumes survive, and are adopted when asked");

    // An unfinished one is begun again; a lost one is not.
    let (source, progress) = (path(&thin, vol(2)), Progress::default());
    let failing = thin.import(vol(4), 64 * MIB, &mut |_| {
        Err(BackendError::Away { backend: "x".into(), reason: "told so".into() })
    });
    assert!(failing.is_err() && !presences(&thin).contains_key(&vol(4)));
    thin.copy(vol(4), &source, 192 * MIB, &progress).unwrap();
    assert_eq!(filled(&path(&thin, vol(4)), 8), Some(1));
    let sparse = thin.observe().unwrap().items.remove(&vol(4)).unwrap();
    assert!(sparse.allocated_bytes < 64 * MIB, "zeroes are left out: {sparse:?}");
    must("lvremove", &["-qq", "-f", &format!("{GROUP}/{}", vol(4))]);
    assert_eq!(presences(&thin)[&vol(4)], Presence::Lost);
    assert!(matches!(thin.create(vol(4), MIB), Err(BackendError::InTheWay { .. })));
    thin.delete(vol(4)).unwrap();
    println!("ok: lost is told, never made again as an empty volume");

    // A pool that fills up says so.
    write(&path(&thin, vol(2)), 7, 190);
    let fill = thin.observe().unwrap().fill.unwrap();
    assert!(fill.data > 1_000, "{fill:?}");
    let used = fill.data;
    let begin = Instant::now();
    for item in [vol(2), vol(3), first, snap(20)] {
        thin.delete(item).unwrap();
    }
    let took = begin.elapsed();
    let observed = thin.observe().unwrap();
    assert!(observed.items.is_empty() && observed.fill.unwrap().data < 500, "{observed:?}");
    println!("ok: {used} hundredths of the pool used, freed by 4 deletions in {took:?}");
    thin.create(vol(5), 50 * 1024 * MIB).unwrap();
    thin.delete(vol(5)).unwrap();

    // The group is another one: away, not empty.
    fs::write("/var/tmp/lab/state/backends/thin.json", "{\"backend\":\"other\"}").unwrap();
    let error = thin.observe().unwrap_err().to_string();
    assert!(error.contains("is not the one that held this backend's volumes"), "{error}");
    let none = Options {
        group: "none".into(),
        allocation: Allocation::Thick,
        devices: vec![],
        wipe_rate: 1,
        wipe: true,
        turn: Arc::default(),
    };
    let none = LvmBackend::new("none", Path::new("/var/tmp/lab/state"), none);
    let error = none.observe().unwrap_err().to_string();
    assert!(error.contains("there is no volume group none: connect its disks"), "{error}");
}

fn thick() {
    // What is left is little, so that all of it can be read.
    must("lvextend", &["-qq", "-l", "+95%FREE", "cinder-volumes/cinder-volumes-pool"]);
    let thick = backend("thick", Allocation::Thick);
    assert!(thick.observe().unwrap().items.is_empty());
    thick.create(vol(1), 64 * MIB).unwrap();
    let device = path(&thick, vol(1));
    write(&device, 9, 64);
    thick.clone_item(snap(20), vol(1), 0).unwrap();
    write(&device, 8, 64);
    assert_eq!(filled(&path(&thick, snap(20)), 64), Some(9));
    assert_eq!(thick.observe().unwrap().items[&snap(20)].bytes, 64 * MIB);
    // A clone is a copy, from the snapshot, while the volume is used.
    let open = File::open(&device).unwrap();
    let source = path(&thick, snap(20));
    thick.copy(vol(2), &source, 64 * MIB, &Progress::default()).unwrap();
    assert_eq!(filled(&path(&thick, vol(2)), 64), Some(9));
    let error = thick.extend(vol(1), 96 * MIB).unwrap_err().to_string();
    assert!(error.contains("cannot grow while it is used"), "{error}");
    drop(open);
    thick.extend(vol(1), 72 * MIB).unwrap();
    thick.revert(vol(1), snap(20), &Progress::default()).unwrap();
    assert_eq!(filled(&device, 64), Some(9));
    write(&device, 7, 64);
    assert_eq!(filled(&path(&thick, snap(20)), 64), Some(9), "the snapshot is there again");
    println!("ok: snapshot, copy, growth and going back");

    // Deleting answers at once; then nobody reads what was there.
    let before = thick.observe().unwrap().free_bytes;
    let begin = Instant::now();
    for item in [snap(20), vol(1), vol(2)] {
        thick.delete(item).unwrap();
    }
    let took = begin.elapsed();
    let observed = thick.observe().unwrap();
    assert!(observed.items.is_empty());
    assert_eq!(observed.leftovers.len(), 3, "{observed:?}");
    assert!(observed.leftovers.iter().all(|leftover| leftover.to_wipe));
    assert_eq!(observed.free_bytes, before, "space is not free before it is wiped");
    let names: Vec<String> = observed.leftovers.into_iter().map(|it| it.name).collect();
    for name in &names {
        thick.wipe(name, &Progress::default()).unwrap();
        thick.wipe(name, &Progress::default()).unwrap();
    }
    let observed = thick.observe().unwrap();
    assert!(observed.leftovers.is_empty() && observed.free_bytes > before + 180 * MIB);
    println!("ok: 3 deleted in {took:?}, then wiped");
    let bytes = observed.free_bytes / (4 * MIB) * 4 * MIB;
    thick.create(vol(3), bytes).unwrap();
    let disk = File::open(path(&thick, vol(3))).unwrap();
    let (mut buffer, zeroes) = (vec![1; 4 << 20], vec![0; 4 << 20]);
    for position in (0..bytes).step_by(buffer.len()) {
        disk.read_exact_at(&mut buffer, position).unwrap();
        assert!(buffer == zeroes, "old bytes at {position}");
    }
    drop(disk);
    let error = thick.create(vol(4), 64 * MIB).unwrap_err();
    assert!(matches!(error, BackendError::Program { .. }), "{error}");
    assert!(!presences(&thick).contains_key(&vol(4)), "nothing is left of it");
    println!("ok: whoever gets the space reads zeroes; a full group leaves nothing behind");

    // A disk under the group that is gone is told, and nothing is made in its place.
    thick.delete(vol(3)).unwrap();
    let name = thick.observe().unwrap().leftovers.pop_first().unwrap().name;
    must("lvremove", &["-qq", "-f", &format!("{GROUP}/{name}")]);
    must("truncate", &["-s", "256M", "/var/tmp/lab/disks/second"]);
    let second = must("losetup", &["-f", "--show", "/var/tmp/lab/disks/second"]).trim().to_owned();
    must("vgextend", &["-qq", GROUP, &second]);
    thick.create(vol(5), 100 * MIB).unwrap();
    must("lvextend", &["-qq", "-L", "+200m", &format!("{GROUP}/{}", vol(5)), &second]);
    must("vgchange", &["-qq", "-an", GROUP]);
    must("losetup", &["-d", &second]);
    must("udevadm", &["settle"]);
    let observed = thick.observe().unwrap();
    assert!(matches!(observed.items[&vol(5)].presence, Presence::Broken { .. }), "{observed:?}");
    assert!(observed.troubles[0].contains("1 disks of volume group"), "{observed:?}");
    println!("ok: a lost disk is told");
}
