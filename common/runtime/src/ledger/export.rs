//! The ledger as JSON, for backups and for looking into it.

use std::path::Path;

use serde_json::{Value, json};
use stackhand_model::AgentKind;

use super::LedgerError;
use super::file::{MIGRATIONS, Store};

/// Reads the ledger in `dir` while no agent runs. Nothing is made where there is none.
///
/// # Errors
///
/// There is no ledger, an agent runs and holds it, or it cannot be read.
pub fn export(dir: &Path, agent: AgentKind, host: &str) -> Result<Value, LedgerError> {
    let path = dir.join("ledger.redb");
    // Opening would make one.
    std::fs::metadata(&path).map_err(|source| LedgerError::io("read", &path, source))?;
    let (_store, contents) = Store::open(dir, agent, host, MIGRATIONS)?;
    let documents: Vec<Value> = contents
        .objects
        .iter()
        .map(|(object, held)| {
            let accepted = contents.accepted.get(object);
            json!({
                "document": held.document.to_value(),
                "deleting": held.deleting,
                "accepted": accepted.map(|it| it.at),
                "request_id": accepted.map(|it| it.request_id.as_ref()),
            })
        })
        .collect();
    Ok(json!({
        "agent": contents.agent,
        "host": contents.host,
        "created": contents.created,
        "revision": contents.revision,
        "control": contents.control,
        "documents": documents,
        "journal": contents.journal,
    }))
}
