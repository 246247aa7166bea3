//! `agentctl man`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory};

use super::Session;
use crate::cli::Cli;
use crate::exit::Exit;

/// Write the manual pages into a folder, one for each command.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  agentctl man /usr/share/man/man1")]
pub(crate) struct Man {
    /// The folder; it must exist
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(args: &Man, _session: &mut Session) -> Result<Exit> {
    clap_mangen::generate_to(Cli::command(), &args.folder)
        .with_context(|| format!("cannot write manual pages to {}", args.folder.display()))?;
    Ok(Exit::Well)
}
