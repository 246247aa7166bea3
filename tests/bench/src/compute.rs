//! The compute agent above the floor: what libvirt itself needs for the same domains, in the same
//! run. Guests are TCG domains that are never let go beyond their firmware.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::config::{ComputeSection, VirtType};
use stackhand_compute::hypervisor::{Hypervisor, QemuAnswer, Question};
use stackhand_compute::libvirt::Libvirt;
use stackhand_model::{Document, InstanceId, ObjectRef};
use stackhand_runtime::agent::{Agent, Cause, Desired, Held, Outcome, Work};
use stackhand_runtime::wake::Wake;
use stackhand_testkit::guest::Libvirtd;
use uuid::Uuid;

use crate::table::Row;

/// Instances that are made at once.
const AT_ONCE: u128 = 20;

/// Instances that are there at the restart. Their processors stand still, so that two hundred of
/// them leave a small machine its own.
const THERE: u128 = 200;

/// How long anything may take before it is given up.
const LIMIT: Duration = Duration::from_secs(900);

/// What each QEMU is asked.
const QUESTIONS: [Question; 2] = [Question::Disks, Question::Memory];

/// QEMUs that are asked at once, as by a pass.
const ASKED_AT_ONCE: usize = 6;

/// Rounds of which the middle one counts.
const ROUNDS: usize = 5;

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let root = tempfile::tempdir()?;
    let libvirtd = Libvirtd::start(&root.path().join("libvirt"));
    let mut bench = Bench::new(root.path(), &libvirtd.uri())?;
    bench.want(
        0,
        "Image",
        &json!({"source": bench.image(root.path())?, "format": "raw"}),
        false,
    )?;
    bench.settle().await?;

    // One, and the same by virsh.
    let (mut created, mut deleted) = (Vec::new(), Vec::new());
    let (mut floor_created, mut floor_deleted) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let id = 1000 + u128::try_from(round)?;
        created.push(bench.make(&[id], "running").await?);
        let xml = libvirtd.virsh(["dumpxml", "--inactive", &uuid(id).to_string()]);
        deleted.push(bench.unmake(&[id]).await?);
        let path = root.path().join("floor.xml");
        let disk = root.path().join("floor.qcow2");
        std::fs::write(&path, floor(&xml, &disk, root.path())?)?;
        let (up, down) = virsh_create(&libvirtd, &path, &disk, root.path())?;
        floor_created.push(up);
        floor_deleted.push(down);
    }
    let (create, floor_create) = (middle(created), middle(floor_created));
    let (delete, floor_delete) = (middle(deleted), middle(floor_deleted));

    // Many at once.
    let ids: Vec<u128> = (2000..2000 + AT_ONCE).collect();
    let many = bench.make(&ids, "running").await?;
    bench.unmake(&ids).await?;

    // A restart with many.
    let ids: Vec<u128> = (3000..3000 + THERE).collect();
    bench.make(&ids, "paused").await?;
    let begun = Instant::now();
    let again = bench.again(root.path(), &libvirtd.uri())?;
    let writes = again.settle().await?;
    let restart = millis(begun);
    ensure!(writes == 0, "a restart wrote {writes} times");
    let (mut passes, mut counts, mut floor_counts) = (Vec::new(), Vec::new(), Vec::new());
    let meter = again.agent.meter();
    // The first has all connections to libvirtd to open.
    meter.pass().await?;
    let mut asked = 0;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let pass = meter.pass().await?;
        passes.push(millis(begun));
        let all = QUESTIONS.len() * ids.len();
        ensure!(pass.all == all, "there are {} questions, not {all}", pass.all);
        asked += pass.asked;

        // Everything of all of them, which no pass asks.
        let begun = Instant::now();
        let hypervisor = again.agent.hypervisor();
        hypervisor.kernel_usage().await?;
        for question in QUESTIONS {
            let answers = stream::iter(&ids)
                .map(|&id| hypervisor.qemu_usage(InstanceId(uuid(id)), question))
                .buffer_unordered(ASKED_AT_ONCE)
                .try_collect::<Vec<_>>();
            let told = |answer: &QemuAnswer| matches!(answer, QemuAnswer::Told(_));
            ensure!(answers.await?.iter().all(told), "a QEMU did not tell: {question:?}");
        }
        counts.push(millis(begun));
        let begun = Instant::now();
        libvirtd.virsh([
            "domstats",
            "--cpu-total",
            "--balloon",
            "--interface",
            "--block",
            "--nowait",
        ]);
        floor_counts.push(millis(begun));
    }
    let pass = middle(passes);
    let (count, floor_count) = (middle(counts), middle(floor_counts));
    drop(again);
    bench.unmake(&ids).await?;

    let at_once = f64::from(u32::try_from(AT_ONCE)?);
    Ok(vec![
        Row::told("virsh create, with qemu-img create", floor_create, "ms"),
        Row::at_most("instance create above virsh create", create - floor_create, "ms", {
            (floor_create * 0.1).max(100.0)
        }),
        Row::at_most(
            "20 creates at once / 20 virsh creates",
            many / (at_once * floor_create),
            "",
            1.3,
        ),
        Row::told("virsh destroy and undefine", floor_delete, "ms"),
        Row::at_most("instance delete / virsh destroy", delete / floor_delete, "", 1.1),
        Row::at_most("restart with 200 domains: in sync", restart, "ms", 3000.0),
        Row::at_most("usage of 200 domains: a pass", pass, "ms", 200.0),
        Row::told("QEMUs of 200 that a pass asks", f64::from(u32::try_from(asked / ROUNDS)?), ""),
        Row::times_at_most(
            "usage with all that 200 QEMUs are asked, against virsh domstats",
            count,
            "ms",
            floor_count,
            1.0,
        ),
    ])
}

