//! Manifests: from text to what each agent is sent.
//!
//! [`source`] reads text, [`expand`] writes out short forms, [`complete`] fills gaps from what the
//! agents hold, [`place`] says who needs what, [`plan`] what is sent. All of it is pure but the
//! reading of files; `apply.rs` carries plans out.

pub(crate) mod addresses;
pub(crate) mod allocate;
pub(crate) mod check;
pub(crate) mod complete;
pub(crate) mod draft;
pub(crate) mod expand;
pub(crate) mod floating;
pub(crate) mod guest;
pub(crate) mod held;
pub(crate) mod hosts;
pub(crate) mod outgrown;
pub(crate) mod place;
pub(crate) mod plan;
pub(crate) mod room;
pub(crate) mod shelf;
pub(crate) mod source;
pub(crate) mod spots;
#[cfg(test)]
mod tests;
