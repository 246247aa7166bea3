//! The storage agent: clones by reflink and a restart with many volumes here; volumes of LVM by
//! the kernel's target in a machine of the lab, above the bare commands that make the same.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stackhand_attach as attach;
use stackhand_bus::local::LocalTransport;
use stackhand_model::{AgentKind, Connection, Document, IscsiClient, ObjectRef, Secret, VolumeId};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::AgentClient;
use stackhand_storage::export::lio::{self, Lio};
use stackhand_storage::export::{Admission, Exporter, Target, target_name};
use stackhand_testkit::{Spawned, bin};
use uuid::Uuid;

use crate::table::Row;

/// Volumes at the restart.
const VOLUMES: u128 = 200;

/// Rounds of which the middle one counts.
const ROUNDS: u128 = 5;

const LIMIT: Duration = Duration::from_secs(120);

/// The machine's initiator, see `tests/lvm/prepare` of the agent.
const ME: &str = "iqn.2026-11.org.x:lab";

/// What was measured inside the machine, in milliseconds.
#[derive(Debug, Serialize, Deserialize)]
struct Inside {
    by_agent: f64,
    by_hand: f64,
    deleted: f64,
    bare_delete: f64,
}

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let mut rows = here().await?;
    let results = tempfile::tempdir()?;
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let arguments = ["--memory", "6144", "--time-limit", "540", "--results"].map(PathBuf::from);
    let mut machine = Spawned::start(
        top.join("tests/lab/run"),
        arguments.into_iter().chain([
            results.path().to_owned(),
            "--".into(),
            top.join("agents/storage/tests/lvm/prepare"),
            std::env::current_exe()?,
            "storage-inside".into(),
            "/lab/results/figures".into(),
        ]),
    );
    let status = machine.wait(Duration::from_secs(600));
    ensure!(status.success(), "the machine failed:\n{}", machine.output());
    let figures = std::fs::read(results.path().join("figures"))?;
    let inside: Inside = serde_json::from_slice(&figures)?;
    rows.extend([
        Row::times_at_most(
            "LVM thin, in the lab: create, export, attach",
            inside.by_agent,
            "ms",
            inside.by_hand,
            1.2,
        ),
        Row::at_most("LVM thin, in the lab: delete of 50 GiB", inside.deleted, "ms", 1000.0),
        Row::told("lvremove of the same", inside.bare_delete, "ms"),
    ]);
    Ok(rows)
}

/// An agent with its folders.
struct Agent {
    process: Spawned,
    folder: PathBuf,
}

impl Agent {
    fn start(folder: &Path, settings: &str) -> anyhow::Result<Self> {
        let etc = folder.join("etc");
        std::fs::create_dir_all(&etc)?;
        let common = format!(
            "host = \"here\"\nstate_dir = {:?}\nrun_dir = {:?}\n{settings}",
            folder.join("state"),
            folder.join("run")
        );
        std::fs::write(etc.join("stackhand.toml"), common)?;
        let program = bin(AgentKind::Storage.binary());
        let process = Spawned::start(program, [Path::new("--config-dir"), &etc]);
        Ok(Self { process, folder: folder.to_owned() })
    }

    async fn client(&mut self) -> AgentClient {
        self.process.wait_for_output(LIMIT, "ready");
        let socket = self.folder.join("run/storage.sock");
        AgentClient::new(Arc::new(LocalTransport::connect(socket)), AgentKind::Storage, "here")
    }
}

/// Has documents applied, and waits until all is as they say.
async fn make(client: &AgentClient, documents: &[Document]) -> anyhow::Result<f64> {
    let begun = Instant::now();
    client.apply(documents).await?;
    let objects: Vec<ObjectRef> = documents.iter().map(Document::object).collect();
    client.wait(&objects, Condition::Active, LIMIT).await?;
    Ok(millis(begun))
}

async fn remove(client: &AgentClient, objects: &[ObjectRef]) -> anyhow::Result<f64> {
    let begun = Instant::now();
    client.delete(objects).await?;
    client.wait(objects, Condition::Gone, LIMIT).await?;
    Ok(millis(begun))
}

