//! Keys and values of the maps.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::records::COMM_LEN;

/// Pages that one entry of a map stands for, as a power of two: 128 KiB.
pub const CHUNK_SHIFT: u32 = 5;
/// Pages that one entry of a map stands for.
pub const CHUNK_PAGES: usize = 1 << CHUNK_SHIFT;

/// Places of watched file systems: the map has so many buckets of [`WATCH_WAYS`].
pub const WATCH_BUCKETS: u32 = 512;
/// Watched file systems that fit in one bucket.
pub const WATCH_WAYS: usize = 2;
/// A watched file system: its device number in the upper half, the number of the watch in the lower; 0: none.
pub type WatchBucket = [u64; WATCH_WAYS];

/// The bucket of a device number. Minor numbers follow one another.
#[must_use]
pub const fn watch_bucket(dev: u32) -> u32 {
    (dev ^ dev >> 20) % WATCH_BUCKETS
}

/// A stretch of [`CHUNK_PAGES`] pages of a file, as seen from one mount namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FillKey {
    /// Inode number in the watched file system.
    pub inode: u64,
    /// Page number >> [`CHUNK_SHIFT`].
    pub chunk: u64,
    /// Number of the watch (not of the device: those are given out again).
    pub watch: u32,
    /// Inode number of the mount namespace.
    pub mnt_ns: u32,
}

/// Pages of a chunk that came into the page cache, asked for or read ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FillValue {
    /// When the first one came, `CLOCK_MONOTONIC`, nanoseconds.
    pub first_ns: u64,
    /// Control group of the process that asked for it.
    pub cgroup: u64,
    /// Process that asked for it.
    pub tgid: u32,
    /// Thread that asked for it.
    pub pid: u32,
    /// Its name.
    pub comm: [u8; COMM_LEN],
    /// A byte per page, not 0: it came. Bytes, since two processors may write here and 5.10 has no atomic *or*.
    pub pages: [u8; CHUNK_PAGES],
}

/// What a thread last asked of a watched file system, in case it has to sleep for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Waiting {
    /// Inode number in the watched file system.
    pub inode: u64,
    /// First page asked for, or first of the run of pages that are brought into memory for it.
    pub page: u64,
    /// Page behind that run.
    pub run_end: u64,
    /// When it went to sleep; 0: it runs.
    pub since_ns: u64,
    /// Its control group.
    pub cgroup: u64,
    /// Device number of the watched file system.
    pub dev: u32,
    /// Its mount namespace.
    pub mnt_ns: u32,
    /// Its process.
    pub tgid: u32,
    /// Not 0: `page` is the page of a fault, and stays.
    pub exact: u32,
    /// Number of the watch: it may be over when the thread sleeps.
    pub watch: u32,
    /// Zero.
    pub reserved: u32,
    /// Its name.
    pub comm: [u8; COMM_LEN],
}

/// What is lost, index into the map of counters (64-bit, one per processor).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Drop {
    /// Records that found no room in the ring buffer.
    RingFull = 0,
    /// Page-cache fills that found no room in their map.
    FillMapFull = 1,
    /// Failed calls beyond the limit per second.
    TooManyFailures = 2,
}

/// Number of counters.
pub const DROP_COUNTERS: u32 = 3;

#[cfg(test)]
mod tests {
    use core::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_are_fixed() {
        assert_eq!(size_of::<FillKey>(), 24);
        assert_eq!(offset_of!(FillKey, watch), 16);
        assert_eq!(size_of::<FillValue>(), 72);
        assert_eq!(offset_of!(FillValue, pages), 40);
        assert_eq!(size_of::<Waiting>(), 80);
        assert_eq!(offset_of!(Waiting, comm), 64);
        assert_eq!(Drop::TooManyFailures as u32 + 1, DROP_COUNTERS);
    }

    #[test]
    fn devices_that_follow_one_another_share_no_bucket() {
        // Major numbers 7 (loop) and 0 (anonymous), as `dev_t` has them in the kernel.
        for major in [0, 7 << 20] {
            let buckets: [u32; 3] = core::array::from_fn(|minor| watch_bucket(major + minor as u32));
            assert!(buckets.iter().all(|bucket| *bucket < WATCH_BUCKETS));
            assert!(buckets[0] != buckets[1] && buckets[1] != buckets[2]);
        }
    }
}
