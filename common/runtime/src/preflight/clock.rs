//! Is the clock right? Signed commands, certificates and heartbeats depend on it.

use std::path::Path;

use jiff::Timestamp;
use nix::libc;

use super::Finding;

const NAME: &str = "clock";

/// No Stackhand ran before this.
const EARLIEST_YEAR: i16 = 2025;

/// What the kernel says about its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// A time service keeps it, within so many microseconds at worst.
    Kept { error_microseconds: i64 },
    /// Nobody keeps it.
    Free,
    /// The kernel does not tell, and a time service left this sign of life.
    Service(&'static str),
    /// The kernel does not tell.
    Unknown,
}

pub(super) fn check() -> Vec<Finding> {
    let sync = match kernel_sync() {
        Sync::Unknown => service_sync(Path::new("/")),
        told => told,
    };
    vec![judge(Timestamp::now(), sync)]
}

/// Looks for a time service. A unit with `ProtectClock` must not even ask the kernel.
pub(super) fn service_sync(root: &Path) -> Sync {
    let signs = [
        ("run/systemd/timesync/synchronized", "systemd-timesyncd"),
        ("run/chrony/chronyd.pid", "chronyd"),
        ("run/ntpd.pid", "ntpd"),
    ];
    let found = signs.into_iter().find(|(file, _)| root.join(file).exists());
    found.map_or(Sync::Unknown, |(_, service)| Sync::Service(service))
}

pub(super) fn judge(now: Timestamp, sync: Sync) -> Finding {
    let year = now.to_zoned(jiff::tz::TimeZone::UTC).year();
    if year < EARLIEST_YEAR {
        return Finding::failure(
            NAME,
            format!("the clock stands in the year {year}"),
            "timedatectl set-ntp true, or set the time: date -u -s 'YYYY-MM-DD hh:mm:ss'",
        );
    }
    match sync {
        Sync::Kept { error_microseconds } => {
            let milliseconds = error_microseconds / 1000;
            Finding::pass(NAME, format!("kept by a time service, within {milliseconds} ms"))
        }
        Sync::Free => Finding::warning(
            NAME,
            "no time service keeps the clock; signed commands are refused once it is off by more \
             than signing.window_seconds",
            "apt-get install chrony, or: dnf install chrony && systemctl enable --now chronyd",
        ),
        Sync::Service(service) => Finding::pass(NAME, format!("kept by {service}")),
        Sync::Unknown => Finding::info(
            NAME,
            "this agent cannot tell whether the clock is kept: see timedatectl or chronyc tracking",
        ),
    }
}

/// Reads the kernel's clock state. Changes nothing.
#[expect(unsafe_code, reason = "adjtimex has no safe wrapper in nix")]
fn kernel_sync() -> Sync {
    // SAFETY: timex is a plain C struct of integers, for which zeros are valid.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` lives across the call; `modes` 0 asks to read only.
    let code = unsafe { libc::adjtimex(&raw mut state) };
    match code {
        -1 => Sync::Unknown,
        _ if code == libc::TIME_ERROR || state.status & libc::STA_UNSYNC != 0 => Sync::Free,
        _ => Sync::Kept { error_microseconds: state.maxerror },
    }
}
