//! Probes in the daemon, on the running kernel: what starts touch, which calls fail, and what `sluice doctor` says. Needs root,
//! busybox-static, and a kernel whose tracepoints programs may be attached to.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stderr, reason = "a test may panic")]

mod doctor;
mod faults;
mod ranges;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "../node/rig.rs"]
mod rig;