/// What needs nothing that this host's kernel may lack.
async fn here() -> anyhow::Result<Vec<Row>> {
    let root = tempfile::tempdir()?;
    let disk = Xfs::make(root.path())?;
    let settings = format!(
        "[storage]\ndefault_backend = \"fast\"\n[storage.backends.fast]\npath = {:?}\n\
         overcommit_percent = 10000\n",
        disk.0
    );
    let mut agent = Agent::start(root.path(), &settings)?;
    let client = agent.client().await;
    make(&client, &[volume(1, 1, &Value::Null)?]).await?;
    let original = disk.0.join(format!("volume-{}", uuid(1)));
    std::fs::write(&original, vec![7; 512 << 20])?;
    std::fs::File::options().write(true).open(&original)?.set_len(1 << 30)?;
    let (mut clones, mut floors) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let source = json!({"volume": uuid(1)});
        clones.push(make(&client, &[volume(10 + round, 1, &source)?]).await?);
        let copy = disk.0.join(format!("floor-{round}"));
        let begun = Instant::now();
        must("cp", &["--reflink=always", &text(&original), &text(&copy)])?;
        floors.push(millis(begun));
    }
    let many: Vec<Document> =
        (0..VOLUMES).map(|id| volume(1000 + id, 1, &Value::Null)).collect::<Result<_, _>>()?;
    make(&client, &many).await?;
    agent.process.kill();
    let begun = Instant::now();
    let mut agent = Agent::start(root.path(), &settings)?;
    let said = agent.process.wait_for_output(LIMIT, "first look at the backends is done");
    let restart = millis(begun);
    ensure!(said.contains("steps=0"), "a restart wrote:\n{said}");
    let rss = crate::agents::status_mib(agent.process.pid(), "VmRSS:")?;
    agent.process.terminate(LIMIT);
    Ok(vec![
        Row::at_most("clone of 512 MiB by reflink: asked, made, told", middle(clones), "ms", 100.0),
        Row::told("cp --reflink of the same", middle(floors), "ms"),
        Row::at_most("restart with 200 volumes: in sync, 0 writes", restart, "ms", 3000.0),
        Row::told("memory with 200 volumes (RSS)", rss, "MiB"),
    ])
}

/// Measures inside the machine, and leaves the figures in a file.
pub(crate) async fn inside(figures: &Path) -> anyhow::Result<()> {
    let root = tempfile::tempdir()?;
    let settings = "[storage]\ndefault_backend = \"thin\"\n[storage.export]\ntype = \"lio\"\n\
                    portals = [\"127.0.0.1:3260\"]\n[storage.backends.thin]\ntype = \"lvm-thin\"\n\
                    volume_group = \"cinder-volumes\"\novercommit_percent = 10000\n";
    let mut agent = Agent::start(root.path(), settings)?;
    let client = agent.client().await;
    let (mut by_agent, mut by_hand) = (Vec::new(), Vec::new());
    // The first round warms what the kernel and the disk cache keep.
    for round in 0..=ROUNDS {
        let (hand, ours) = (hand(100 + round).await?, ours(&client, 200 + round).await?);
        if round > 0 {
            by_hand.push(hand);
            by_agent.push(ours);
        }
    }
    let large = volume(300, 50, &Value::Null)?;
    make(&client, std::slice::from_ref(&large)).await?;
    write_some(300)?;
    let deleted = remove(&client, &[large.object()]).await?;
    lvcreate(301, "50g")?;
    write_some(301)?;
    let begun = Instant::now();
    must("lvremove", &["-qq", "-f", &format!("cinder-volumes/{}", name(301))])?;
    let bare_delete = millis(begun);
    let inside =
        Inside { by_agent: middle(by_agent), by_hand: middle(by_hand), deleted, bare_delete };
    std::fs::write(figures, serde_json::to_vec(&inside)?)?;
    agent.process.terminate(LIMIT);
    Ok(())
}

