//! The ledger against a process that is killed, a power cut, a disk that is full, and many callers.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use jiff::Timestamp;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use stackhand_bus::sign::NonceStore;
use stackhand_model::{AgentKind, Document, ErrorCode};
use stackhand_runtime::api::Change;
use stackhand_runtime::ledger::{Admit, Ledger};
use uuid::Uuid;

const FOLDER: &str = "LEDGER_FOLDER";
const ROUND: &str = "LEDGER_ROUND";
const TOLD: &str = "LEDGER_TOLD";

fn admit() -> Admit {
    Arc::new(|_, _| Ok(()))
}

fn open(dir: &Path) -> Ledger {
    Ledger::open(dir, AgentKind::Network, "compute1").unwrap()
}

/// A document of about `bytes` bytes.
fn group(n: u128, generation: u64, bytes: usize) -> Document {
    Document::from_value(&json!({
        "kind": "SecurityGroup", "id": Uuid::from_u128(n), "name": format!("g{n}"),
        "generation": generation, "labels": {"fill": "x".repeat(bytes.min(250))}, "spec": {},
    }))
    .unwrap()
}

/// A port with everything a port usually has.
fn port(n: u128) -> Document {
    Document::from_value(&json!({
        "kind": "Port", "id": Uuid::from_u128(n), "name": format!("port-{n}"),
        "labels": {"cloud": "default", "manifest": "first"},
        "spec": {
            "network": Uuid::from_u128(1), "mac": format!("fa:16:3e:{:02x}:{:02x}:{:02x}", n >> 16 & 255, n >> 8 & 255, n & 255),
            "fixed_ips": [{"subnet": "s", "address": format!("10.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255)}],
            "host": "compute1", "owner": "instance", "security_groups": [Uuid::from_u128(2), Uuid::from_u128(3)],
        },
    }))
    .unwrap()
}

/// Writes for ever and tells each document when it is accepted; the other test kills this.
#[test]
#[ignore = "is the program that another test starts and kills"]
fn writes_until_killed() {
    let dir = PathBuf::from(std::env::var(FOLDER).expect("started by hand"));
    let round: u64 = std::env::var(ROUND).unwrap().parse().unwrap();
    let ledger = open(&dir);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let writers: Vec<_> = (0..8_u128)
            .map(|writer| {
                let ledger = ledger.clone();
                tokio::spawn(async move {
                    for n in 0.. {
                        let object = writer * 1000 + n % 50;
                        let generation = round * 1_000_000 + u64::try_from(n).unwrap();
                        let document = group(object, generation, 200);
                        ledger.apply(vec![document], "req-1", false, admit()).await.unwrap();
                        let mut out = std::io::stdout().lock();
                        writeln!(out, "accepted {object} {generation}").unwrap();
                        out.flush().unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

/// What [`writes_until_killed`] said it had accepted.
#[derive(Default)]
struct Told {
    /// Object → its newest generation.
    newest: BTreeMap<u64, u64>,
    lines: u64,
}

impl Told {
    /// Takes a line of a round. The last one may be torn, and then says less than it was to.
    fn take(&mut self, line: &str, round: u64) {
        let Some(rest) = line.strip_prefix("accepted ") else { return };
        let mut words = rest.split(' ').map(str::parse::<u64>);
        if let (Some(Ok(object)), Some(Ok(generation))) = (words.next(), words.next())
            && generation >= round * 1_000_000
        {
            let newest = self.newest.entry(object).or_insert(0);
            *newest = generation.max(*newest);
            self.lines += 1;
        }
    }

    /// Opens the ledger and looks for all of it.
    fn check(&self, dir: &Path, round: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ledger = open(dir);
        let desired = ledger.desired();
        for (&object, &generation) in &self.newest {
            let id = Uuid::from_u128(object.into());
            let held = desired.objects.iter().find(|(key, _)| key.id == id);
            let held = held.unwrap_or_else(|| panic!("round {round}: {object} is lost")).1;
            assert!(held.document.generation >= generation, "round {round}: {object} went back");
        }
        runtime.block_on(ledger.close());
    }
}

/// Reads the lines that were told in all rounds so far and looks for the documents.
#[test]
#[ignore = "is a program of tests/lab/power-cut"]
fn holds_what_was_told() {
    let round: u64 = std::env::var(ROUND).unwrap().parse().unwrap();
    let folder = PathBuf::from(std::env::var(TOLD).unwrap());
    let mut told = Told::default();
    for past in 1..=round {
        let text = std::fs::read_to_string(folder.join(past.to_string())).unwrap();
        text.lines().for_each(|line| told.take(line, past));
    }
    assert!(told.lines >= round * 50, "only {} documents were written", told.lines);
    told.check(&PathBuf::from(std::env::var(FOLDER).unwrap()), round);
    println!("{} documents told, all there", told.lines);
}

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    #[test]
    fn every_document_that_was_answered_for_is_there_after_the_power_was_cut() {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/lab");
        let program = std::env::current_exe().unwrap();
        #[expect(clippy::disallowed_methods, reason = "the script keeps a time limit of its own")]
        let output = Command::new(lab.join("run"))
            .args(["--time-limit", "240", "--", "bash"])
            .args([&lab.canonicalize().unwrap().join("power-cut"), &program])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{said}\n{failed}", output.status);
        assert_eq!(said.matches("all there").count(), 3, "{said}");
    }
}

#[test]
fn every_document_that_was_answered_for_is_there_after_kill_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut told = Told::default();
    for round in 1..=12_u64 {
        #[expect(clippy::disallowed_methods, reason = "a test that starts itself")]
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writes_until_killed", "--ignored", "--nocapture"])
            .env(FOLDER, dir.path())
            .env(ROUND, round.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Another moment each round: after so many lines, somewhere in a commit.
        for _ in 0..20 + round * 37 {
            told.take(&lines.next().expect("the writer ended by itself").unwrap(), round);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            told.take(&line, round);
        }
        told.check(dir.path(), round);
    }
    assert!(told.lines > 3000, "only {} documents were written", told.lines);
}

/// A file system of 8 MiB, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = Some("size=8m");
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), size)
            .expect("this test mounts a tmpfs: run it as root");
        Self(dir)
    }

    fn fill(&self) -> PathBuf {
        let path = self.0.path().join("fill");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [65536, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The folder is removed next; a mount left over would be worse than this panic's silence.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_refuses_and_loses_nothing_and_all_is_well_when_there_is_room() {
    let disk = SmallDisk::new();
    let dir = disk.0.path().join("state");
    let ledger = open(&dir);
    let apply = async |n: u128, generation| {
        ledger.apply(vec![group(n, generation, 200)], "req-1", false, admit()).await
    };
    for n in 0..20 {
        apply(n, 1).await.unwrap();
    }
    let fill = disk.fill();
    let mut accepted = 20_u128;
    let refused = loop {
        // A store has some room within its file.
        let documents = (0..200).map(|n| group(accepted * 1000 + n, 1, 250)).collect();
        match ledger.apply(documents, "req-1", false, admit()).await {
            Ok(_) => accepted += 1,
            Err(refused) => break refused,
        }
        assert!(accepted < 2000, "the disk never got full");
    };
    assert_eq!(refused.code, ErrorCode::Exhausted, "{refused}");
    assert!(refused.message.contains("free space"), "{refused}");
    let held = ledger.desired().objects.len();
    for _ in 0..3 {
        let documents = (0..200).map(|n| group(900_000 + n, 1, 250)).collect();
        let refused = ledger.apply(documents, "req-1", false, admit()).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Exhausted, "{refused}");
    }
    let dry = ledger.apply(vec![group(0, 1, 200)], "req-1", true, admit()).await.unwrap();
    assert_eq!(dry.objects[0].change, Change::Unchanged, "the agent still answers");
    assert_eq!(ledger.desired().objects.len(), held);
    // Enough of them that they do not fit into the room within the file.
    for n in 0..1000 {
        assert!(ledger.nonces().remember(&format!("{n:04000}"), Timestamp::MAX).await.unwrap());
    }
    let unwritten = ledger.written().await.unwrap_err();
    assert_eq!(unwritten.code, ErrorCode::Exhausted, "{unwritten}");

    std::fs::remove_file(fill).unwrap();
    apply(7, 2).await.unwrap();
    ledger.written().await.unwrap();
    ledger.close().await;
    let ledger = open(&dir);
    assert_eq!(ledger.desired().objects.len(), held);
    assert_eq!(ledger.nonces().len(), 1000, "kept until there was room");
    ledger.close().await;
}

#[tokio::test]
async fn ten_thousand_documents_and_as_many_requests_at_once_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let documents: Vec<_> = (0..10_000).map(port).collect();
    let applied = ledger.apply(documents, "req-1", false, admit()).await.unwrap();
    assert_eq!(applied.objects.len(), 10_000);

    let callers: Vec<_> = (0..64_u128)
        .map(|caller| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                for n in 0..156 {
                    let document = group(caller * 1000 + n, 1, 200);
                    ledger.apply(vec![document], "req-1", false, admit()).await.unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    ledger.close().await;

    let ledger = open(dir.path());
    assert_eq!(ledger.desired().objects.len(), 10_000 + 64 * 156);
    let objects: Vec<_> =
        (0..9984).map(|n| group(n / 156 * 1000 + n % 156, 1, 0).object()).collect();
    ledger.delete(objects.clone(), "req-1", admit()).await.unwrap();
    ledger.forget(objects).await.unwrap();
    ledger.close().await;

    let ledger = open(dir.path());
    assert_eq!(ledger.desired().objects.len(), 10_000);
    ledger.close().await;
}
