//! The command line: what can be typed. What each command does is in `commands/`.

use clap::{Parser, Subcommand};

use crate::commands::{
    act, apply, completion, config, delete, doctor, events, explain, export, facts, get,
    guest_console, host, import_answers, init, instance, keygen, list, man, ping, reference,
    schema, show, top, wait,
};
use crate::settings::Globals;

/// Lists and drives Stackhand's agents: compute, network and storage on every host.
///
/// Without a broker (--url, AGENTCTL_URL or a settings file) it speaks to the agents of this host
/// over their sockets.
#[derive(Debug, Parser)]
#[command(
    name = "agentctl",
    version,
    after_help = "\
Exit status:
  0  done, and all is well
  1  it did not work
  2  the command line, a setting or a manifest is wrong
  3  it worked, and something is not well: an agent down, an object in error or not there in time

Files:
  ~/.config/agentctl/config.toml, /etc/stackhand/agentctl.toml
      defaults: url, local, run_dir, key, cloud, timeout_seconds, output

Examples:
  agentctl list                              who is there, and who is not
  agentctl doctor                            is this host fit, and what to do about it
  agentctl apply -f cloud.yaml --wait        make it so, and watch
  agentctl get instances                     what the agents hold
  agentctl --url rabbit://u:p@broker/ list   all hosts, over a broker"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands; what each does is told where its arguments are.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "ls")]
    List(list::List),
    Show(show::Show),
    Facts(facts::Facts),
    Doctor(doctor::Doctor),
    Get(get::Get),
    Describe(get::Describe),
    Events(events::Events),
    #[command(subcommand)]
    Host(host::HostCommand),
    Ping(ping::Ping),
    Apply(apply::Apply),
    #[command(visible_alias = "diff")]
    Plan(apply::PlanCommand),
    Delete(delete::Delete),
    Wait(wait::Wait),
    Act(act::Act),
    #[command(subcommand)]
    Instance(instance::InstanceCommand),
    Console(guest_console::GuestConsole),
    ConsoleLog(guest_console::ConsoleLog),
    Screenshot(instance::Screenshot),
    Top(top::Top),
    Explain(explain::Explain),
    Export(export::Export),
    Schema(schema::Schema),
    Keygen(keygen::Keygen),
    Init(init::Init),
    ImportAnswers(import_answers::ImportAnswers),
    Config(config::Config),
    Completion(completion::Completion),
    #[command(hide = true)]
    Man(man::Man),
    #[command(hide = true)]
    Reference(reference::Reference),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let nested: Vec<_> = command.get_subcommands().collect();
            let own = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let name = command.get_name();
            assert!(own.contains(&format!("agentctl {name}")), "{name} has no example");
            for inner in nested {
                assert!(own.contains(inner.get_name()), "{name} {} is not shown", inner.get_name());
            }
        }
    }

    #[test]
    fn options_work_before_and_after_the_command() {
        for line in ["agentctl -o json --local list", "agentctl list --local -o json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert!(cli.globals.local && cli.globals.output.is_some(), "{line}");
        }
        assert!(Cli::try_parse_from(["agentctl", "list", "--local", "--url", "x"]).is_err());
    }
}
