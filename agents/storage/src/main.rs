//! Stackhand's storage agent.

fn main() {}
