//! One thing that a container did.

use sluice_events::Call;

/// Who did something. Numbers are those of the initial namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// Process.
    pub tgid: u32,
    /// Thread.
    pub pid: u32,
    /// Inode number of the mount namespace; 0: unknown.
    pub mnt_ns: u32,
    /// Number of the control group (version 2).
    pub cgroup: u64,
    /// Name of the thread.
    pub comm: String,
}

/// How bytes came to be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum AccessKind {
    /// `read` and its like.
    Read = 0,
    /// A page fault, exact.
    Fault = 1,
    /// Pages in memory mapped around a fault; one of them was touched.
    Around = 2,
    /// Brought into the page cache, asked for or read ahead.
    Fill = 3,
}

impl AccessKind {
    /// The kind with this number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Read, Self::Fault, Self::Around, Self::Fill].into_iter().find(|kind| *kind as u8 == number)
    }
}

/// A call that changes a name or attributes failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedCall {
    /// Which.
    pub call: Call,
    /// With what, positive.
    pub errno: u32,
    /// Flags of the call.
    pub flags: u32,
    /// Path of what it was about, from the root of its file system if `whole_path`, else only its end.
    pub path: Vec<u8>,
    /// Whether `path` is whole.
    pub whole_path: bool,
    /// The new path or name as it was given; empty if the call has none.
    pub new_path: Vec<u8>,
    /// Device number of the file system (an overlay's, if it is one): major << 20 | minor.
    pub dev: u32,
    /// Magic number of the file system.
    pub magic: u64,
    /// Inode number, if it is known.
    pub inode: Option<u64>,
    /// Type and permissions of the file as `st_mode`, if they are known.
    pub mode: Option<u16>,
}

impl FailedCall {
    /// Whether it was about a symbolic link; `None`: not known.
    pub fn on_symlink(&self) -> Option<bool> {
        self.mode.map(|mode| mode & 0o170_000 == 0o120_000)
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// A file of the image was opened, for the first time in its mount namespace.
    Open {
        /// Inode number in the image.
        inode: u64,
    },
    /// A program of the image was started.
    Exec {
        /// Inode number in the image.
        inode: u64,
        /// The path as it was given to the kernel, at most 255 bytes.
        path: Vec<u8>,
    },
    /// Bytes of a file were touched; some of them for the first time.
    Access {
        /// How.
        kind: AccessKind,
        /// Inode number in the image.
        inode: u64,
        /// First byte; a multiple of 4096.
        offset: u64,
        /// Bytes; a multiple of 4096, so it may reach beyond the file's end.
        len: u64,
    },
    /// A thread slept until bytes were there. The record's time is that of its waking.
    Blocked {
        /// Inode number in the image.
        inode: u64,
        /// First byte of what it had asked for.
        offset: u64,
        /// Nanoseconds from going to sleep to running again.
        blocked_ns: u64,
    },
    /// A call failed.
    Failed(FailedCall),
    /// The agent served bytes of a layer (level 0).
    Served {
        /// Number of the layer, from 0, in the order they were applied.
        layer: u32,
        /// First byte in the layer's local file.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Nanoseconds from the request to the answer.
        service_ns: u64,
    },
    /// The container is ready, as its owner defines it.
    Ready,
}

/// One thing that a container did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time_ns: u64,
    /// Who. For what the agent does, nobody.
    pub process: Process,
    /// What.
    pub what: What,
}
