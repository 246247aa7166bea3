//! The kernel and the limits of the process.

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Oldest kernel that Stackhand is built for.
const OLDEST_KERNEL: (u32, u32) = (5, 14);

/// Open files below which an agent may run out: each network takes a handful of sockets.
const FEW_FILES: u64 = 8192;

pub(super) fn kernel() -> Vec<Finding> {
    let release = match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => {
            let remedy = "look for a seccomp filter that forbids uname";
            return vec![Finding::failure("kernel", format!("cannot ask: {error}"), remedy)];
        }
    };
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    vec![judge_kernel(&release), judge_cgroup(unified)]
}

pub(super) fn judge_kernel(release: &str) -> Finding {
    let (major, minor) = OLDEST_KERNEL;
    match version(release) {
        Some(found) if found >= OLDEST_KERNEL => {
            Finding::pass("kernel", format!("Linux {release}"))
        }
        Some(_old) => Finding::failure(
            "kernel",
            format!("Linux {release} is older than {major}.{minor}"),
            format!("install and boot a kernel from {major}.{minor} on"),
        ),
        None => Finding::warning(
            "kernel",
            format!("cannot read the version in {release:?}"),
            format!("check that the kernel is not older than {major}.{minor}: uname -r"),
        ),
    }
}

/// Major and minor of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn judge_cgroup(unified: bool) -> Finding {
    if unified {
        Finding::pass("cgroup", "version 2")
    } else {
        Finding::warning(
            "cgroup",
            "cgroup version 2 is not mounted; limits of agents and guests are not enforced as set",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

pub(super) fn open_files(agent: &str) -> Vec<Finding> {
    vec![match getrlimit(Resource::RLIMIT_NOFILE) {
        // The agent raises the other limit to this one, see `run`.
        Ok((_soft, hard)) => judge_open_files(agent, hard),
        Err(error) => Finding::info("open-files", format!("cannot ask for the limit: {error}")),
    }]
}

pub(super) fn judge_open_files(agent: &str, limit: u64) -> Finding {
    if limit >= FEW_FILES {
        Finding::pass("open-files", format!("up to {limit}"))
    } else {
        Finding::warning(
            "open-files",
            format!("the {agent} agent may open {limit} files only; {FEW_FILES} are advised"),
            "set LimitNOFILE=65536 in the [Service] section of its unit, or run: ulimit -n 65536",
        )
    }
}
