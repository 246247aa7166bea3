//! A host with a network agent, in namespaces of its own, and the documents that it is given.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use stackhand_bus::local::LocalTransport;
use stackhand_kernel::exec::Program;
use stackhand_model::{AgentKind, Document, ObjectRef};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::AgentClient;
use stackhand_testkit::{Spawned, bin, on_a_host};
use uuid::Uuid;

use crate::table::Row;

/// Runs a measurement on a thread whose network and `/run` are its own.
pub(crate) async fn on_hosts(
    measure: impl AsyncFnOnce() -> anyhow::Result<Vec<Row>> + Send + 'static,
) -> anyhow::Result<Vec<Row>> {
    let found = Arc::new(Mutex::new(None));
    let result = Arc::clone(&found);
    let measured = tokio::task::spawn_blocking(move || {
        on_a_host(|| async move {
            let rows = measure().await;
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(rows);
        });
    });
    measured.await?;
    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
    found.take().context("namespaces cannot be made; be root")?
}

/// A host's folders and settings; they outlive its agent.
pub(crate) struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("shb-").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        for name in ["etc", "state", "run"] {
            std::fs::create_dir(at(name))?;
        }
        let settings =
            format!("host = \"one\"\nstate_dir = {:?}\nrun_dir = {:?}\n", at("state"), at("run"));
        std::fs::write(at("etc/network.toml"), settings)?;
        Ok(Self { folder })
    }

    /// Starts the agent in the calling thread's namespaces.
    pub(crate) fn start(&self) -> Spawned {
        let etc = self.folder.path().join("etc");
        Spawned::start(bin(AgentKind::Network.binary()), [Path::new("--config-dir"), &etc])
    }

    /// Kills the agent and starts another. Gives it, the seconds until it was in sync and had nothing
    /// left to do, and how often it wrote to the kernel.
    pub(crate) async fn restart(&self, mut agent: Spawned) -> anyhow::Result<(Spawned, f64, f64)> {
        agent.kill();
        let begun = Instant::now();
        let agent = self.start();
        self.ready().await?;
        // Answered after the first pass, and looks by itself.
        let left = self.client().plan(&[], &[]).await?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(left.steps.is_empty(), "the restarted agent would do {} things", left.steps.len());
        let writes = self.client().facts().await?["writes"].as_f64().unwrap_or(f64::NAN);
        Ok((agent, took, writes))
    }

    pub(crate) fn client(&self) -> AgentClient {
        let transport = LocalTransport::connect(self.folder.path().join("run/network.sock"));
        let client = AgentClient::new(Arc::new(transport), AgentKind::Network, "one");
        client.with_limit(Duration::from_secs(120))
    }

    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while let Err(error) = self.client().ping().await {
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "the agent does not answer: {error}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    pub(crate) async fn apply(&self, documents: &[Document]) -> anyhow::Result<()> {
        self.client().apply(documents).await?;
        self.active(documents).await
    }

    pub(crate) async fn active(&self, documents: &[Document]) -> anyhow::Result<()> {
        let objects: Vec<ObjectRef> = documents.iter().map(Document::object).collect();
        self.client().wait(&objects, Condition::Active, Duration::from_secs(100)).await?;
        Ok(())
    }
}

pub(crate) fn document(kind: &str, name: &str, id: Uuid, spec: &Value) -> anyhow::Result<Document> {
    let value = json!({"kind": kind, "id": id, "name": name, "generation": 1, "spec": spec});
    Ok(Document::from_value(&value)?)
}

pub(crate) fn port(net: Uuid, number: u128, host: &str) -> Value {
    json!({"network": net, "host": host, "mac": mac(number), "port_security": false})
}

/// The eleven characters that make names differ are the first of the id.
pub(crate) fn port_id(number: u128) -> Uuid {
    Uuid::from_u128(number << 96 | 0xaa << 120)
}

pub(crate) fn mac(number: u128) -> String {
    let [.., a, b] = number.to_be_bytes();
    format!("fa:16:3e:00:{a:02x}:{b:02x}")
}

pub(crate) fn address(number: u128) -> String {
    let [.., a, b] = number.to_be_bytes();
    format!("10.7.{a}.{b}")
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

pub(crate) async fn tool(name: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let path = ["/usr/sbin", "/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(name));
    let path = path.into_iter().find(|path| path.exists()).context(format!("no program {name}"))?;
    let program = Program::new(path).args(arguments.iter().copied()).stdin(input);
    Ok(program.limit(Duration::from_secs(120)).run().await?.text())
}
