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

/// Where the bytes of a read were when it came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Origin {
    /// It was not recorded.
    #[default]
    Unknown = 0,
    /// In the page cache.
    Memory = 1,
    /// In the layer store since before the start, or for the fill or another read.
    Disk = 2,
    /// In the layer store, from the start pack.
    StartPack = 3,
    /// In the layer store, fetched ahead by the profile.
    Prefetch = 4,
    /// In the registry: the reader waited for the network.
    Registry = 5,
}

impl Origin {
    /// All of them, by number.
    pub const ALL: [Self; 6] =
        [Self::Unknown, Self::Memory, Self::Disk, Self::StartPack, Self::Prefetch, Self::Registry];

    /// As exports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::StartPack => "start pack",
            Self::Prefetch => "prefetch",
            Self::Registry => "registry",
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| *one as u8 == number)
    }
}

/// For whom bytes are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum FetchLane {
    /// A process is blocked.
    Demand = 0,
    /// The profile says that one will be.
    Prefetch = 1,
    /// The rest of the image.
    Fill = 2,
    /// The start pack.
    StartPack = 3,
    /// What has to be known before: manifests, lists of artifacts, tables of contents, profiles. Bytes are not counted.
    Lookup = 4,
}

impl FetchLane {
    /// All of them, by number.
    pub const ALL: [Self; 5] = [Self::Demand, Self::Prefetch, Self::Fill, Self::StartPack, Self::Lookup];

    /// As exports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Prefetch => "prefetch",
            Self::Fill => "fill",
            Self::StartPack => "start pack",
            Self::Lookup => "lookup",
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| *one as u8 == number)
    }
}

/// A step on the way from the request for an image to a container that is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Phase {
    /// From the request to a root file system: the steps below are in it.
    Pull = 0,
    /// What the reference names is asked of the registry.
    Resolve = 1,
    /// Tables of contents are brought, or made by a first pull, and merged.
    Index = 2,
    /// The image is mounted.
    Mount = 3,
    /// What is known of the start is looked for: its profile and its start pack. Beside the others.
    Profile = 4,
}

impl Phase {
    /// All of them, by number.
    pub const ALL: [Self; 5] = [Self::Pull, Self::Resolve, Self::Index, Self::Mount, Self::Profile];

    /// As exports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Resolve => "resolve",
            Self::Index => "index",
            Self::Mount => "mount",
            Self::Profile => "profile",
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| *one as u8 == number)
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
    /// The call's name.
    pub fn name(&self) -> &'static str {
        match self.call {
            Call::Rename => "rename",
            Call::Renameat => "renameat",
            Call::Renameat2 => "renameat2",
            Call::Link => "link",
            Call::Linkat => "linkat",
            Call::Lchown => "lchown",
            Call::Fchownat => "fchownat",
            Call::Utimensat => "utimensat",
            Call::AnyRename => "any rename",
            Call::AnyLink => "any link",
            Call::AnyAttributes => "any change of attributes",
        }
    }

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
        /// Nanoseconds from the request, which is the record's time, to the answer.
        service_ns: u64,
        /// Where they were.
        from: Origin,
    },
    /// The container is ready, as its owner defines it.
    Ready,
    /// A step before the container's start. The record's time is that of its beginning.
    Phase {
        /// Which.
        phase: Phase,
        /// Nanoseconds.
        took_ns: u64,
    },
    /// One request for bytes of a layer's blob or of a start pack, or to look something up. The record's time is that of the request.
    Fetch {
        /// For whom.
        lane: FetchLane,
        /// Number of the layer; `None` for a start pack and a look-up.
        layer: Option<u32>,
        /// First byte of the blob.
        offset: u64,
        /// Bytes that came.
        len: u64,
        /// Nanoseconds until the first of them came.
        first_byte_ns: u64,
        /// Nanoseconds until the last of them came.
        took_ns: u64,
        /// Whether all came that was asked for.
        whole: bool,
    },
    /// Bytes of a layer's local file arrived and were verified.
    Brought {
        /// For whom they were fetched.
        lane: FetchLane,
        /// Number of the layer.
        layer: u32,
        /// First byte in the layer's local file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A file that other records speak of, by its inode number or by its place in a layer. Stands before them.
    File {
        /// Inode number in the image; 0: not known.
        inode: u64,
        /// Number of the layer.
        layer: u32,
        /// First byte in the layer's local file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Path relative to the image's root.
        path: Vec<u8>,
    },
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
