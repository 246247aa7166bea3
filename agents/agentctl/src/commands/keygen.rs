//! `agentctl keygen`.

use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

use super::Session;
use crate::exit::Exit;

/// Make a key pair that signs commands sent over a broker.
///
/// The private half stays with the controller; the public half, FILE.pub, goes to every host
/// that is to obey, into /etc/stackhand/trusted_controllers/. An existing key is never
/// overwritten.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl keygen
  agentctl keygen --out /root/controller.pem")]
pub(crate) struct Keygen {
    /// Where to write the private half [default: ~/.config/agentctl/key.pem]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(_args: &Keygen, _session: &mut Session) -> Result<Exit> {
    anyhow::bail!("pending")
}
