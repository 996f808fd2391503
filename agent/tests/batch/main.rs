//! `sluice batch` on a real node: scripts, containers, control groups, restarts. Needs root and busybox-static.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stderr, reason = "a test may panic")]

mod api_server;
mod images;
mod jobs;
mod kubernetes;
mod many;
mod restarts;
#[path = "../node/rig.rs"]
#[allow(dead_code, reason = "shared with the node's tests, which use all of it")]
mod rig;
mod runnables;
mod states;
