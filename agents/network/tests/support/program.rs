//! The network agent's program, with settings, a ledger and a socket of its own.

#![allow(dead_code, reason = "each test file uses its share")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stackhand_bus::local::LocalTransport;
use stackhand_kernel::exec;
use stackhand_model::{AgentKind, Document};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::AgentClient;
use stackhand_testkit::{Spawned, bin, wait_for};

use super::support::Documents;

/// The program with a folder of its own, which outlives it.
pub(crate) struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// One with settings of its own.
    pub(crate) fn with(more: &str) -> Self {
        // Short, because a socket's path has at most 107 bytes.
        let folder = tempfile::Builder::new().prefix("shn-").tempdir_in("/tmp").unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["etc", "state", "run"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let settings = format!(
            "host = \"one\"\nstate_dir = {:?}\nrun_dir = {:?}\n{more}",
            at("state"),
            at("run")
        );
        std::fs::write(at("etc/network.toml"), settings).unwrap();
        Self { folder }
    }

    /// Starts it in the calling thread's namespaces.
    pub(crate) fn start(&self) -> Spawned {
        let etc = self.folder.path().join("etc");
        Spawned::start(bin("network-agent"), [Path::new("--config-dir"), &etc])
    }

    /// Gives the host back by its command line. Returns what it says, or why it does not.
    pub(crate) async fn release(&self) -> Result<String, String> {
        let etc = self.folder.path().join("etc");
        let program = exec::Program::new(bin("network-agent"));
        let released = program.arg("--config-dir").arg(etc.display().to_string()).arg("--release");
        released.run().await.map(|it| it.text()).map_err(|error| error.to_string())
    }

    pub(crate) fn client(&self) -> AgentClient {
        let socket = self.folder.path().join("run/network.sock");
        let transport = LocalTransport::connect(socket);
        AgentClient::new(Arc::new(transport), AgentKind::Network, "one")
    }

    /// Waits until it has looked at everything.
    pub(crate) async fn ready(&self) {
        wait_for(Duration::from_secs(30), "the agent to answer", || async {
            self.client().ping().await.ok().map(drop)
        })
        .await;
    }

    /// Hands it documents and waits until all are active.
    pub(crate) async fn apply(&self, documents: &Documents) {
        self.ready().await;
        let desired = documents.desired();
        let all: Vec<Document> =
            desired.objects.values().map(|held| held.document.as_ref().clone()).collect();
        self.client().apply(&all).await.unwrap();
        self.all_active(documents).await;
    }

    pub(crate) async fn all_active(&self, documents: &Documents) {
        let objects: Vec<_> = documents.desired().objects.keys().copied().collect();
        let limit = Duration::from_secs(30);
        let settled = self.client().wait(&objects, Condition::Active, limit).await.unwrap();
        assert_eq!(settled.len(), objects.len());
    }

    /// Changes that it has made to the kernel since it started.
    pub(crate) async fn writes(&self) -> u64 {
        self.client().facts().await.unwrap()["writes"].as_u64().unwrap()
    }
}
