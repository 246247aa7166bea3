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

use crate::backend::{Item, Observed, Presence, Seen};

/// How much of a backend may be promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Promises, in percent of what is free.
    pub overcommit_percent: u32,
    /// Part of the whole that is never promised, in percent.
    pub reserved_percent: u32,
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
        (Item::Volume(_), Presence::Ready) if seen.shared => seen.bytes,
        (Item::Volume(_), Presence::Ready | Presence::Partial) => {
            seen.bytes.saturating_sub(seen.allocated_bytes)
        }
    }
}

fn share(bytes: u64, percent: u32) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}
