//! One file per noun or verb. Each has its arguments and what it does with them.

pub(crate) mod act;
pub(crate) mod apply;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod delete;
pub(crate) mod doctor;
pub(crate) mod drift;
pub(crate) mod events;
pub(crate) mod explain;
pub(crate) mod export;
pub(crate) mod facts;
pub(crate) mod get;
pub(crate) mod guest_console;
pub(crate) mod host;
pub(crate) mod import_answers;
pub(crate) mod init;
pub(crate) mod instance;
pub(crate) mod keygen;
pub(crate) mod list;
pub(crate) mod man;
pub(crate) mod ping;
pub(crate) mod reference;
pub(crate) mod schema;
pub(crate) mod show;
#[cfg(test)]
mod tests;
pub(crate) mod top;
pub(crate) mod wait;

use anyhow::Result;

use crate::cli::Command;
use crate::console::Console;
use crate::exit::Exit;
use crate::fleet::Fleet;
use crate::settings::Settings;

/// What commands work with.
pub(crate) struct Session {
    pub(crate) settings: Settings,
    pub(crate) console: Console,
    /// A transport to use in place of the one that the settings name.
    #[cfg(test)]
    pub(crate) bus: Option<std::sync::Arc<dyn stackhand_bus::Transport>>,
}

impl Session {
    /// Connects to the agents.
    ///
    /// # Errors
    ///
    /// As [`Fleet::connect`].
    pub(crate) async fn fleet(&self) -> Result<Fleet> {
        #[cfg(test)]
        if let Some(bus) = &self.bus {
            let link = crate::fleet::Link::Bus(std::sync::Arc::clone(bus));
            let settings = &self.settings;
            return Ok(Fleet::over(link, &settings.cloud.value, settings.timeout.value));
        }
        Fleet::connect(&self.settings).await
    }
}

/// Runs a command.
///
/// # Errors
///
/// Why it did not work; `main` tells it and chooses the exit status.
pub(crate) async fn run(command: &Command, session: &mut Session) -> Result<Exit> {
    match command {
        Command::List(args) => list::run(args, session).await,
        Command::Show(args) => show::run(args, session).await,
        Command::Facts(args) => facts::run(args, session).await,
        Command::Doctor(args) => doctor::run(args, session).await,
        Command::Get(args) => get::run(args, session).await,
        Command::Describe(args) => get::describe(args, session).await,
        Command::Events(args) => events::run(args, session).await,
        Command::Host(args) => host::run(args, session).await,
        Command::Ping(args) => ping::run(args, session).await,
        Command::Apply(args) => apply::run(args, session).await,
        Command::Plan(args) => apply::show_plan(args, session).await,
        Command::Delete(args) => delete::run(args, session).await,
        Command::Wait(args) => wait::run(args, session).await,
        Command::Act(args) => act::run(args, session).await,
        Command::Instance(args) => instance::run(args, session).await,
        Command::Console(args) => guest_console::run(args, session).await,
        Command::ConsoleLog(args) => guest_console::log(args, session).await,
        Command::Screenshot(args) => instance::screenshot(args, session).await,
        Command::Top(args) => top::run(args, session).await,
        Command::Explain(args) => explain::run(args, session).await,
        Command::Export(args) => export::run(args, session).await,
        Command::Schema(args) => schema::run(args, session),
        Command::Keygen(args) => keygen::run(args, session),
        Command::Init(args) => init::run(args, session).await,
        Command::ImportAnswers(args) => import_answers::run(args, session),
        Command::Config(args) => config::run(args, session),
        Command::Completion(args) => completion::run(args, session),
        Command::Man(args) => man::run(args, session),
        Command::Reference(args) => reference::run(args, session),
    }
}