/// A volume of 1 GiB made, exported and attached by the commands alone. The target is written
/// straight to the kernel, which is faster than any program that does it.
async fn hand(id: u128) -> anyhow::Result<f64> {
    let (volume, password) = (VolumeId(uuid(id)), Secret("passwordpassword".into()));
    let begun = Instant::now();
    lvcreate(id, "1g")?;
    let path = device(id);
    let admission =
        Admission { user: "sh-user".into(), password: password.clone(), read_only: false };
    let admitted = [(ME.to_owned(), admission)].into();
    let target = Target { volume, path, bytes: 1 << 30, is_device: true, admitted };
    let lio = Lio::new(Path::new(lio::ROOT), vec!["127.0.0.1:3260".parse()?]);
    lio.publish(&target)?;
    let connection = Connection::Iscsi {
        portal: "127.0.0.1:3260".into(),
        iqn: target_name(volume),
        lun: 0,
        initiator: Some(ME.into()),
        client: IscsiClient::Host,
        username: Some("sh-user".into()),
        password: Some(password),
    };
    attach::attach(&connection, volume).await?;
    let took = millis(begun);
    attach::detach(&connection, volume).await?;
    lio.withdraw(volume)?;
    must("lvremove", &["-qq", "-f", &format!("cinder-volumes/{}", name(id))])?;
    Ok(took)
}

/// The same by the agent.
async fn ours(client: &AgentClient, id: u128) -> anyhow::Result<f64> {
    let connector = json!({"host": "there", "initiator": ME, "client": "host"});
    let spec = json!({"volume": uuid(id), "connector": connector});
    let (disk, link) = (volume(id, 1, &Value::Null)?, document("Attachment", id + 500, &spec)?);
    let objects = [link.object(), disk.object()];
    let begun = Instant::now();
    make(client, &[disk, link]).await?;
    let entries = client.get(None, Some(&[objects[0].id])).await?;
    let told = entries.first().context("no attachment")?.status.observed["connection"].clone();
    let connection: Connection = serde_json::from_value(told)?;
    attach::attach(&connection, VolumeId(uuid(id))).await?;
    let took = millis(begun);
    attach::detach(&connection, VolumeId(uuid(id))).await?;
    remove(client, &objects).await?;
    Ok(took)
}

fn lvcreate(id: u128, size: &str) -> anyhow::Result<()> {
    let pool = "cinder-volumes/cinder-volumes-pool";
    must("lvcreate", &["-qq", "-Wn", "-V", size, "-T", pool, "-n", &name(id)])
}

fn write_some(id: u128) -> anyhow::Result<()> {
    let to = format!("of={}", text(&device(id)));
    must("dd", &["if=/dev/zero", &to, "bs=1M", "count=256", "conv=fsync", "status=none"])
}

fn device(id: u128) -> PathBuf {
    Path::new("/dev/cinder-volumes").join(name(id))
}

fn name(id: u128) -> String {
    format!("volume-{}", uuid(id))
}

/// An XFS file system in a file, unmounted when dropped.
struct Xfs(PathBuf);

impl Xfs {
    fn make(root: &Path) -> anyhow::Result<Self> {
        let (image, folder) = (root.join("image"), root.join("xfs"));
        std::fs::File::create(&image)?.set_len(8 << 30)?;
        std::fs::create_dir(&folder)?;
        must("/usr/sbin/mkfs.xfs", &["-q", &text(&image)])?;
        must("/usr/bin/mount", &["-o", "loop", &text(&image), &text(&folder)])?;
        Ok(Self(folder))
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Nothing can be done about a file system that stays.
        let _stays = must("/usr/bin/umount", &["--lazy", &text(&self.0)]);
    }
}

fn volume(id: u128, size: u64, source: &Value) -> anyhow::Result<Document> {
    let mut spec = json!({"host": "here", "size_gib": size});
    if !source.is_null() {
        spec["source"] = source.clone();
    }
    document("Volume", id, &spec)
}

fn document(kind: &str, id: u128, spec: &Value) -> anyhow::Result<Document> {
    Ok(Document::from_value(&json!({
        "kind": kind, "id": uuid(id), "name": format!("o{id}"), "generation": 1, "spec": spec,
    }))?)
}

fn uuid(id: u128) -> Uuid {
    Uuid::from_u128(id)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn must(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "a measurement, ended by its machine")]
    let output = Command::new(program).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {said}");
    Ok(())
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}

fn middle(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}
