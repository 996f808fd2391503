//! Layers as block devices: FUSE files, loop devices, EROFS mounts, hand-over to the kernel.
//!
//! Bytes come through [`BlockSource`]; where they come from is not known here. What is mounted is given back by the kernel when
//! its last user goes, also when the agent dies: loop devices free themselves.
//!
//! Two halves talk over a socket: the *server* has the FUSE mount and answers what is local; [`BlockFs`], the agent's half,
//! has the sources. Both may be in one process, or the server in one of its own ([`serve`]): then agents come and go, and
//! readers notice at most that bytes from the network take longer.

mod client;
mod device;
mod options;
mod protocol;
mod server;
mod source;

use std::path::PathBuf;

pub use client::BlockFs;
pub use device::{Device, ImageMount};
pub use options::{Choice, Options, Way};
pub use protocol::VERSION as PROTOCOL_VERSION;
pub use server::serve;
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
    /// The server of block files, or the way to it.
    #[error("the server of block files at {} fails", path.display())]
    Server {
        /// Its socket, or its mount.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The server speaks another version: it must be ended (its images unmounted) and started anew.
    #[error("the server of block files speaks version {server}, this agent {agent}")]
    ServerVersion {
        /// The server's.
        server: u64,
        /// Ours.
        agent: u64,
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
