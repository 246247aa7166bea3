//! Stackhand's network agent.

fn main() {}
