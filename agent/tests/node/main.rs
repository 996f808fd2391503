//! The binary on a real node: FUSE, loop devices, EROFS, overlayfs, runc. Needs root and busybox-static.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stderr, reason = "a test may panic")]

mod death;
mod errors;
mod fall_back;
mod images;
mod memory;
mod one_device;
mod outage;
mod profiles;
mod rig;
mod run;
