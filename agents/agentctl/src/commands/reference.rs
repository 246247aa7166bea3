//! `agentctl reference`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory};

use super::Session;
use crate::cli::Cli;
use crate::exit::Exit;
use crate::reference::{commands, documents};

/// Write the reference of documents and commands into a folder, as Markdown.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  agentctl reference docs/reference")]
pub(crate) struct Reference {
    /// The folder; it must exist
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(args: &Reference, _session: &mut Session) -> Result<Exit> {
    let pages = [("documents.md", documents()), ("commands.md", commands(Cli::command()))];
    for (name, text) in pages {
        let path = args.folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Exit::Well)
}
