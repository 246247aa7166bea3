//! `agentctl doctor`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use stackhand_model::AgentKind;
use stackhand_runtime::client::AgentClient;
use stackhand_runtime::preflight::{Finding, Report, Severity};

use super::Session;
use crate::exit::{Exit, chain};
use crate::fleet::this_host;
use crate::link;
use crate::table::{Cell, Table, Tone};

/// How long an agent may take to look at its host.
const LIMIT: Duration = Duration::from_secs(60);

/// Where packages put the agents.
const BIN_DIR: &str = "/usr/bin";

/// Check whether this host is fit for the agents installed on it.
///
/// Agents that run are asked over their sockets; others are run with --preflight, found beside
/// agentctl or in /usr/bin. Nothing is changed. With a broker, --host asks another host's agents.
/// Exit status 1 when a check failed; each comes with its remedy.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl doctor
  agentctl doctor --all                      checks that passed, too
  agentctl doctor --type compute
  agentctl doctor --url rabbit://b/ --host node2")]
pub(crate) struct Doctor {
    /// Only this agent: compute, network or storage
    #[arg(long = "type", value_name = "TYPE")]
    agent: Option<AgentKind>,
    /// Ask the agents of this host, over the broker
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Show checks that passed, too
    #[arg(long)]
    all: bool,
}

/// What one agent found.
#[derive(Serialize)]
struct Diagnosis {
    host: String,
    #[serde(rename = "type")]
    agent: AgentKind,
    /// How it was asked: `socket`, `broker` or the program that was run.
    asked: String,
    fit: bool,
    findings: Vec<Finding>,
}

impl Diagnosis {
    fn new(host: &str, agent: AgentKind, asked: &str, answer: Result<Report>) -> Self {
        let report = answer.unwrap_or_else(|error| Report {
            findings: vec![Finding::failure(
                "preflight",
                chain(&error),
                format!("run `{} --preflight` by hand", agent.binary()),
            )],
        });
        Self {
            host: host.to_owned(),
            agent,
            asked: asked.to_owned(),
            fit: report.is_fit(),
            findings: report.findings,
        }
    }
}

pub(crate) async fn run(args: &Doctor, session: &mut Session) -> Result<Exit> {
    let wanted = |agent: AgentKind| args.agent.is_none_or(|it| it == agent);
    let mut found = Vec::new();
    match &args.host {
        Some(host) if *host != this_host() => remote(host, wanted, session, &mut found).await?,
        _ => local(wanted, session, &mut found).await?,
    }
    if found.is_empty() {
        bail!(
            "no agent is installed on this host: none has a socket in {}, and none is beside \
             agentctl or in {BIN_DIR}",
            session.settings.run_dir.value.display()
        );
    }
    tell(&found, args.all, session)
}

/// Looks whether this host is fit for some agents with the settings of a folder, whether they run
/// or not.
///
/// # Errors
///
/// The findings cannot be printed.
pub(crate) async fn examine(
    agents: &[AgentKind],
    config_dir: &Path,
    session: &mut Session,
) -> Result<Exit> {
    let mut found = Vec::new();
    for agent in agents {
        if let Some(program) = program(*agent) {
            let answer = ask_program(&program, Some(config_dir)).await;
            let asked = program.display().to_string();
            found.push(Diagnosis::new(&this_host(), *agent, &asked, answer));
        }
    }
    tell(&found, false, session)
}

fn tell(found: &[Diagnosis], all: bool, session: &mut Session) -> Result<Exit> {
    session.console.print(&found, |out| table(found, all, out))?;
    let failures = count(found, Severity::Failure);
    let warnings = count(found, Severity::Warning);
    session.console.note(&format!(
        "agentctl: {} agents looked at: {failures} failures, {warnings} warnings",
        found.len()
    ));
    Ok(if found.iter().all(|it| it.fit) { Exit::Well } else { Exit::Failure })
}

