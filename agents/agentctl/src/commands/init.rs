//! `agentctl init`.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use stackhand_bus::sign::PublicKey;
use stackhand_model::AgentKind;

use super::{Session, doctor};
use crate::exit::{Exit, Usage};
use crate::setup::{Answers, Made, files};
use crate::table::Cell;

/// Who may read settings: the agents.
const READERS: &str = "stackhand-agents";

/// Set this host up: settings, trusted controllers, a check, and the agents' start.
///
/// Takes flags and a file of answers; at a terminal without either it asks. Writes drop-ins
/// (50-init.toml) and leaves other settings alone. Running it again changes only what is answered
/// then. When a check of `agentctl doctor` fails, nothing is started.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl init                              asks
  agentctl init --broker rabbit://stackhand:secret@controller/ --trust controller.pub \\
      --tunnel-address 192.0.2.11 --bridge-mapping extnet=eth1 --zone nova
  agentctl init --answers answers.toml --dry-run")]
pub(crate) struct Init {
    /// A file of answers, see `agentctl import-answers`; flags win over it
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// The broker that controllers and agents meet on; none for a single host
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
    /// A controller's public key, as `agentctl keygen` made it; may be repeated
    #[arg(long, value_name = "FILE")]
    trust: Vec<PathBuf>,
    /// This host's name in the cloud, if it is not the kernel's
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// Availability zone of this host
    #[arg(long, value_name = "ZONE")]
    zone: Option<String>,
    /// Address that other hosts send overlay packets to
    #[arg(long, value_name = "ADDRESS")]
    tunnel_address: Option<IpAddr>,
    /// A physical network and the link that leads to it; may be repeated
    #[arg(long = "bridge-mapping", value_parser = mapping, value_name = "NAME=LINK")]
    bridge_mappings: Vec<(String, String)>,
    /// LVM's volume group for volumes; without it they are kept in files
    #[arg(long, value_name = "GROUP")]
    volume_group: Option<String>,
    /// Who executes guests' instructions: auto, kvm or qemu
    #[arg(long, value_name = "TYPE")]
    virt_type: Option<String>,
    /// Folder of the agents' settings
    #[arg(long, value_name = "DIR", default_value = "/etc/stackhand")]
    config_dir: PathBuf,
    /// Show what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Write and check, but enable and start nothing
    #[arg(long)]
    no_start: bool,
}

fn mapping(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, link)| !name.is_empty() && !link.is_empty());
    pair.map(|(name, link)| (name.to_owned(), link.to_owned()))
        .ok_or_else(|| format!("{text:?} is not of the form NAME=LINK"))
}

/// The folder of the controllers' public keys.
const TRUSTED: &str = "trusted_controllers";

/// How long systemd may take to start the agents.
const START_LIMIT: Duration = Duration::from_secs(120);

/// One file, and what becomes of it.
#[derive(Serialize)]
struct Row {
    action: &'static str,
    file: PathBuf,
}

pub(crate) async fn run(args: &Init, session: &mut Session) -> Result<Exit> {
    let mut answers = args.flags();
    if let Some(path) = &args.answers {
        let source = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Usage::new(format!("cannot read {source}: {error}")))?;
        answers = answers.over(Answers::parse(&source, &text).map_err(Usage::new)?);
    } else if answers == Answers::default() {
        answers = ask(session)?;
    }
    let problems = answers.problems();
    if !problems.is_empty() {
        bail!(Usage::several(problems));
    }
    let mut made = Vec::new();
    for file in files(&answers, &args.config_dir) {
        made.push(match std::fs::read_to_string(&file.path) {
            Ok(earlier) => file.over(&earlier).map_err(Usage::new)?,
            Err(_) => file,
        });
    }
    made.extend(keys(&answers, &args.config_dir)?);
    let mut rows = Vec::new();
    for file in &made {
        let action = match std::fs::read_to_string(&file.path) {
            Ok(text) if text == file.text => "unchanged",
            Ok(_) => "change",
            Err(_) => "create",
        };
        if action != "unchanged" && !args.dry_run {
            write(file)?;
        }
        rows.push(Row { action, file: file.path.clone() });
    }
    session.console.print(&rows, |out| {
        out.headers(&["ACTION", "FILE"]);
        for row in &rows {
            out.row([Cell::from(row.action), row.file.display().to_string().into()]);
        }
    })?;
    if args.dry_run {
        session.console.note("agentctl: dry run: nothing was written");
        return Ok(Exit::Well);
    }
    let trusts = std::fs::read_dir(args.config_dir.join(TRUSTED)).is_ok_and(|it| it.count() > 0);
    if answers.broker.is_some() && !trusts {
        session.console.note(
            "agentctl: a host obeys only controllers that it trusts: give --trust with the public \
             key that `agentctl keygen` made on the controller",
        );
    }
    let programs: Vec<AgentKind> =
        AgentKind::ALL.into_iter().filter(|agent| doctor::program(*agent).is_some()).collect();
    if programs.is_empty() {
        session
            .console
            .note("agentctl: no agent is installed here yet; install one and run this again");
        return Ok(Exit::Well);
    }
    let exit = doctor::examine(&programs, &args.config_dir, session).await?;
    if exit != Exit::Well {
        session
            .console
            .note("agentctl: nothing was started; do what the remedies say and run this again");
        return Ok(exit);
    }
    if !args.no_start {
        start(&programs, session).await?;
    }
    Ok(Exit::Well)
}

