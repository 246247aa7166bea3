//! `agentctl completion`.

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Session;
use crate::cli::Cli;
use crate::exit::Exit;

/// Print a completion script for a shell.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl completion bash > /etc/bash_completion.d/agentctl
  agentctl completion zsh > ~/.zfunc/_agentctl")]
pub(crate) struct Completion {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Completion, session: &mut Session) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "agentctl", &mut script);
    session.console.text(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Well)
}