async fn remote(
    host: &str,
    wanted: impl Fn(AgentKind) -> bool,
    session: &Session,
    found: &mut Vec<Diagnosis>,
) -> Result<()> {
    let fleet = session.fleet().await?;
    let filter = crate::fleet::Filter { host: Some(host.to_owned()), agent: None };
    for member in fleet.living(&filter).await?.0 {
        if wanted(member.row.agent) {
            let answer = member.client.with_limit(LIMIT).preflight().await;
            let answer = answer.context("cannot ask for its preflight");
            found.push(Diagnosis::new(host, member.row.agent, "broker", answer));
        }
    }
    fleet.close().await;
    Ok(())
}

async fn local(
    wanted: impl Fn(AgentKind) -> bool,
    session: &Session,
    found: &mut Vec<Diagnosis>,
) -> Result<()> {
    let host = this_host();
    let run_dir = &session.settings.run_dir.value;
    let sockets = link::sockets(run_dir)?;
    for agent in AgentKind::ALL.into_iter().filter(|agent| wanted(*agent)) {
        let socket = sockets.iter().find(|(it, _)| *it == agent);
        if let Some((_, transport)) = socket {
            let client = AgentClient::new(transport.clone(), agent, &host).with_limit(LIMIT);
            match client.ping().await {
                Ok(_pong) => {
                    let answer = client.preflight().await.context("cannot ask for its preflight");
                    found.push(Diagnosis::new(&host, agent, "socket", answer));
                    continue;
                }
                // It does not run, whatever its socket says; its program can still look.
                Err(_) if program(agent).is_some() => {}
                Err(error) => {
                    let answer = Err(error).context("its socket does not answer");
                    found.push(Diagnosis::new(&host, agent, "socket", answer));
                    continue;
                }
            }
        }
        if let Some(program) = program(agent) {
            let answer = ask_program(&program, None).await;
            found.push(Diagnosis::new(&host, agent, &program.display().to_string(), answer));
        }
    }
    Ok(())
}

/// The agent's program: beside agentctl, or where packages put it.
pub(crate) fn program(agent: AgentKind) -> Option<PathBuf> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let folders = beside.into_iter().chain([PathBuf::from(BIN_DIR)]);
    folders.map(|folder| folder.join(agent.binary())).find(|path| path.is_file())
}

/// Runs an agent's program for its preflight alone.
async fn ask_program(program: &Path, config_dir: Option<&Path>) -> Result<Report> {
    let name = program.display();
    let folder = config_dir.into_iter().flat_map(|it| [OsStr::new("--config-dir"), it.as_os_str()]);
    let running = tokio::process::Command::new(program)
        .args(["--preflight", "-o", "json"])
        .args(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LIMIT, running)
        .await
        .with_context(|| format!("{name} --preflight did not finish within {LIMIT:?}"))?
        .with_context(|| format!("cannot run {name}"))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("nothing on standard error");
        anyhow::anyhow!("{name} --preflight ended with {}: {said}", output.status)
    })
}

fn count(found: &[Diagnosis], severity: Severity) -> usize {
    let findings = found.iter().flat_map(|it| &it.findings);
    findings.filter(|finding| finding.severity == severity).count()
}

fn table(found: &[Diagnosis], all: bool, out: &mut Table) {
    out.headers(&["TYPE", "CHECK", "RESULT", "FINDING"]);
    for diagnosis in found {
        let shown = |it: &&Finding| all || it.severity > Severity::Pass;
        for finding in diagnosis.findings.iter().filter(shown) {
            let tone = match finding.severity {
                Severity::Pass => Tone::Good,
                Severity::Info => Tone::Plain,
                Severity::Warning => Tone::Warning,
                Severity::Failure => Tone::Bad,
            };
            out.row([
                Cell::from(diagnosis.agent.as_str()),
                Cell::from(finding.check.as_str()),
                Cell::toned(finding.severity.to_string(), tone),
                Cell::from(finding.finding.as_str()),
            ]);
            if let Some(remedy) = &finding.remedy {
                let blank = || Cell::from("");
                out.row([blank(), blank(), blank(), Cell::from(format!("-> {remedy}"))]);
            }
        }
    }
}
