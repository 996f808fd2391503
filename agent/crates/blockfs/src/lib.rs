//! Layers as block devices: FUSE files, loop devices, EROFS mounts, hand-over to the kernel.
//!
//! Bytes come through [`BlockSource`]; where they come from is not known here. What is mounted is given back by the kernel when
//! its last user goes, also when the agent dies: loop devices free themselves.

mod device;
mod fuse;
mod source;

use std::path::PathBuf;

pub use device::{Device, ImageMount};
pub use fuse::BlockFs;
pub use source::{BlockSource, ReadError};

/// What could not be attached or mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockFsError {
    /// The FUSE mount.
    #[error("cannot mount FUSE on {}", path.display())]
    Fuse {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A backing file.
    #[error("cannot open {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A loop device.
    #[error(transparent)]
    Loop(#[from] sluice_kernel::LoopError),
    /// A mount.
    #[error(transparent)]
    Mount(#[from] sluice_kernel::MountError),
    /// The mount table.
    #[error(transparent)]
    MountInfo(#[from] sluice_kernel::mountinfo::MountInfoError),
}
