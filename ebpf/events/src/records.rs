//! Records in the ring buffer.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a command name, `TASK_COMM_LEN`; NUL-padded.
pub const COMM_LEN: usize = 16;
/// Bytes kept of a path; longer ones are cut, shorter ones end with a NUL.
pub const PATH_LEN: usize = 256;

/// Bytes kept of a directory's name; longer ones are cut, shorter ones end with a NUL.
pub const NAME_LEN: usize = 64;
/// Names kept of the way to a directory.
pub const BASE_DEPTH: usize = 12;

/// By which kind of hook a record was made, `Head::level`.
pub mod level {
    /// Tracepoint.
    pub const TRACEPOINT: u8 = 1;
    /// Kernel probe at a function.
    pub const KPROBE: u8 = 2;
    /// Trampoline at a function's entry or exit.
    pub const FEXIT: u8 = 3;
}

/// Which record follows a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// [`OpenEvent`].
    Open = 1,
    /// [`ExecEvent`].
    Exec = 2,
    /// [`AccessEvent`]: asked for by `read` and its like.
    Read = 3,
    /// [`AccessEvent`]: a page fault of a mapping, exact.
    Fault = 4,
    /// [`AccessEvent`]: pages that the kernel mapped around a fault, which were in memory. One of them was touched.
    Around = 5,
    /// [`BlockedEvent`].
    Blocked = 6,
    /// [`FailedEvent`].
    Failed = 7,
    /// [`AccessEvent`]: a folio larger than a chunk came into the page cache. Smaller ones are marked in a map.
    Fill = 8,
}

impl Kind {
    /// The kind with this number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Open,
            2 => Self::Exec,
            3 => Self::Read,
            4 => Self::Fault,
            5 => Self::Around,
            6 => Self::Blocked,
            7 => Self::Failed,
            8 => Self::Fill,
            _ => return None,
        })
    }
}

/// How every record begins: when, who, what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time_ns: u64,
    /// Control group (version 2) of the process; the same for all where only version 1 is mounted.
    pub cgroup: u64,
    /// Inode number of the process's mount namespace; 0: unknown.
    pub mnt_ns: u32,
    /// A [`Kind`].
    pub kind: u16,
    /// [`crate::VERSION`].
    pub version: u8,
    /// One of [`level`].
    pub level: u8,
    /// Process (thread group), in the initial PID namespace.
    pub tgid: u32,
    /// Thread, in the initial PID namespace.
    pub pid: u32,
    /// The thread's name.
    pub comm: [u8; COMM_LEN],
}

/// Pages of a file of a watched file system that were touched; some of them for the first time in their mount namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AccessEvent {
    /// Who and when.
    pub head: Head,
    /// Inode number in the watched file system.
    pub inode: u64,
    /// First page, in pages of 4096 bytes from the file's beginning.
    pub first_page: u64,
    /// How many pages.
    pub pages: u32,
    /// Device number of the watched file system, as the kernel holds it: major << 20 | minor.
    pub dev: u32,
}

/// The first open of a file of a watched file system in its mount namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenEvent {
    /// Who and when.
    pub head: Head,
    /// Inode number in the watched file system.
    pub inode: u64,
    /// Device number, as in [`AccessEvent`].
    pub dev: u32,
    /// Zero.
    pub reserved: u32,
}

/// A program of a watched file system was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExecEvent {
    /// Who and when.
    pub head: Head,
    /// Inode number in the watched file system.
    pub inode: u64,
    /// Device number, as in [`AccessEvent`].
    pub dev: u32,
    /// Zero.
    pub reserved: u32,
    /// The path as it was given to the kernel.
    pub path: [u8; PATH_LEN],
}

/// A thread slept until bytes of a watched file system were there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlockedEvent {
    /// Who slept; the time is that of the waking.
    pub head: Head,
    /// Inode number in the watched file system.
    pub inode: u64,
    /// First page of what was asked for.
    pub page: u64,
    /// From going to sleep to running again, nanoseconds.
    pub blocked_ns: u64,
    /// Device number, as in [`AccessEvent`].
    pub dev: u32,
    /// Zero.
    pub reserved: u32,
}

/// A call that changes a name or attributes failed.
///
/// Seen from inside the kernel, it is one on a symbolic link of an overlay or of a watched file system, and `old` and `new` are
/// last components. Seen at a system call, it is one that begins in such a file system, `old` and `new` are as the process
/// gave them, and what `old` names is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FailedEvent {
    /// Who and when.
    pub head: Head,
    /// Inode number; 0: unknown.
    pub inode: u64,
    /// Magic number of the file system.
    pub magic: u64,
    /// Device number of the file system (of the overlay), as in [`AccessEvent`].
    pub dev: u32,
    /// What the call failed with, positive.
    pub errno: u32,
    /// A [`crate::Call`].
    pub call: u16,
    /// Type and permissions as `st_mode`; 0: unknown.
    pub mode: u16,
    /// Flags of the call.
    pub flags: u32,
    /// Directory that `old` begins at: the names on the way to it from the file system's root, the nearest first. The first
    /// empty one ends them; without an empty one they are not all.
    pub base: [[u8; NAME_LEN]; BASE_DEPTH],
    /// Path or name of what the call was about.
    pub old: [u8; PATH_LEN],
    /// The new path or name, if the call has one.
    pub new: [u8; PATH_LEN],
}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_are_fixed() {
        assert_eq!((size_of::<Head>(), align_of::<Head>()), (48, 8));
        assert_eq!(offset_of!(Head, mnt_ns), 16);
        assert_eq!(offset_of!(Head, kind), 20);
        assert_eq!(offset_of!(Head, tgid), 24);
        assert_eq!(offset_of!(Head, comm), 32);
        assert_eq!(size_of::<AccessEvent>(), 72);
        assert_eq!(offset_of!(AccessEvent, first_page), 56);
        assert_eq!(offset_of!(AccessEvent, dev), 68);
        assert_eq!(size_of::<OpenEvent>(), 64);
        assert_eq!(size_of::<ExecEvent>(), 64 + PATH_LEN);
        assert_eq!(size_of::<BlockedEvent>(), 80);
        assert_eq!(offset_of!(BlockedEvent, blocked_ns), 64);
        assert_eq!(size_of::<FailedEvent>(), 80 + BASE_DEPTH * NAME_LEN + 2 * PATH_LEN);
        assert_eq!(offset_of!(FailedEvent, errno), 68);
        assert_eq!(offset_of!(FailedEvent, base), 80);
        // All records differ in length, and every head is at their beginning.
        assert_eq!(offset_of!(FailedEvent, head) + offset_of!(ExecEvent, head), 0);
    }

    #[test]
    fn kinds_are_found_by_their_numbers() {
        for number in 0..=9 {
            let kind = Kind::from_number(number);
            assert_eq!(kind.map(|kind| kind as u16), (1..=8).contains(&number).then_some(number));
        }
    }
}
