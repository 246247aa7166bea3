//! `storage-agent attach|detach|rescan`: a volume on a host without a hypervisor of ours.

use std::io::{Read, Write};
use std::process::ExitCode;

use stackhand_attach::{attach, detach, rescan};
use stackhand_model::{Connection, VolumeId};
use stackhand_runtime::chain;

/// Most bytes of a connection: it is a few lines.
const MOST: u64 = 64 << 10;

const USAGE: &str = "\
Usage: storage-agent attach|detach|rescan VOLUME-ID <CONNECTION

Attaches a volume to this host's kernel, takes it away, or takes over its new size. CONNECTION is the storage
agent's answer to the attachment, as JSON on standard input, because it holds a password:

  agentctl get attachment NAME -o json | jq .status.observed.connection | storage-agent attach ID

Prints the device (attach) or the size in bytes (rescan).
";

/// Whether the arguments ask for one of these; if so, does it.
#[must_use]
pub fn run(arguments: &[String]) -> Option<ExitCode> {
    let [_program, command, rest @ ..] = arguments else { return None };
    if !["attach", "detach", "rescan"].contains(&command.as_str()) {
        return None;
    }
    let [volume] = rest else { return Some(tell(false, USAGE)) };
    Some(match perform(command, volume) {
        Ok(said) => tell(true, &said),
        Err(problem) => tell(false, &format!("error: {problem}\n")),
    })
}

fn perform(command: &str, volume: &str) -> Result<String, String> {
    let volume = VolumeId(volume.parse().map_err(|error| format!("{volume:?}: {error}"))?);
    let mut text = String::new();
    std::io::stdin()
        .take(MOST)
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the connection: {error}"))?;
    let connection: Connection = serde_json::from_str(&text)
        .map_err(|error| format!("standard input holds no connection: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    runtime
        .block_on(async {
            match command {
                "attach" => Ok(format!("{}\n", attach(&connection, volume).await?.display())),
                "detach" => detach(&connection, volume).await.map(|()| String::new()),
                _ => Ok(format!("{}\n", rescan(&connection, volume).await?)),
            }
        })
        .map_err(|error| chain(&error))
}

fn tell(well: bool, text: &str) -> ExitCode {
    // A reader that went away is no error.
    let _ = if well {
        std::io::stdout().write_all(text.as_bytes())
    } else {
        std::io::stderr().write_all(text.as_bytes())
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
