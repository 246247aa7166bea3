//! `agentctl import-answers`.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use super::Session;
use crate::exit::{Exit, Usage};
use crate::setup::packstack;

/// Take what applies from an answer file of Packstack's.
///
/// Writes a file of answers for `agentctl init --answers`, and tells what became of each answer
/// and what was ignored. Run it on the host that is set up: some answers name its links. The file
/// holds the broker's password.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl import-answers packstack-answers.txt > answers.toml
  agentctl import-answers packstack-answers.txt --out answers.toml
  agentctl init --answers answers.toml")]
pub(crate) struct ImportAnswers {
    /// The answer file
    file: PathBuf,
    /// Where to write the answers, readable by its owner alone [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &ImportAnswers, session: &mut Session) -> Result<Exit> {
    let source = args.file.display().to_string();
    let text = std::fs::read_to_string(&args.file)
        .map_err(|error| Usage::new(format!("cannot read {source}: {error}")))?;
    let imported = packstack::import(&source, &text, address_of).map_err(Usage::several)?;
    let made = toml::to_string(&imported.answers).context("cannot write the answers")?;
    let made = format!("# From {source}, for `agentctl init --answers`.\n{made}");
    match &args.out {
        Some(path) => write_private(path, &made)?,
        None => session.console.text(&made)?,
    }
    let console = &mut session.console;
    for (key, became) in &imported.taken {
        console.note(&format!("taken    {key}: {became}"));
    }
    for note in &imported.notes {
        console.note(&format!("note     {note}"));
    }
    for (service, count) in &imported.ignored {
        let what = if *count == 1 { "answer" } else { "answers" };
        console.note(&format!("ignored  {count} {what} CONFIG_{service}_…"));
    }
    Ok(Exit::Well)
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(0o600).open(path).with_context(cannot)?;
    file.write_all(text.as_bytes()).with_context(cannot)
}

/// The first address of a link that is good for other hosts, IPv4 before IPv6.
fn address_of(link: &str) -> Option<IpAddr> {
    let found = nix::ifaddrs::getifaddrs().ok()?;
    let mut addresses: Vec<IpAddr> = found
        .filter(|it| it.interface_name == link)
        .filter_map(|it| {
            let address = it.address?;
            let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
        })
        .filter(|it| !matches!(it, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    addresses.sort_unstable();
    addresses.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_known_by_its_address() {
        assert_eq!(address_of("lo"), Some("127.0.0.1".parse().unwrap()));
        assert_eq!(address_of("no-such-link"), None);
    }
}
