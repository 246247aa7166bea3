//! The ledger: 10,000 documents in, each batch on disk before it is answered; then opened again.

use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use serde_json::json;
use stackhand_model::{AgentKind, Document, Kind, id_from_name};
use stackhand_runtime::ledger::Ledger;

use crate::table::Row;

/// Documents in all.
const DOCUMENTS: usize = 10_000;

/// Documents in one request, as a controller sends a host's share of a manifest.
const BATCH: usize = 100;

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let folder = tempfile::tempdir()?;
    let documents = (0..DOCUMENTS).map(port).collect::<anyhow::Result<Vec<_>>>()?;
    let ledger = Ledger::open(folder.path(), AgentKind::Network, "bench")?;
    let begun = Instant::now();
    for batch in documents.chunks(BATCH) {
        ledger.apply(batch.to_vec(), "req-bench", false, Arc::new(|_, _| Ok(()))).await?;
    }
    let applied = begun.elapsed().as_secs_f64();
    ledger.close().await;
    drop(ledger);

    let begun = Instant::now();
    let ledger = Ledger::open(folder.path(), AgentKind::Network, "bench")?;
    let reopened = begun.elapsed().as_secs_f64() * 1000.0;
    ensure!(ledger.desired().objects.len() == DOCUMENTS, "documents are missing");
    ledger.close().await;
    Ok(vec![
        Row::at_most("ledger: 10,000 documents applied", applied, "s", 2.0),
        Row::at_most("ledger: opened again", reopened, "ms", 200.0),
    ])
}

fn port(number: usize) -> anyhow::Result<Document> {
    let name = format!("port-{number}");
    let [_, _, a, b] = u32::try_from(number)?.to_be_bytes();
    Ok(Document::from_value(&json!({
        "kind": "Port",
        "id": id_from_name("bench", Kind::Port, &name),
        "name": name,
        "generation": 1,
        "spec": {
            "network": id_from_name("bench", Kind::Network, "int1"),
            "mac": format!("fa:16:3e:00:{a:02x}:{b:02x}"),
            "fixed_ips": [{"subnet": "subint1", "address": format!("10.1.{a}.{b}")}],
            "host": "bench",
            "security_groups": [id_from_name("bench", Kind::SecurityGroup, "default")],
        },
    }))?)
}
