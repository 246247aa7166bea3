//! What has happened, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counts since the transport was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)+
        }

        /// The live side of [`Counters`].
        #[derive(Debug, Default)]
        pub(super) struct Counts {
            $(pub(super) $name: Count,)+
        }

        impl Counts {
            pub(super) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.0.load(Ordering::Relaxed),)+ }
            }
        }
    };
}

counters! {
    /// Calls made.
    calls,
    /// Calls sent once more because the link broke or the target's queue was missing.
    resent,
    /// Calls that got no answer in time.
    timeouts,
    /// Connections made after the first.
    reconnects,
    /// Requests taken from the broker and given to a handler.
    served,
    /// Messages dropped because they did not follow the wire format.
    malformed,
    /// Requests recognised as copies of one already taken.
    duplicates,
    /// Answers given up because their caller's queue did not come back.
    unroutable_replies,
    /// Answers that belonged to no call of ours, mostly late ones.
    unknown_replies,
    /// Handlers that panicked; their callers were told.
    panics,
}

/// One counter.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