struct Bench {
    agent: ComputeAgent<Libvirt>,
    desired: Desired,
}

impl Bench {
    fn new(root: &Path, uri: &str) -> anyhow::Result<Self> {
        let section = ComputeSection {
            libvirt_uri: uri.to_owned(),
            virt_type: VirtType::Qemu,
            // More than settings may say, for so many on a small machine.
            cpu_overcommit_percent: 100_000,
            memory_overcommit_percent: 1000,
            disk_overcommit_percent: 10_000,
            ..ComputeSection::default()
        };
        let libvirt = Libvirt::new(uri, Arc::new(|_| {}))?;
        let agent = ComputeAgent::new("here", &root.join("state"), &section, libvirt, Wake::new());
        Ok(Self { agent, desired: Desired::default() })
    }

    /// The same documents with a new agent.
    fn again(&self, root: &Path, uri: &str) -> anyhow::Result<Self> {
        Ok(Self { desired: self.desired.clone(), ..Self::new(root, uri)? })
    }

    fn image(&self, root: &Path) -> anyhow::Result<String> {
        let path = root.join("image");
        std::fs::write(&path, vec![0xeb; 1 << 20])?;
        Ok(path.display().to_string())
    }

    fn want(&mut self, id: u128, kind: &str, spec: &Value, deleting: bool) -> anyhow::Result<()> {
        let document = Document::from_value(&json!({
            "kind": kind, "id": uuid(id), "name": format!("o{id}"), "generation": 1, "spec": spec,
        }))?;
        let held = Held { document: Arc::new(document), deleting };
        self.desired.objects.insert(held.document.object(), held);
        self.desired.revision += 1;
        Ok(())
    }

    async fn make(&mut self, ids: &[u128], power: &str) -> anyhow::Result<f64> {
        for &id in ids {
            let spec = json!({
                "host": "here", "vcpus": 1, "memory_mib": 32, "image": uuid(0), "vnc": false,
                "power_state": power,
            });
            self.want(id, "Instance", &spec, false)?;
        }
        let begun = Instant::now();
        self.settle().await?;
        Ok(millis(begun))
    }

    async fn unmake(&mut self, ids: &[u128]) -> anyhow::Result<f64> {
        let doomed: BTreeSet<Uuid> = ids.iter().map(|&id| uuid(id)).collect();
        for (object, held) in &mut self.desired.objects {
            held.deleting |= doomed.contains(&object.id);
        }
        let begun = Instant::now();
        self.settle().await?;
        self.desired.objects.retain(|object, _| !doomed.contains(&object.id));
        Ok(millis(begun))
    }

    /// Passes until everything is as it should be; gives the changes that were made.
    async fn settle(&self) -> anyhow::Result<u64> {
        let begun = Instant::now();
        let mut writes = 0;
        loop {
            let due: BTreeSet<ObjectRef> = self.desired.objects.keys().copied().collect();
            let desired = Arc::new(self.desired.clone());
            let report = self.agent.pass(Work { desired, due, cause: Cause::Change }).await;
            writes += report.writes;
            let rests =
                |outcome: &Outcome| matches!(outcome, Outcome::Active { .. } | Outcome::Gone);
            if report.outcomes.values().all(rests) {
                return Ok(writes);
            }
            let restless = report.outcomes.iter().find(|(_, outcome)| !rests(outcome));
            ensure!(begun.elapsed() < LIMIT, "not there within {LIMIT:?}: {restless:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The domain as the agent defines it, with a name, an id and a disk of its own.
fn floor(xml: &str, disk: &Path, root: &Path) -> anyhow::Result<String> {
    let instances = root.join("state/instances");
    const ID: &str = "f1000000-0000-4000-8000-000000000001";
    let mut out = String::new();
    for line in xml.lines() {
        let trimmed = line.trim_start();
        if trimmed.starts_with("<name>") {
            out.push_str("<name>floor</name>");
        } else if trimmed.starts_with("<uuid>") {
            out.push_str(&format!("<uuid>{ID}</uuid>"));
        } else if trimmed.starts_with("<entry name='uuid'>") {
            out.push_str(&format!("<entry name='uuid'>{ID}</entry>"));
        } else if trimmed.starts_with("<source file=")
            && line.contains(&*instances.to_string_lossy())
        {
            out.push_str(&format!("<source file='{}'/>", disk.display()));
        } else if trimmed.starts_with("<log file=") {
            out.push_str(&format!("<log file='{}/floor.log' append='off'/>", root.display()));
        } else if !trimmed.starts_with("<stackhand:") {
            out.push_str(line);
        }
        out.push('\n');
    }
    Ok(out)
}

/// The same by hand: an overlay, a definition and a start; then the end of it.
fn virsh_create(
    libvirtd: &Libvirtd,
    xml: &Path,
    disk: &Path,
    root: &Path,
) -> anyhow::Result<(f64, f64)> {
    let base = std::fs::read_dir(root.join("state/images"))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_none())
        .context("the image is not in the cache")?;
    let begun = Instant::now();
    let (base, path) = (base.display().to_string(), disk.display().to_string());
    stackhand_testkit::guest::run(
        "/usr/bin/qemu-img",
        ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &base, &path, "1M"],
    );
    let xml = xml.display().to_string();
    libvirtd.virsh(["define", &xml]);
    libvirtd.virsh(["start", "floor"]);
    let up = millis(begun);
    let begun = Instant::now();
    libvirtd.virsh(["destroy", "floor"]);
    libvirtd.virsh(["undefine", "floor"]);
    std::fs::remove_file(disk)?;
    Ok((up, millis(begun)))
}

/// Ids whose first eight digits differ.
fn uuid(id: u128) -> Uuid {
    Uuid::from_u128(id << 96 | 1)
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}

fn middle(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}
