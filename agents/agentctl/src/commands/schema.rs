//! `agentctl schema`.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};
use stackhand_model::{Kind, schema};

use super::Session;
use crate::console::Output;
use crate::exit::Exit;

/// Print the JSON Schema of documents: of one kind, or of all by name.
///
/// In manifests `id` may be left out, and names may stand for ids.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl schema Port
  agentctl schema > stackhand.schema.json")]
pub(crate) struct Schema {
    /// The kind of document
    kind: Option<Kind>,
}

pub(crate) fn run(args: &Schema, session: &mut Session) -> Result<Exit> {
    let value = match args.kind {
        Some(kind) => schema(kind),
        None => Kind::ALL
            .into_iter()
            .map(|kind| (kind.as_str().to_owned(), schema(kind)))
            .collect::<Map<String, Value>>()
            .into(),
    };
    match session.console.output() {
        Output::Yaml => session.console.print_tree(&value)?,
        // A schema is JSON, whatever tables look like.
        _ => session.console.text(&format!("{value:#}\n"))?,
    }
    Ok(Exit::Well)
}
