//! The snapshotter over real mounts: what containerd's own suite asks of a snapshotter, and layers that the node serves.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ordinary;
mod restart;
mod rig;
mod served;
mod suite;
