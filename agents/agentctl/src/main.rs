//! The command line that lists and drives Stackhand's agents.

fn main() {}
