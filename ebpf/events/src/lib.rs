//! What passes between the eBPF programs and the agent: records, map keys and values, kernel offsets.
//!
//! One definition for both sides, `no_std`, plain old data without padding, in the byte order of the machine (both sides
//! run on it). Every record begins with a [`Head`] that says which one it is and of which [`VERSION`]; the
//! agent refuses others. This crate knows neither aya nor the kernel.
#![no_std]

mod call;
mod maps;
mod offsets;
mod records;

pub use call::Call;
pub use maps::{
    CHUNK_PAGES, CHUNK_SHIFT, DROP_COUNTERS, Drop, FillKey, FillValue, WATCH_BUCKETS, WATCH_WAYS, Waiting,
    WatchBucket, watch_bucket,
};
pub use offsets::{ABSENT, Offsets, OverlayFile, SwitchState};
pub use records::{
    AccessEvent, BASE_DEPTH, BlockedEvent, COMM_LEN, ExecEvent, FailedEvent, Head, Kind, NAME_LEN, OpenEvent,
    PATH_LEN, level,
};

/// Version of everything in this crate. Any change of a layout or of a meaning raises it.
pub const VERSION: u8 = 2;

/// `EROFS_SUPER_MAGIC_V1`, `linux/magic.h`.
pub const EROFS_MAGIC: u64 = 0xE0F5_E1E2;
/// `OVERLAYFS_SUPER_MAGIC`, `linux/magic.h`.
pub const OVERLAY_MAGIC: u64 = 0x794C_7630;
