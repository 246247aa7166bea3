//! `agentctl export`.

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use stackhand_model::{Document, Kind, Labels, Spec};
use uuid::Uuid;

use super::Session;
use crate::console::Output;
use crate::exit::Exit;
use crate::fleet::Filter;
use crate::objects;

/// Write what the agents hold as a manifest.
///
/// Complete documents with their ids, so that applying them elsewhere gives the same objects.
/// Generations are left out: whoever applies counts its own. The manifest may hold secrets that
/// the documents hold, such as CHAP passwords.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl export > cloud.yaml
  agentctl export --kind network --kind port -o json")]
pub(crate) struct Export {
    /// Only documents of this kind; may be repeated
    #[arg(long = "kind", value_name = "KIND")]
    kinds: Vec<Kind>,
    #[command(flatten)]
    filter: Filter,
}

pub(crate) async fn run(args: &Export, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let all = objects::gather_all(&fleet, &args.filter).await?;
    fleet.close().await;
    let documents: Vec<Document> = all
        .held
        .world()
        .into_iter()
        .filter(|(object, _)| args.kinds.is_empty() || args.kinds.contains(&object.kind))
        .map(|(_, document)| document)
        .collect();
    for silent in &all.silent {
        session.console.note(&format!("agentctl: what it holds is missing: {silent}"));
    }
    let values: Vec<ManifestForm<'_>> = documents.iter().map(manifest_form).collect();
    if session.console.output() == Output::Json {
        session.console.print_tree(&values)?;
    } else {
        let mut text = String::new();
        for value in &values {
            text.push_str("---\n");
            text.push_str(&serde_saphyr::to_string(value)?);
        }
        session.console.text(&text)?;
    }
    Ok(if all.silent.is_empty() { Exit::Well } else { Exit::NotWell })
}

/// A document as a manifest writes it.
#[derive(Serialize)]
struct ManifestForm<'a> {
    kind: Kind,
    name: &'a str,
    id: Uuid,
    #[serde(skip_serializing_if = "Labels::is_empty")]
    labels: &'a Labels,
    spec: &'a Spec,
}

fn manifest_form(document: &Document) -> ManifestForm<'_> {
    let Document { id, name, labels, spec, .. } = document;
    ManifestForm { kind: spec.kind(), name: name.as_str(), id: *id, labels, spec }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_reads_back_as_the_same_document() {
        let text = "kind: SecurityGroup\nname: ssh\nspec: {rules: [{direction: ingress, protocol: tcp, port_range_min: 22, port_range_max: 22}]}";
        let mut document = stackhand_model::parse("m", text, "default").unwrap().remove(0);
        let written = serde_saphyr::to_string(&manifest_form(&document)).unwrap();
        let read = stackhand_model::parse("m", &written, "other").unwrap().remove(0);
        document.generation = 0;
        assert_eq!(read, document);
    }
}
