//! Stackhand's compute agent.

fn main() {}
