//! A real containerd with the sluice binary as its only snapshotter, and a registry: pull, run, restart, remove.
//!
//! Needs root, containerd, runc, FUSE, EROFS and loop devices; what is missing fails the tests.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

mod credentials;
mod cri;
mod images;
mod kubernetes;
mod lifetime;
mod policy;
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    unreachable_pub,
    dead_code,
    reason = "generated"
)]
mod proto {
    pub(crate) mod runtime;
}
mod pull;
mod rig;
mod runtime_client;
mod starts;
