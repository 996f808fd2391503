//! Probes: what containers do with streamed file systems, seen by eBPF programs in the kernel.
//!
//! [`Probes::load`] puts the programs into the running kernel, each capability by the best hook that this kernel has, and
//! says which that is ([`sluice_trace::Levels`]). [`Probes::watch`] names a file system by its device number; until
//! [`Probes::unwatch`] its accesses come out of [`Probes::drain`] as [`Event`]s and out of [`Probes::take_fills`].
//! Nothing is resolved to paths here, except for calls that failed: inode numbers are the image's.
//!
//! What costs something on every page or open of the machine is attached only while something is watched.
#![warn(clippy::indexing_slicing)]

mod attach;
mod btf;
mod choose;
mod decode;
mod hooks;
mod offsets;
mod probes;
mod resolve;
mod trampoline;

pub use btf::BtfError;
pub use decode::{Event, RecordError};
pub use probes::{Losses, Options, ProbeError, Probes};
pub use resolve::{mount_namespace_of, processes};

/// Device number of a file system as the kernel holds it: major << 20 | minor. Not what `stat` gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(pub u32);

impl Device {
    /// From `st_dev` of a file. Of an overlay's file this is the overlay's, not the layer's.
    pub fn from_stat(st_dev: u64) -> Self {
        let (major, minor) = (nix::sys::stat::major(st_dev), nix::sys::stat::minor(st_dev));
        // The kernel has 12 bits of major and 20 of minor number.
        Self(((major & 0xFFF) << 20 | minor & 0xF_FFFF) as u32)
    }
}
