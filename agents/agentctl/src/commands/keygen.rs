//! `agentctl keygen`.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use stackhand_bus::sign::SigningKey;

use super::Session;
use crate::exit::{Exit, Usage};
use crate::fleet::this_host;
use crate::settings::user_folder;
use crate::table::Cell;

/// Make a key pair that signs commands sent over a broker.
///
/// The private half stays with the controller, readable by its owner alone; the public half,
/// FILE.pub, goes to every host that is to obey, into /etc/stackhand/trusted_controllers/. An
/// existing key is never overwritten.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl keygen
  agentctl keygen --out /root/controller.pem --comment 'operations'
  scp ~/.config/agentctl/key.pem.pub node1:/etc/stackhand/trusted_controllers/")]
pub(crate) struct Keygen {
    /// Where to write the private half [default: ~/.config/agentctl/key.pem]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Whose key it is, for people; by default agentctl and the name of this host
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
}

/// The key pair made.
#[derive(Serialize)]
struct Made {
    id: String,
    private_key: PathBuf,
    public_key: PathBuf,
    public: String,
}

pub(crate) fn run(args: &Keygen, session: &mut Session) -> Result<Exit> {
    let path = match (&args.out, user_folder()) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            folder.join("key.pem")
        }
        (None, None) => {
            return Err(Usage::new("no home folder is known: name a file with --out").into());
        }
    };
    let public_path = PathBuf::from(format!("{}.pub", path.display()));
    let key = SigningKey::generate().context("cannot make a key")?;
    let comment = args.comment.clone().unwrap_or_else(|| format!("agentctl@{}", this_host()));
    let public = key.public(&comment).to_string();
    key.save(&path).context("cannot keep the new key; an existing one is never overwritten")?;
    write_new(&public_path, &public)?;
    let made =
        Made { id: key.id().to_string(), private_key: path, public_key: public_path, public };
    session.console.print(&made, |out| {
        out.headers(&["KEY", "PRIVATE", "PUBLIC"]);
        let private = made.private_key.display().to_string();
        let public = made.public_key.display().to_string();
        out.row([Cell::from(made.id.as_str()), private.into(), public.into()]);
    })?;
    session.console.note(&format!(
        "agentctl: copy {} into /etc/stackhand/trusted_controllers/ of every host",
        made.public_key.display()
    ));
    Ok(Exit::Well)
}

fn write_new(path: &Path, line: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).open(path).with_context(cannot)?;
    writeln!(file, "{line}").and_then(|()| file.sync_all()).with_context(cannot)
}
