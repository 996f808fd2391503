//! What is remembered so that what is recorded already, or concerns nobody, costs little: most of what programs do. These maps are arrays
//! with one place for each thing, whose look-up is no call, and what they hold may be overwritten at any time.

use crate::kernel::Watched;
use crate::maps::{ROUND, SEEN};

/// Of 32 bytes: files and chunks of a large start, and of some beside it.
pub const SEEN_SLOTS: u32 = 65_536;
/// Odd, and without a pattern: 2^64 by the golden ratio.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
const CHECK: u64 = 0xffff_ffff_0000_0000;
/// A chunk that no file has.
const OPEN: u64 = u64::MAX;

/// The number of the latest change of what is watched.
#[inline(always)]
pub fn round() -> u32 {
    // One that is replaced meanwhile belongs to what was so just before.
    ROUND.get(0).copied().unwrap_or(0)
}

/// Pages of a file, or its being open, recorded for whoever is in a mount namespace: where that is remembered, and as what. 96 bits of a hash
/// stand for which.
pub struct Seen {
    slot: u32,
    tag: u64,
    check: u64,
    pages: u64,
}

/// A [`Seen`] in the map. Processors write here without asking each other: a half of one and a half of another fit nothing.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Remembered {
    tag: u64,
    /// In the upper half more of the tag, in the lower the pages, a bit each.
    pages: u64,
}

/// Where something of a chunk of a file is remembered for whoever is in a mount namespace. Not at random: inodes of files that are used one
/// after the other are often neighbours, and then so are these, and in the processor's cache.
#[inline(always)]
fn slot(inode: u64, chunk: u64, mnt_ns: u32) -> u32 {
    let elsewhere = (chunk as u32 ^ mnt_ns).wrapping_mul(MIX as u32);
    // Most inodes take two numbers or more.
    ((inode >> 1) as u32).wrapping_add(elsewhere) & (SEEN_SLOTS - 1)
}

/// Namespaces' numbers are given out again, but not within one watch: each start begins a new one.
#[inline(always)]
fn who(watch: u32, mnt_ns: u32) -> u64 {
    u64::from(watch) << 32 | u64::from(mnt_ns)
}

/// The latest two that belong there, the latest first.
pub type Place = [Remembered; 2];

impl Seen {
    /// Pages of one chunk.
    #[inline(always)]
    pub fn pages(watched: Watched, chunk: u64, pages: u32, mnt_ns: u32) -> Self {
        Self::new(
            slot(watched.inode, chunk, mnt_ns),
            [watched.inode, chunk, who(watched.watch, mnt_ns)],
            pages,
        )
    }

    /// Pages from `first` to `last`, of many chunks: known is from where on, until there. A call that reads them comes by again and again, with
    /// less before it.
    #[inline(always)]
    pub fn run(watched: Watched, first: u64, last: u64, mnt_ns: u32) -> Self {
        let slot = slot(watched.inode, last, mnt_ns);
        let from = u32::try_from(first).unwrap_or(u32::MAX);
        Self::new(slot, [watched.inode, !last, who(watched.watch, mnt_ns)], from)
    }

    /// That a file is open.
    #[inline(always)]
    pub fn open(watched: Watched, mnt_ns: u32) -> Self {
        Self::new(slot(watched.inode, 0, mnt_ns), [watched.inode, OPEN, who(watched.watch, mnt_ns)], 1)
    }

    /// The same of an overlay's file. Should one of another layer that is mounted by itself have the same number and size, the second is
    /// not seen.
    #[inline(always)]
    pub fn open_above(dev: u32, inode: u64, size: u64, mnt_ns: u32) -> Self {
        Self::new(slot(inode, 0, mnt_ns), [inode, size ^ u64::from(dev) << 32, who(round(), mnt_ns)], 1)
    }

    #[inline(always)]
    fn new(slot: u32, of: [u64; 3], pages: u32) -> Self {
        let (mut tag, mut check) = (0, 0);
        for one in of {
            tag = (tag ^ one).wrapping_mul(MIX);
            tag ^= tag >> 32;
            check = (check ^ tag).wrapping_mul(MIX);
        }
        Self { slot, tag, check: check & CHECK, pages: u64::from(pages) }
    }

    /// Whether it is known to be recorded.
    #[inline(always)]
    pub fn is_known(&self) -> bool {
        self.place().and_then(|place| self.in_place(place)).is_some_and(|pages| self.pages & !pages == 0)
    }

    /// It is recorded. Says whether that was new.
    #[inline(always)]
    pub fn remember(&self) -> bool {
        self.put(|known, pages| known | pages)
    }

    /// The same of [`Self::run`].
    #[inline(always)]
    pub fn remember_run(&self) -> bool {
        self.put(|known, first| if known < first { known } else { first })
    }

    #[inline(always)]
    fn put(&self, combine: impl Fn(u64, u64) -> u64) -> bool {
        let Some(place) = self.place() else { return true };
        let known = self.in_place(place);
        let pages = known.map_or(self.pages, |known| combine(known, self.pages));
        if known == Some(pages) {
            return false;
        }
        // SAFETY: the pointer is to a place of the map.
        unsafe {
            let [first, second] = [&raw mut (*place)[0], &raw mut (*place)[1]];
            let former = first.read_volatile();
            if former.tag != self.tag {
                second.write_volatile(former);
            }
            first.write_volatile(Remembered { tag: self.tag, pages: self.check | pages });
        }
        true
    }

    #[inline(always)]
    fn place(&self) -> Option<*mut Place> {
        SEEN.get_ptr_mut(self.slot)
    }

    /// What is known of it.
    #[inline(always)]
    fn in_place(&self, place: *mut Place) -> Option<u64> {
        for way in 0..2 {
            // SAFETY: the pointer is to a place of the map. What another processor is writing may come in halves, which do not fit.
            let found = unsafe { (&raw const (*place)[way]).read_volatile() };
            if (found.tag ^ self.tag) | (found.pages ^ self.check) & CHECK == 0 {
                return Some(found.pages & !CHECK);
            }
        }
        None
    }
}
