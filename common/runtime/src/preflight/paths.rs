//! Folders and files: there, ours, writable, with room, and closed to others.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, Uid, User, eaccess};

use super::Finding;
use crate::config::{Problem, SigningSettings};

const MIB: u64 = 1 << 20;

/// Free space below which a ledger may not be able to grow.
const LITTLE_SPACE: u64 = 512 * MIB;

/// Free space below which it cannot be trusted to.
const NO_SPACE: u64 = 32 * MIB;

/// The loader's warnings as findings.
pub(super) fn config(warnings: &[Problem]) -> Vec<Finding> {
    if warnings.is_empty() {
        return vec![Finding::pass("config", "settings are good")];
    }
    let finding = |warning: &Problem| {
        let text = format!("{}: {}", warning.origin, warning.message);
        match &warning.remedy {
            Some(remedy) => Finding::warning("config", text, remedy),
            None => Finding::warning("config", text, "correct or remove it"),
        }
    };
    warnings.iter().map(finding).collect()
}

/// Where the packages' agents keep what they hold.
const PACKAGED: &str = "/var/lib/stackhand";

/// Who the agent is that keeps its state in `dir`. Root, who looks before a unit starts, asks for
/// the unit's user.
fn keeper(agent: &str, dir: &Path) -> Uid {
    let own = Uid::effective();
    let unit = || User::from_name(&format!("stackhand-{agent}")).ok().flatten();
    if own.is_root() && dir.starts_with(PACKAGED) { unit().map_or(own, |it| it.uid) } else { own }
}

pub(super) fn state_dir(agent: &str, dir: &Path) -> Vec<Finding> {
    const NAME: &str = "state-dir";
    let keeper = keeper(agent, dir);
    match folder(NAME, dir, "0750", keeper) {
        Err(finding) => vec![finding],
        Ok(metadata) if metadata.uid() != keeper.as_raw() => {
            let (shown, owner) = (dir.display(), user_name(Uid::from_raw(metadata.uid())));
            let keeper = user_name(keeper);
            vec![Finding::warning(
                NAME,
                format!("{shown} belongs to {owner}, and the agent is {keeper}"),
                format!("chown {keeper} {shown}"),
            )]
        }
        Ok(_) => vec![space(NAME, dir)],
    }
}

pub(super) fn run_dir(dir: &Path) -> Vec<Finding> {
    const NAME: &str = "run-dir";
    vec![
        folder(NAME, dir, "0755", Uid::effective()).map_or_else(
            |finding| finding,
            |_metadata| Finding::pass(NAME, dir.display().to_string()),
        ),
    ]
}

pub(super) fn trusted_controllers(signing: &SigningSettings) -> Vec<Finding> {
    const NAME: &str = "trusted-controllers";
    if !signing.required {
        return vec![Finding::warning(
            NAME,
            "signing.required is off: whoever reaches the broker commands this host",
            "set required = true under [signing]",
        )];
    }
    let dir = &signing.trusted_controllers;
    let shown = dir.display();
    let get_keys =
        format!("make a key with `agentctl keygen` and copy its public half into {shown}");
    let keys = fs::metadata(dir).and_then(|metadata| {
        let keys = fs::read_dir(dir)?
            .filter_map(Result::ok)
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            .filter(|entry| entry.path().is_file())
            .count();
        Ok((metadata.mode(), keys))
    });
    vec![match keys {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::failure(
            NAME,
            format!("{shown} is not there; every command from the broker is refused"),
            format!("install -d -m 0755 {shown}; then {get_keys}"),
        ),
        Err(error) => Finding::failure(
            NAME,
            format!("cannot read {shown}: {error}"),
            format!("chmod a+rx {shown}"),
        ),
        Ok((mode, _)) if mode & 0o022 != 0 => Finding::failure(
            NAME,
            format!("others than its owner can add keys to {shown}"),
            format!("chown root:root {shown} && chmod 0755 {shown}"),
        ),
        Ok((_, 0)) => Finding::failure(
            NAME,
            format!("{shown} holds no key; every command from the broker is refused"),
            get_keys,
        ),
        Ok((_, keys)) => Finding::pass(NAME, format!("{keys} in {shown}")),
    }]
}

/// Looks for a folder that this process can write to.
fn folder(name: &str, dir: &Path, mode: &str, user: Uid) -> Result<Metadata, Finding> {
    let shown = dir.display();
    let user = user_name(user);
    let make = format!("install -d -m {mode} -o {user} {shown}");
    let metadata = match fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Finding::failure(name, format!("{shown} is not there"), make));
        }
        Err(error) => {
            let remedy = format!("let {user} through to it: namei -l {shown}");
            return Err(Finding::failure(name, format!("cannot look at {shown}: {error}"), remedy));
        }
    };
    if !metadata.is_dir() {
        let remedy = format!("mv {shown} {shown}.old && {make}");
        return Err(Finding::failure(name, format!("{shown} is not a folder"), remedy));
    }
    if let Err(error) = eaccess(dir, AccessFlags::W_OK | AccessFlags::X_OK) {
        let remedy = format!("chown {user} {shown} && chmod u+rwx {shown}");
        return Err(Finding::failure(name, format!("cannot write in {shown}: {error}"), remedy));
    }
    if metadata.mode() & 0o002 != 0 {
        let remedy = format!("chmod o-w {shown}");
        return Err(Finding::failure(name, format!("everybody can write in {shown}"), remedy));
    }
    Ok(metadata)
}

fn space(name: &str, dir: &Path) -> Finding {
    match statvfs(dir) {
        Ok(stat) => judge_space(
            name,
            dir,
            stat.blocks_available().saturating_mul(stat.fragment_size()),
            // File systems without a fixed number of inodes tell 0 of 0.
            stat.files() > 0 && stat.files_available() == 0,
        ),
        Err(error) => {
            let remedy = format!("stat -f {}", dir.display());
            Finding::warning(name, format!("cannot ask for free space: {error}"), remedy)
        }
    }
}

pub(super) fn judge_space(name: &str, dir: &Path, free: u64, no_inodes: bool) -> Finding {
    let shown = dir.display();
    let mib = free / MIB;
    let remedy = format!("make room on the file system of {shown}: df -h {shown}; df -i {shown}");
    if no_inodes {
        Finding::failure(name, format!("no inode is free under {shown}"), remedy)
    } else if free < NO_SPACE {
        Finding::failure(name, format!("{mib} MiB free under {shown}"), remedy)
    } else if free < LITTLE_SPACE {
        Finding::warning(name, format!("{mib} MiB free under {shown}"), remedy)
    } else {
        Finding::pass(name, format!("{shown}, {mib} MiB free"))
    }
}

fn user_name(uid: Uid) -> String {
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}
