//! The command line that lists and drives Stackhand's agents.
//!
//! `cli` says what can be typed, `commands` has a file for each command, `fleet` reaches the
//! agents, `manifest` turns manifests into what each agent is sent, `console` prints.

mod apply;
mod cli;
mod commands;
mod console;
mod exit;
mod fleet;
mod link;
mod manifest;
mod objects;
mod progress;
mod reference;
mod removal;
mod roster;
mod settings;
mod setup;
mod table;
#[cfg(test)]
mod testing;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::cli::Cli;
use crate::commands::Session;
use crate::console::{Console, Output};
use crate::exit::Exit;
use crate::settings::Settings;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(exit) => exit.into(),
        Err(error) if exit::is_closed_pipe(&error) => Exit::Well.into(),
        Err(error) => {
            let (exit, lines) = exit::explain(&error);
            let mut console = Console::of_process(Output::default());
            for line in lines {
                console.note(&format!("agentctl: {line}"));
            }
            exit.into()
        }
    }
}

fn run(cli: &Cli) -> Result<Exit> {
    let settings = Settings::load(&cli.globals)?;
    let console = Console::of_process(settings.output.value);
    let mut session = Session {
        settings,
        console,
        #[cfg(test)]
        bus: None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let outcome = runtime.block_on(commands::run(&cli.command, &mut session));
    // What is still under way belongs to connections that end with the process.
    runtime.shutdown_background();
    outcome
}
