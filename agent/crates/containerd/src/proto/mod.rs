//! The wire of containerd's services, generated from `protos/` (see `protos/generate`).
#![allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "generated"
)]

pub mod content;
pub mod diff;
pub mod images;
pub mod leases;
pub mod snapshots;
pub mod types;
