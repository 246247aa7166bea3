//! Thin volumes.

use super::*;

#[test]
#[ignore = "run by `lab` inside a machine"]
fn thin() {
    let runtime = runtime();
    let _in = runtime.enter();
    let thin = backend("thin", Allocation::Thin { pool: "cinder-volumes-pool".into() });
    // The textbook: a volume of 1 GB, demo-v1, in cinder-volumes.
    let demo_v1 = vol(1);
    thin.create(demo_v1, 1024 * MIB).unwrap();
    thin.create(demo_v1, 1024 * MIB).unwrap();
    let device = path(&thin, demo_v1);
    assert_eq!(device, Path::new("/dev/cinder-volumes").join(demo_v1.to_string()));
    assert_eq!(filled(&device, 8), Some(0), "a new volume reads as zeroes");
    write(&device, 1, 8);

    thin.clone_item(snap(20), demo_v1, 0).unwrap();
    write(&device, 2, 8);
    thin.clone_item(vol(2), snap(20), 1536 * MIB).unwrap();
    assert_eq!(filled(&path(&thin, snap(20)), 8), Some(1));
    assert_eq!(filled(&path(&thin, vol(2)), 8), Some(1));
    let observed = thin.observe().unwrap();
    assert_eq!(observed.items[&vol(2)].bytes, 1536 * MIB);
    assert!(observed.items[&demo_v1].shared && observed.fill.unwrap().data > 0);
    println!("ok: snapshot and clone keep what they had");

    // Grown and kept while somebody has it open.
    let open = File::open(&device).unwrap();
    thin.extend(demo_v1, 1280 * MIB).unwrap();
    let seen = thin.observe().unwrap().items.remove(&demo_v1).unwrap();
    assert_eq!((seen.bytes, seen.usage), (1280 * MIB, Usage::Written));
    let error = thin.delete(demo_v1).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    let error = thin.revert(demo_v1, snap(20), &Progress::default()).unwrap_err();
    assert!(matches!(error, BackendError::InUse { .. }), "{error}");
    drop(open);
    println!("ok: grown under use, and nothing worse done to it");

    thin.revert(demo_v1, snap(20), &Progress::default()).unwrap();
    assert_eq!(filled(&device, 8), Some(1));
    let seen = thin.observe().unwrap().items.remove(&demo_v1).unwrap();
    assert_eq!(seen.bytes, 1280 * MIB, "a volume that is set back keeps its size");
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
    thin.revert(demo_v1, snap(20), &Progress::default()).unwrap();
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
}
