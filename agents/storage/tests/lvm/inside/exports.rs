//! The kernel's target, and open-iscsi that logs in to it.

use super::*;

#[test]
#[ignore = "run by `lab` inside a machine"]
fn exports_then_pool() {
    lio();
    pool::fills_up();
}

/// Whether a device gives bytes by itself: this host may keep some in memory, such as while udev has
/// the device open.
fn gives_bytes(device: &Path) -> bool {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let file = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(device);
    file.and_then(|file| file.read_at(&mut Page([0; 4096]).0, 0)).is_ok()
}

fn lio() {
    let runtime = runtime();
    let _in = runtime.enter();
    let thin = backend("thin", Allocation::Thin { pool: "cinder-volumes-pool".into() });
    let lio = Lio::new(Path::new(lio::ROOT), vec!["127.0.0.1:3260".parse().unwrap()]);
    assert!(lio.observe().unwrap().is_empty());
    // Somebody else's target and store stay as they are, whatever happens to ours.
    let (foreign, store) = (
        Path::new("/sys/kernel/config/target/iscsi/iqn.2003-01.org.linux-iscsi:theirs"),
        Path::new("/sys/kernel/config/target/core/fileio_0"),
    );
    fs::create_dir_all(store).unwrap();
    fs::create_dir_all(foreign).unwrap();

    thin.create(vol(1), 512 * MIB).unwrap();
    let disk = path(&thin, vol(1));
    let id = VolumeId(Uuid::from_u128(1));
    let (good, other) = ("passwordpassword", "iqn.2026-11.org.x:other");
    let wanted = target(1, &disk, 512 * MIB, &[(ME, good, false), (other, good, true)]);
    let begin = Instant::now();
    lio.publish(&wanted).unwrap();
    println!("figure: published in {:?}", begin.elapsed());
    let seen = lio.observe().unwrap();
    assert!(wanted.is_met_by(&seen[&id]), "{seen:?}");
    assert!(seen[&id].sessions.is_empty() && seen.len() == 1);
    lio.publish(&wanted).unwrap();

    // A wrong password does not get in, the right one does, and finds the right device.
    let wrong = runtime.block_on(attach::attach(&connection(id, "wrongwrongwrong1"), id));
    assert!(wrong.is_err(), "{wrong:?}");
    runtime.block_on(attach::detach(&connection(id, "wrongwrongwrong1"), id)).unwrap();
    let device = runtime.block_on(attach::attach(&connection(id, good), id)).unwrap();
    assert_eq!(device, runtime.block_on(attach::attach(&connection(id, good), id)).unwrap());
    write(&device, 5, 64);
    assert!(lio.observe().unwrap()[&id].sessions.contains(ME));
    // Nobody can read the password from open-iscsi's records.
    let records = must("find", &["/etc/iscsi/nodes", "-type", "f", "-perm", "/077"]);
    assert_eq!(records, "", "records are for root alone");
    println!("ok: logged in, written");

    // A device that says it is another volume is not handed out.
    let stranger = VolumeId(Uuid::from_u128(99));
    let refused = runtime.block_on(attach::attach(&connection(id, good), stranger));
    assert!(refused.is_err());
    let Connection::Iscsi { iqn, .. } = connection(id, good) else { unreachable!() };
    assert!(iqn.ends_with(&id.to_string()));

    // It grows, and the host sees that.
    thin.extend(vol(1), 768 * MIB).unwrap();
    let size = runtime.block_on(attach::rescan(&connection(id, good), id)).unwrap();
    assert_eq!(size, 768 * MIB);

    // In use: not taken away. Then in the right order, with nothing lost.
    must("mkfs.ext4", &["-q", device.to_str().unwrap()]);
    fs::create_dir_all("/var/tmp/lab/mnt").unwrap();
    must("mount", &[device.to_str().unwrap(), "/var/tmp/lab/mnt"]);
    let busy = runtime.block_on(attach::detach(&connection(id, good), id)).unwrap_err();
    assert!(busy.to_string().contains("is in use"), "{busy}");
    fs::write("/var/tmp/lab/mnt/letter", "hello").unwrap();
    must("umount", &["/var/tmp/lab/mnt"]);
    runtime.block_on(attach::detach(&connection(id, good), id)).unwrap();
    runtime.block_on(attach::detach(&connection(id, good), id)).unwrap();
    assert!(!device.exists());
    assert!(lio.observe().unwrap()[&id].sessions.is_empty());
    // The kernel's target has the volume for itself while it exports it.
    lio.withdraw(id).unwrap();
    must("mount", &["-o", "ro", disk.to_str().unwrap(), "/var/tmp/lab/mnt"]);
    assert_eq!(fs::read_to_string("/var/tmp/lab/mnt/letter").unwrap(), "hello");
    must("umount", &["/var/tmp/lab/mnt"]);
    println!("ok: grown, refused while mounted, detached with all its bytes");

    // Read-only means so; who is no longer admitted is out, under its session.
    let wanted = target(1, &disk, 768 * MIB, &[(ME, good, true)]);
    lio.publish(&wanted).unwrap();
    let device = runtime.block_on(attach::attach(&connection(id, good), id)).unwrap();
    assert!(File::options().write(true).open(&device).is_err(), "writes are refused");
    lio.publish(&target(1, &disk, 768 * MIB, &[(other, good, false)])).unwrap();
    wait_for_sync(Duration::from_secs(20), "the session to end", || {
        lio.observe().unwrap()[&id].sessions.is_empty().then_some(())
    });
    // The kernel's old session may linger on this side; it gives no bytes.
    let attached = runtime.block_on(attach::attach(&connection(id, good), id));
    assert!(attached.is_err() || !gives_bytes(&device));
    let _ended = run("iscsiadm", &["-m", "node", "--logoutall=all"]);
    println!("ok: read-only, and shut out");

    // Cut off anywhere: the next call finishes, and what is taken back is gone.
    let program = std::env::current_exe().unwrap();
    lio.withdraw(id).unwrap();
    lio.withdraw(id).unwrap();
    assert!(lio.observe().unwrap().is_empty());
    let wanted = target(1, &disk, 768 * MIB, &[(ME, good, false)]);
    for step in 0..12 {
        #[expect(clippy::disallowed_methods, reason = "killed by the test")]
        let mut child = std::process::Command::new(&program)
            .args(["--ignored", "--exact", "inside::exports::publish_once"])
            .env("LAB_DISK", &disk)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + step * 8));
        child.kill().unwrap();
        child.wait().unwrap();
        if step % 2 == 0 {
            // As the agent, which tries again: the kernel makes no portal where one still ends.
            wait_for_sync(PATIENCE, "the kernel to take it", || lio.publish(&wanted).ok());
            assert!(wanted.is_met_by(&lio.observe().unwrap()[&id]), "after step {step}");
        }
        lio.withdraw(id).unwrap();
        assert!(lio.observe().unwrap().is_empty(), "after step {step}");
    }
    println!("ok: killed 12 times on the way");
    assert!(foreign.exists() && store.exists(), "what others made is there");
    fs::remove_dir(foreign).unwrap();
    thin.delete(vol(1)).unwrap();
}

#[test]
#[ignore = "run and killed by `lio`"]
fn publish_once() {
    let Some(disk) = std::env::var_os("LAB_DISK") else { return };
    let lio = Lio::new(Path::new(lio::ROOT), vec!["127.0.0.1:3260".parse().unwrap()]);
    let wanted = target(1, Path::new(&disk), 768 * MIB, &[(ME, "passwordpassword", false)]);
    loop {
        lio.publish(&wanted).unwrap();
        lio.withdraw(wanted.volume).unwrap();
    }
}
