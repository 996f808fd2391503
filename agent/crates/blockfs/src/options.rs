//! How block files are served, chosen at run time.

use std::fmt;
use std::time::Duration;

/// A way in which the kernel's requests reach us and its replies go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As io_uring, but the bytes are read straight into the pages of whoever reads (Linux 7.3).
    ZeroCopy,
    /// FUSE over io_uring (Linux 6.14): a queue per CPU, bytes read from the layer's file straight into the reply.
    IoUring,
    /// Reading and writing `/dev/fuse`, by fuser.
    Classic,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ZeroCopy => "zero_copy",
            Self::IoUring => "io_uring",
            Self::Classic => "classic",
        })
    }
}

/// Which way is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// io_uring where it can be had, else classic, with the reason in the log and in [`crate::BlockFs::way`].
    #[default]
    Auto,
    /// Zero copy where it can be had, else as [`Self::Auto`].
    ZeroCopy,
    /// This one or none.
    Only(Way),
}

impl Choice {
    /// The way that comes of it on a node that has io_uring and zero copy, or has not.
    pub fn way(self, io_uring: bool, zero_copy: bool) -> Way {
        match self {
            Self::Only(way) => way,
            Self::ZeroCopy if zero_copy => Way::ZeroCopy,
            Self::ZeroCopy | Self::Auto if io_uring => Way::IoUring,
            Self::ZeroCopy | Self::Auto => Way::Classic,
        }
    }
}

/// How a server of block files works.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The way.
    pub choice: Choice,
    /// Requests that each CPU's queue can hold at first (io_uring). Each read that waits for the network takes one until it
    /// is answered; a queue that gets short of them is made longer.
    pub queue_depth: u16,
    /// Of those, how many have a registered payload buffer, which is pinned in memory.
    pub registered: u16,
    /// Bytes that one request may ask for at most (io_uring): a multiple of 4096, no more than 1 MiB. Each registered buffer is as
    /// large; 256 KiB was as fast as 1 MiB (`examples/read_speed.rs`, a busy machine), and makes 1 MiB a CPU.
    pub request_bytes: u32,
    /// How long reads wait for an agent that is gone. Then they fail with EIO, until one comes.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            queue_depth: 16,
            registered: 4,
            request_bytes: 256 << 10,
            patience: Duration::from_secs(300),
        }
    }
}
