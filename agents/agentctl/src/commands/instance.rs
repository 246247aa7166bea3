//! `agentctl instance`, and `agentctl screenshot`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use stackhand_model::Kind;

use super::Session;
use super::act::{Found, find};
use crate::exit::Exit;

/// Start, stop, rebuild and picture instances.
///
/// What is done here holds until the instance's document changes.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  agentctl instance stop web             ask it to shut down, and pull the plug when its time is up
  agentctl instance start web
  agentctl instance reboot web --hard
  agentctl instance pause web            agentctl instance unpause web
  agentctl instance suspend web          agentctl instance resume web
  agentctl instance rebuild web          make its root disk anew from its image
  agentctl instance snapshot web --name web-2026-11
  agentctl instance usage web
  agentctl instance xml web")]
pub(crate) enum InstanceCommand {
    /// Let it run
    Start(Named),
    /// Shut it down
    Stop(Named),
    /// Shut it down and start it again
    Reboot(Reboot),
    /// Stop its processors
    Pause(Named),
    /// Let its processors go on
    Unpause(Named),
    /// Put its memory on disk
    Suspend(Named),
    /// Let it go on from the memory on disk
    Resume(Named),
    /// Make its root disk anew from its image; what is on it is lost
    Rebuild(Named),
    /// Copy its root disk, as it is now, to an image on its host
    Snapshot(Snapshot),
    /// Show what it has used since it was started
    Usage(Named),
    /// Show its domain's XML as libvirt has it
    Xml(Named),
}

#[derive(Args, Debug)]
pub(crate) struct Named {
    /// The instance, by name or id
    instance: String,
}

#[derive(Args, Debug)]
pub(crate) struct Reboot {
    /// The instance, by name or id
    instance: String,
    /// Pull the plug at once
    #[arg(long)]
    hard: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Snapshot {
    /// The instance, by name or id
    instance: String,
    /// Name of the image's file; one is made up without it
    #[arg(long)]
    name: Option<String>,
}

/// Save a picture of an instance's screen as a PNG file.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl screenshot web
  agentctl screenshot web --file /tmp/web.png")]
pub(crate) struct Screenshot {
    /// The instance, by name or id
    instance: String,
    /// The file; without it NAME.png in this folder
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

pub(crate) async fn run(args: &InstanceCommand, session: &mut Session) -> Result<Exit> {
    use InstanceCommand as I;
    let (name, action, params) = match args {
        I::Start(it) => (&it.instance, "start", Value::Null),
        I::Stop(it) => (&it.instance, "stop", Value::Null),
        I::Reboot(it) => {
            let how = if it.hard { "hard" } else { "soft" };
            (&it.instance, "reboot", json!({"type": how}))
        }
        I::Pause(it) => (&it.instance, "pause", Value::Null),
        I::Unpause(it) => (&it.instance, "unpause", Value::Null),
        I::Suspend(it) => (&it.instance, "suspend", Value::Null),
        I::Resume(it) => (&it.instance, "resume", Value::Null),
        I::Rebuild(it) => (&it.instance, "rebuild", Value::Null),
        I::Snapshot(it) => (&it.instance, "snapshot", json!({"name": it.name})),
        I::Usage(it) => (&it.instance, "usage", Value::Null),
        I::Xml(it) => (&it.instance, "xml", Value::Null),
    };
    let found = find(session, Kind::Instance, name).await?;
    let answer = found.act(action, params).await?;
    found.close().await;
    super::act::show(session, &answer)?;
    Ok(Exit::Well)
}

pub(crate) async fn screenshot(args: &Screenshot, session: &mut Session) -> Result<Exit> {
    let found = find(session, Kind::Instance, &args.instance).await?;
    let file = args.file.clone().unwrap_or_else(|| format!("{}.png", found.name).into());
    let png = picture(&found).await?;
    found.close().await;
    std::fs::write(&file, png).with_context(|| format!("cannot write {}", file.display()))?;
    session.console.note(&format!("saved {}", file.display()));
    Ok(Exit::Well)
}

async fn picture(found: &Found) -> Result<Vec<u8>> {
    let answer = found.act("screenshot", Value::Null).await?;
    let png = answer["png"].as_str().context("the agent's answer has no picture")?;
    STANDARD.decode(png).context("the agent's answer has no picture")
}
