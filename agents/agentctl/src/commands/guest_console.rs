//! `agentctl console` and `agentctl console-log`: an instance's serial console.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use stackhand_model::Kind;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::Session;
use super::act::{Found, find};
use crate::console::tame;
use crate::exit::{Exit, Usage};

/// Ctrl and `]`, as telnet and virsh have it.
const ESCAPE: u8 = 0x1d;

/// How often a log that is followed is asked for.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// Connect this terminal to an instance's serial console.
///
/// A console has one holder at a time. Ctrl-] leaves it; what was on the screen before is in
/// `agentctl console-log`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl console web
  agentctl console web --force        take it from whoever holds it")]
pub(crate) struct GuestConsole {
    /// The instance, by name or id
    instance: String,
    /// Take the console from whoever holds it
    #[arg(long)]
    force: bool,
}

/// Show what an instance wrote to its serial console.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl console-log web
  agentctl console-log web -f
  agentctl console-log web --kib 1024")]
pub(crate) struct ConsoleLog {
    /// The instance, by name or id
    instance: String,
    /// Go on showing what comes, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// How much of its end is shown, in KiB, at most 1024
    #[arg(long, default_value_t = 64)]
    kib: u64,
}

pub(crate) async fn log(args: &ConsoleLog, session: &mut Session) -> Result<Exit> {
    let found = find(session, Kind::Instance, &args.instance).await?;
    let mut answer = found.act("console-log", json!({"kib": args.kib})).await?;
    loop {
        if let Some(text) = answer["log"].as_str() {
            if answer["truncated"] == true {
                session.console.text("[what came before is left out]\n")?;
            }
            // Whole lines alone are made harmless line by line; the rest comes with the next answer.
            let lines: Vec<String> = text.split('\n').map(|line| tame(line.trim_end())).collect();
            session.console.text(&lines.join("\n"))?;
        }
        if !args.follow {
            found.close().await;
            return Ok(Exit::Well);
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
        let params = json!({"kib": 1024, "start": answer["next"]});
        answer = found.act("console-log", params).await?;
    }
}

pub(crate) async fn run(args: &GuestConsole, session: &mut Session) -> Result<Exit> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let problem = "the console needs a terminal; for its text see agentctl console-log";
        bail!(Usage::new(problem));
    }
    let found = find(session, Kind::Instance, &args.instance).await?;
    let opened = found.act("console-open", json!({"force": args.force})).await?;
    session.console.note(&format!("connected to {}; leave with Ctrl-]", found.name));
    let ended = {
        let _raw = Raw::begin().context("cannot set up the terminal")?;
        hold(&found, &opened["session"]).await
    };
    // It would close by itself, later.
    let _closed = found.act("console-close", json!({"session": opened["session"]})).await;
    found.close().await;
    session.console.note(&format!("\nleft {}", found.name));
    ended.map(|()| Exit::Well)
}

/// Carries bytes both ways until either side leaves.
async fn hold(found: &Found, session: &Value) -> Result<()> {
    let (sender, mut typed) = mpsc::channel::<Vec<u8>>(16);
    let reader = tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stdin.read(&mut buffer).await {
            if sender.send(buffer[..read].to_vec()).await.is_err() {
                return;
            }
        }
    });
    let mut wait = 0;
    let ended = loop {
        let mut input = Vec::new();
        while let Ok(bytes) = typed.try_recv() {
            input.extend(bytes);
        }
        if let Some(at) = input.iter().position(|&byte| byte == ESCAPE) {
            input.truncate(at);
            break Ok(());
        }
        // What was typed brings an answer soon; else the agent is asked now and then.
        wait = if input.is_empty() { (wait * 2).clamp(20, 200) } else { 20 };
        let io = json!({"session": session, "input": STANDARD.encode(&input), "wait_ms": wait});
        let answer = match found.act("console-io", io).await {
            Ok(answer) => answer,
            Err(error) => break Err(error),
        };
        let output = answer["output"].as_str().and_then(|text| STANDARD.decode(text).ok());
        let output = output.unwrap_or_default();
        if !output.is_empty() {
            wait = 0;
        }
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(&output).and_then(|()| stdout.flush()) {
            break Err(error.into());
        }
        if answer["closed"] == true {
            break Ok(());
        }
    };
    reader.abort();
    ended
}

/// The terminal gives every key as it is typed; put back when dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    fn begin() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _put_back = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}