impl Init {
    fn flags(&self) -> Answers {
        Answers {
            host: self.host.clone(),
            cloud: None,
            zone: self.zone.clone(),
            broker: self.broker.clone(),
            tunnel_address: self.tunnel_address,
            volume_group: self.volume_group.clone(),
            virt_type: self.virt_type.clone(),
            trust: self.trust.clone(),
            bridge_mappings: self.bridge_mappings.iter().cloned().collect(),
        }
    }
}

/// Asks a person at a terminal. An empty answer leaves the default.
fn ask(session: &mut Session) -> Result<Answers> {
    let console = &mut session.console;
    let mut question = |text: &str| -> Result<Option<String>> {
        let answer = console.read_line(text)?.ok_or_else(|| {
            Usage::new("nothing to do: give answers by flags or --answers, or run it at a terminal")
        })?;
        Ok(Some(answer).filter(|it| !it.is_empty()))
    };
    let mut answers = Answers {
        broker: question("Broker (rabbit://user:password@host/; empty for a single host): ")?,
        ..Answers::default()
    };
    if answers.broker.is_some() {
        answers.trust = question("Public key of the controller (file): ")?
            .into_iter()
            .map(PathBuf::from)
            .collect();
        if let Some(text) = question("Address that other hosts send overlay packets to: ")? {
            let address = text.parse();
            answers.tunnel_address =
                Some(address.map_err(|_| Usage::new(format!("{text:?} is not an IP address")))?);
        }
    }
    while let Some(text) =
        question("Physical network and its link (extnet=eth1; empty for no more): ")?
    {
        answers.bridge_mappings.extend([mapping(&text).map_err(Usage::new)?]);
    }
    answers.volume_group = question("LVM volume group for volumes (empty: files): ")?;
    answers.zone = question("Availability zone (empty: nova): ")?;
    Ok(answers)
}

/// The controllers' public keys, as the agents are given them.
fn keys(answers: &Answers, config_dir: &Path) -> Result<Vec<Made>> {
    let folder = config_dir.join(TRUSTED);
    let mut made = Vec::new();
    for path in &answers.trust {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Usage::new(format!("cannot read {shown}: {error}")))?;
        let key: PublicKey = text
            .trim()
            .parse()
            .map_err(|error| Usage::new(format!("{shown} is no public key: {error}")))?;
        made.push(Made {
            path: folder.join(format!("{}.pub", key.id())),
            text: format!("{}\n", text.trim()),
        });
    }
    Ok(made)
}

/// Writes a file whole or not at all, for its owner and the agents alone.
fn write(file: &Made) -> Result<()> {
    let path = &file.path;
    let cannot = || format!("cannot write {}", path.display());
    let folder = path.parent().context("a file of settings is in a folder")?;
    std::fs::create_dir_all(folder).with_context(cannot)?;
    let new = path.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let mut options = std::fs::OpenOptions::new();
    let mut out =
        options.write(true).create_new(true).mode(0o640).open(&new).with_context(cannot)?;
    // Where the packages are not installed there is no such group, and no agent to read it.
    if let Ok(Some(group)) = nix::unistd::Group::from_name(READERS) {
        std::os::unix::fs::fchown(&out, None, Some(group.gid.as_raw())).with_context(cannot)?;
    }
    out.write_all(file.text.as_bytes()).and_then(|()| out.sync_all()).with_context(cannot)?;
    std::fs::rename(&new, path).with_context(cannot)
}

/// Enables the agents' units and starts them with the new settings.
async fn start(agents: &[AgentKind], session: &mut Session) -> Result<()> {
    if !Path::new("/run/systemd/system").exists() {
        session.console.note("agentctl: systemd does not run here: start the agents by hand");
        return Ok(());
    }
    let units: Vec<String> = agents.iter().map(|it| format!("{}.service", it.binary())).collect();
    for action in ["enable", "restart"] {
        let target = (action == "enable").then_some("stackhand.target");
        let running = tokio::process::Command::new("/usr/bin/systemctl")
            .arg(action)
            .args(target)
            .args(&units)
            .kill_on_drop(true)
            .status();
        let status = tokio::time::timeout(START_LIMIT, running)
            .await
            .with_context(|| format!("systemctl {action} did not finish within {START_LIMIT:?}"))?
            .context("cannot run systemctl")?;
        if !status.success() {
            bail!("systemctl {action} {} failed; see journalctl -xe", units.join(" "));
        }
    }
    session.console.note(&format!("agentctl: started: {}; see `agentctl list`", units.join(", ")));
    Ok(())
}
