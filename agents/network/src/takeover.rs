//! Taking a host over from OpenStack's Linux bridge agent, and giving it back.
//!
//! Links of that agent bear the names that ours have, and no mark. With `network.takeover = true` the
//! planner adopts such a link where its kind and settings are what is wanted under that name: it is
//! marked and stays in place, and no frame is lost. What is left over afterwards is that agent's
//! filter, which this module removes: chains of iptables and ebtables, and address sets. Until our
//! own firewall is in force they stay, so that no guest is open in between.
//!
//! Giving back ([`release`]) takes our marks from everything and changes nothing else.

mod leftovers;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use stackhand_kernel::exec::{ExecError, Program};
use stackhand_kernel::netlink::{LinkChange, Links, WriteCount};
use stackhand_kernel::{KernelError, Netns};

use crate::names::{self, Mark};

pub use leftovers::{ebtables_commands, iptables_script, is_address_set};

/// How long each program may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Removes the other agent's filter from this host. Returns what was removed, in words.
///
/// # Errors
///
/// Passes on what a program said; what was removed before stays removed.
pub async fn remove_filters(writes: &WriteCount) -> Result<Vec<String>, ExecError> {
    let mut done = Vec::new();
    for family in ["iptables", "ip6tables"] {
        let Some(saved) = output(&format!("{family}-save"), &[]).await? else { continue };
        let Some(script) = iptables_script(&saved) else { continue };
        let restore = program(&format!("{family}-restore"));
        restore.arg("--noflush").stdin(script).limit(LIMIT).run().await?;
        writes.add();
        done.push(format!("removed the chains of neutron-linuxbri from {family}"));
    }
    if let Some(saved) = output("ebtables-save", &[]).await? {
        let commands = ebtables_commands(&saved);
        for command in &commands {
            program("ebtables").args(command.iter().cloned()).limit(LIMIT).run().await?;
            writes.add();
        }
        if !commands.is_empty() {
            done.push("removed the chains neutronMAC- and neutronARP- from ebtables".to_owned());
        }
    }
    // After the rules that use them.
    if let Some(listed) = output("ipset", &["list", "-name"]).await? {
        for set in listed.lines().filter(|name| is_address_set(name)) {
            program("ipset").args(["destroy", set]).limit(LIMIT).run().await?;
            writes.add();
            done.push(format!("removed the address set {set}"));
        }
    }
    Ok(done)
}

/// The zones in which the other agent has the flows of its bridges tracked, by bridge: tracked in the
/// same ones, the flows that it allowed go on.
///
/// # Errors
///
/// Passes on what a program said.
pub async fn zones() -> Result<BTreeMap<String, u16>, ExecError> {
    let saved = output("iptables-save", &["-t", "raw"]).await?;
    Ok(leftovers::zones(&saved.unwrap_or_default()))
}

fn program(name: &str) -> Program {
    Program::new(format!("/usr/sbin/{name}"))
}

/// What a program prints; `None` where the host has no such program, and so nothing made by it.
async fn output(name: &str, arguments: &[&str]) -> Result<Option<String>, ExecError> {
    if !Path::new("/usr/sbin").join(name).exists() {
        return Ok(None);
    }
    let program = program(name).args(arguments.iter().copied()).limit(LIMIT);
    program.run().await.map(|output| Some(output.text()))
}

/// Takes our marks from all links of this host and of the namespaces of its networks. What they are
/// and how they are set stays. Returns how many there were.
///
/// # Errors
///
/// Passes on the kernel's refusal; what was released before stays released.
pub async fn release() -> Result<usize, KernelError> {
    let mut released = release_in(&Links::open(WriteCount::default())?).await?;
    for name in Netns::list()? {
        let space = Netns::named(&name)?;
        if space.id().is_some() {
            let links = Links::open_in(&space, WriteCount::default()).await?;
            released += release_in(&links).await?;
        }
    }
    Ok(released)
}

async fn release_in(links: &Links) -> Result<usize, KernelError> {
    let mut released = 0;
    for link in links.links().await? {
        let marked = link.alias.as_deref().is_some_and(|alias| alias.parse::<Mark>().is_ok());
        let unfinished = link.group == names::UNFINISHED_GROUP;
        if !marked && !unfinished {
            continue;
        }
        let change = LinkChange {
            alias: marked.then(String::new),
            group: unfinished.then_some(0),
            ..LinkChange::default()
        };
        links.change(link.index, &link.name, &change).await?;
        released += usize::from(marked);
    }
    Ok(released)
}

/// [`release`], in words for the command line.
///
/// # Errors
///
/// As [`release`].
pub async fn release_and_tell() -> Result<String, io::Error> {
    let count = release().await.map_err(io::Error::other)?;
    Ok(format!(
        "{count} links are not this agent's any more; all stay as they are, and so do its nftables \
         tables (nft list tables)\n"
    ))
}
