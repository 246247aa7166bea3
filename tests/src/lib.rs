//! Pieces of whole-suite tests, and what fuzzers and tests feed with hostile bytes.

pub mod hostile;
mod said;

pub use said::Said;
