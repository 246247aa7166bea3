//! `agentctl config`.

use anyhow::Result;
use clap::Args;

use super::Session;
use crate::exit::Exit;
use crate::table::Cell;

/// Show the settings in effect, and where each comes from.
///
/// Options win over the environment, that over ~/.config/agentctl/config.toml, that over
/// /etc/stackhand/agentctl.toml. Passwords are masked.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  agentctl config")]
pub(crate) struct Config {}

pub(crate) fn run(_args: &Config, session: &mut Session) -> Result<Exit> {
    let rows = session.settings.rows();
    session.console.print(&rows, |out| {
        out.headers(&["SETTING", "VALUE", "SOURCE"]);
        for row in &rows {
            let (value, source) = (row.value.as_str(), row.source.as_str());
            out.row([Cell::from(row.setting), value.into(), source.into()]);
        }
    })?;
    Ok(Exit::Well)
}
