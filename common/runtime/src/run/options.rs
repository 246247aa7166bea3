//! The command line that all agents share.

use std::ffi::OsString;

use clap::{Args, Command, FromArgMatches, ValueEnum};
use stackhand_model::AgentKind;

use crate::config::ConfigArgs;
use crate::preflight;

/// What an agent can be asked to do at its start.
#[derive(Clone, Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    pub(super) config: ConfigArgs,
    /// Look whether this host is fit for the agent, tell what is to be done, and exit: 0 if it
    /// is fit, 1 if not
    #[arg(long)]
    pub(super) preflight: bool,
    /// Form of the findings
    #[arg(short, long, value_enum, default_value_t = Output::Table, requires = "preflight")]
    output: Output,
    /// Print everything in the ledger as JSON and exit; the agent must not be running
    #[arg(long, conflicts_with = "preflight")]
    pub(super) export_ledger: bool,
    /// Take this agent's marks from what it made, leave everything running, and exit: what was its
    /// own is then anybody's. The agent must not be running
    #[arg(long, conflicts_with_all = ["preflight", "export_ledger"])]
    pub(super) release: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// The command line of an agent's program, for man pages and completions too.
#[must_use]
pub fn command(agent: AgentKind, version: &'static str) -> Command {
    let about = match agent {
        AgentKind::Compute => "Runs instances on this host, as controllers ask for them",
        AgentKind::Network => "Wires this host's ports, networks and routers, as controllers ask",
        AgentKind::Storage => "Keeps this host's volumes and snapshots, as controllers ask",
    };
    Options::augment_args(Command::new(agent.binary()).version(version).about(about))
}

impl Options {
    /// Reads arguments, the program's name first.
    pub(super) fn read(
        agent: AgentKind,
        version: &'static str,
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, clap::Error> {
        let matches = command(agent, version).try_get_matches_from(arguments)?;
        Self::from_arg_matches(&matches)
    }

    /// Findings in the form that was asked for.
    pub(super) fn show(&self, report: &preflight::Report) -> String {
        match self.output {
            Output::Table => report.to_string(),
            Output::Json => match serde_json::to_string_pretty(report) {
                Ok(json) => json + "\n",
                Err(error) => format!("{error}\n"),
            },
        }
    }
}
