//! Whose indexes a node believes, and what becomes of one that lies. Needs root and busybox-static.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stderr, reason = "a test may panic")]
#![allow(dead_code, reason = "the rig is shared with the tests of the node")]

mod lies;
mod modes;
#[path = "../node/rig.rs"]
mod rig;
mod secrets;
