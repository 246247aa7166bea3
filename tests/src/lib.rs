//! Whole-suite tests, and what fuzzers and tests feed with hostile bytes.

pub mod hostile;
