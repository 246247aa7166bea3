//! Is the clock right? Signed commands, certificates and heartbeats depend on it.

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
    /// The kernel does not tell.
    Unknown,
}

pub(super) fn check() -> Vec<Finding> {
    vec![judge(Timestamp::now(), kernel_sync())]
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
        Sync::Unknown => Finding::info(NAME, "the kernel does not tell whether the clock is kept"),
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
