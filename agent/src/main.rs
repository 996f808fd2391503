//! The `sluice` binary: command line, daemon, and the wiring of the crates.
fn main() {}
