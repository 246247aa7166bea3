//! How much a backend may still promise.
//!
//! Files are sparse: what a volume has not written yet is not taken, but promised. A guest whose
//! promise cannot be kept gets I/O errors, so promises are counted:
//!
//! ```text
//! claims  = Σ over volumes of what they may still take
//!           (size − allocated; the whole size where blocks are shared with a clone or snapshot)
//! limit   = (free − reserved_percent of the whole) × overcommit_percent / 100
//! a new promise of n bytes is made if claims + n ≤ limit
//! ```
//!
//! At 100 % every volume can be written full, as long as nobody else fills the file system.
//!
//! A thin pool is watched besides: with more than `warn_percent` of its data or metadata used the
//! agent is not well, and with more than `stop_percent` nothing new is promised, whatever the sum
//! says. A pool that runs full takes all its volumes down.

use crate::backend::{Fill, Item, Observed, Presence, Seen};

/// How much of a backend may be promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Promises, in percent of what is free.
    pub overcommit_percent: u32,
    /// Part of the whole that is never promised, in percent.
    pub reserved_percent: u32,
    /// From how full a pool on the agent is not well, in percent.
    pub warn_percent: u32,
    /// From how full a pool on nothing new is promised, in percent.
    pub stop_percent: u32,
}

impl Limits {
    /// Why nothing may be promised, if the pool is too full.
    #[must_use]
    pub fn stops(&self, fill: Option<Fill>) -> Option<String> {
        passed(fill, self.stop_percent)
    }

    /// Whether the pool is half as full as it may get, or fuller.
    #[must_use]
    pub fn nears_stop(&self, fill: Option<Fill>) -> bool {
        passed(fill, self.stop_percent / 2).is_some()
    }

    /// What to tell of a pool that gets full.
    #[must_use]
    pub fn warns(&self, fill: Option<Fill>) -> Option<String> {
        passed(fill, self.warn_percent)
    }
}

/// Which share of a pool has reached a level.
fn passed(fill: Option<Fill>, level: u32) -> Option<String> {
    let Fill { data, metadata } = fill?;
    let (what, used) = if data >= level * 100 {
        ("data", data)
    } else if metadata >= level * 100 {
        ("metadata", metadata)
    } else {
        return None;
    };
    Some(format!(
        "{}.{:02} % of the pool's {what} space is used, the limit is {level} %: extend the pool \
         (lvextend), or delete volumes",
        used / 100,
        used % 100
    ))
}

/// What may be promised in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes already promised and not yet taken.
    pub claims: u64,
    /// Most bytes that may be promised.
    pub limit: u64,
}

impl Budget {
    /// Counts the promises of a backend.
    #[must_use]
    pub fn new(observed: &Observed, limits: &Limits) -> Self {
        let reserved = share(observed.total_bytes, limits.reserved_percent);
        let limit = share(observed.free_bytes.saturating_sub(reserved), limits.overcommit_percent);
        let claims = observed
            .items
            .iter()
            .map(|(&item, seen)| claim(item, seen))
            .fold(0, u64::saturating_add);
        Self { claims, limit }
    }

    /// Bytes that may still be promised.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.claims)
    }

    /// Promises `bytes`.
    ///
    /// # Errors
    ///
    /// Tells what is left, if that is less.
    pub fn take(&mut self, bytes: u64) -> Result<(), u64> {
        if bytes > self.left() {
            return Err(self.left());
        }
        self.claims += bytes;
        Ok(())
    }
}

/// What an item may still take of the free space.
fn claim(item: Item, seen: &Seen) -> u64 {
    match (item, &seen.presence) {
        (Item::Snapshot(_), _) | (_, Presence::Foreign { .. } | Presence::Lost) => 0,
        (Item::Volume(_), Presence::Partial) => seen.bytes.saturating_sub(seen.allocated_bytes),
        (Item::Volume(_), _) if seen.shared => seen.bytes,
        (Item::Volume(_), _) => seen.bytes.saturating_sub(seen.allocated_bytes),
    }
}

fn share(bytes: u64, percent: u32) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}
