//! Verified chunks that are not in the file yet, or not on the disk for good: they are queued for the writer, or the disk was full, or
//! failed. Readers get them from here.
//!
//! The order of things is what makes this safe. A chunk is here before its bits are set; it leaves only after it was written, one
//! that the disk did not take at first only after it was flushed, or else after its bits were cleared and `evictions` counted up. So a
//! reader that looks at the bits, then here, then at the file has every byte, unless `evictions` changed meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sluice_image::records::BLOCK_SIZE;

use crate::space::Space;

/// A layer may hold this much whatever other layers hold, so that each reader comes to its bytes. More than the kernel's largest
/// read.
const ALWAYS_ALLOWED: u64 = 4 << 20;

/// See the module text.
#[derive(Debug)]
pub(crate) struct Memory {
    held: Mutex<Held>,
    /// A queued chunk was written, or was not.
    changed: Condvar,
    /// Chunks held.
    count: AtomicUsize,
    /// Bytes held, but for what is queued.
    bytes: AtomicU64,
    evictions: AtomicU64,
    space: Arc<Space>,
}

#[derive(Debug, Default)]
struct Held {
    chunks: BTreeMap<u64, Chunk>,
    /// Store offsets of what is not queued, oldest first.
    order: VecDeque<u64>,
}

#[derive(Debug)]
struct Chunk {
    bytes: Bytes,
    /// The writer is about to write it.
    queued: bool,
}

impl Memory {
    pub(crate) fn new(space: Arc<Space>) -> Self {
        Self {
            held: Mutex::default(),
            changed: Condvar::new(),
            count: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            space,
        }
    }

    /// Bytes held, but for what is queued.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Acquire)
    }

    /// Bits were cleared: whoever saw them looks again.
    pub(crate) fn cleared(&self) {
        self.evictions.fetch_add(1, Ordering::AcqRel);
    }

    /// Keeps a chunk if there is room, and then sets its bits by `remember`. For an urgent one the oldest make room: `forget` clears
    /// their bits. Both under one lock: a bit set when the chunk had gone again would show a hole.
    pub(crate) fn keep(
        &self,
        start: u64,
        bytes: Bytes,
        urgent: bool,
        forget: impl Fn(Range<u64>),
        remember: impl Fn(Range<u64>),
    ) -> bool {
        let len = bytes.len() as u64;
        let mut held = self.lock();
        if held.chunks.contains_key(&start) {
            // The same bytes, since both were verified. To take them out even for a moment would show a hole.
            remember(padded(start, bytes.len()));
            return true;
        }
        while !self.space.memory.take(len) {
            if !urgent {
                return false;
            }
            if self.bytes() + len <= ALWAYS_ALLOWED {
                self.space.memory.take_anyway(len);
                break;
            }
            let Some(oldest) = held.order.front().copied() else {
                self.space.memory.take_anyway(len);
                break;
            };
            if let Some(gone) = held.chunks.get(&oldest) {
                forget(padded(oldest, gone.bytes.len()));
            }
            self.cleared();
            self.remove(&mut held, oldest);
        }
        self.bytes.fetch_add(len, Ordering::AcqRel);
        held.order.push_back(start);
        let span = padded(start, bytes.len());
        self.insert(&mut held, start, Chunk { bytes, queued: false });
        remember(span);
        true
    }

    /// Holds a chunk until the writer has [`Self::tried`] it, and sets its bits by `remember`. False: it is held already, and need not
    /// be written, or there is no room.
    pub(crate) fn queue(&self, start: u64, bytes: &Bytes, remember: impl Fn(Range<u64>)) -> bool {
        let mut held = self.lock();
        if held.chunks.contains_key(&start) || !self.space.memory.take(bytes.len() as u64) {
            return false;
        }
        self.insert(&mut held, start, Chunk { bytes: bytes.clone(), queued: true });
        remember(padded(start, bytes.len()));
        true
    }

    /// A queued chunk is in the file now, or stays here.
    pub(crate) fn tried(&self, start: u64, written: io::Result<()>) {
        let mut held = self.lock();
        let Some(chunk) = held.chunks.get_mut(&start).filter(|chunk| chunk.queued) else { return };
        let len = chunk.bytes.len() as u64;
        match written {
            Ok(()) => {
                held.chunks.remove(&start);
                self.count.fetch_sub(1, Ordering::AcqRel);
                self.space.memory.give_back(len);
            }
            Err(error) => {
                self.space.refused(len.next_multiple_of(BLOCK_SIZE), &error);
                chunk.queued = false;
                held.order.push_back(start);
                self.bytes.fetch_add(len, Ordering::AcqRel);
            }
        }
        self.changed.notify_all();
    }

    /// Waits until everything that is queued now was tried.
    pub(crate) fn settle(&self) {
        let mut held = self.lock();
        let is_queued = |held: &mut Held, start| held.chunks.get(&start).is_some_and(|chunk| chunk.queued);
        let queued: Vec<u64> =
            held.chunks.iter().filter(|(_, chunk)| chunk.queued).map(|(start, _)| *start).collect();
        for start in queued {
            let waited = self.changed.wait_while(held, |held| is_queued(held, start));
            held = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn insert(&self, held: &mut Held, start: u64, chunk: Chunk) {
        held.chunks.insert(start, chunk);
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    /// Removes one that is not queued.
    fn remove(&self, held: &mut Held, start: u64) {
        if held.chunks.get(&start).is_none_or(|chunk| chunk.queued) {
            return;
        }
        if let Some(gone) = held.chunks.remove(&start) {
            held.order.retain(|one| *one != start);
            self.count.fetch_sub(1, Ordering::AcqRel);
            self.bytes.fetch_sub(gone.bytes.len() as u64, Ordering::AcqRel);
            self.space.memory.give_back(gone.bytes.len() as u64);
        }
    }

    /// Chunks with bytes in a range.
    pub(crate) fn overlapping(&self, range: Range<u64>) -> Vec<(u64, Bytes)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let held = self.lock();
        // A chunk that begins before may reach into the range.
        let first = held.chunks.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        held.chunks
            .range(first..range.end)
            .filter(|(start, chunk)| padded(**start, chunk.bytes.len()).end > range.start)
            .map(|(start, chunk)| (*start, chunk.bytes.clone()))
            .collect()
    }

    /// Lets `look` see the store ranges of all chunks held but `except` (sorted store offsets), in whole blocks. Meanwhile nothing
    /// comes or goes here, and no bits change on account of that.
    pub(crate) fn with_ranges<T>(&self, except: &[u64], look: impl FnOnce(&[Range<u64>]) -> T) -> T {
        let held = self.lock();
        let ranges: Vec<Range<u64>> = held
            .chunks
            .iter()
            .filter(|(start, _)| except.binary_search(start).is_err())
            .map(|(start, chunk)| padded(*start, chunk.bytes.len()))
            .collect();
        look(&ranges)
    }

    /// Gives what is held and not queued to `write`, in order, until that fails. It stays here until it is released: what was written is not on the
    /// disk yet. Gives the store offsets of what `write` says it has written.
    pub(crate) fn write_out(
        &self,
        write: impl Fn(u64, &[u8]) -> io::Result<bool>,
    ) -> (Vec<u64>, io::Result<()>) {
        let (mut written, mut from) = (Vec::new(), 0);
        loop {
            // Not held while writing: readers need it.
            let next = {
                let held = self.lock();
                let mut rest = held.chunks.range(from..).filter(|(_, chunk)| !chunk.queued);
                rest.next().map(|(start, chunk)| (*start, chunk.bytes.clone()))
            };
            let Some((start, bytes)) = next else { return (written, Ok(())) };
            match write(start, &bytes) {
                Ok(true) => written.push(start),
                Ok(false) => {}
                Err(error) => return (written, Err(error)),
            }
            from = start + 1;
        }
    }

    /// Lets go of chunks that are on the disk.
    pub(crate) fn release(&self, written: &[u64]) {
        let mut held = self.lock();
        for start in written {
            self.remove(&mut held, *start);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.space.memory.give_back(self.bytes());
    }
}

/// Copies into `buffer`, which begins at `offset`, what `held` has of it, zeros behind each chunk included. Returns how many
/// bytes that were.
pub(crate) fn overlay(held: &[(u64, Bytes)], offset: u64, buffer: &mut [u8]) -> u64 {
    held.iter().map(|(start, bytes)| copy_part(*start, bytes, offset, buffer)).sum()
}

/// Copies into `buffer`, which begins at `offset`, what a chunk at `start` has of it, zeros behind it included. Returns how many
/// bytes that were.
pub(crate) fn copy_part(start: u64, bytes: &[u8], offset: u64, buffer: &mut [u8]) -> u64 {
    let (whole, end) = (padded(start, bytes.len()), offset + buffer.len() as u64);
    let (from, to) = (offset.max(whole.start), end.min(whole.end));
    let Some(target) = buffer.get_mut((from - offset) as usize..(to.max(from) - offset) as usize) else {
        return 0;
    };
    let source = bytes.get((from - start) as usize..).unwrap_or(&[]);
    let copied = source.len().min(target.len());
    let (content, padding) = target.split_at_mut(copied);
    content.copy_from_slice(source.get(..copied).unwrap_or(&[]));
    padding.fill(0);
    to.saturating_sub(from)
}

fn padded(start: u64, len: usize) -> Range<u64> {
    start..start + (len as u64).next_multiple_of(BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StoreLimits;

    fn memory(budget: u64) -> Memory {
        let limits = StoreLimits { memory_budget_bytes: budget, quota_bytes: None, reserve_bytes: 0 };
        Memory::new(Arc::new(Space::new(std::path::Path::new("/"), limits)))
    }

    #[test]
    fn what_is_held_stays_when_it_comes_again() {
        let memory = memory(10_000);
        let nothing_goes = |range| panic!("{range:?} was forgotten");
        assert!(memory.keep(4096, Bytes::from(vec![1; 6000]), false, nothing_goes, |_| {}));
        // No room for another, but this one is there.
        assert!(!memory.keep(0, Bytes::from(vec![2; 6000]), false, nothing_goes, |_| {}));
        assert!(memory.keep(4096, Bytes::from(vec![1; 6000]), false, nothing_goes, |_| {}));
        assert_eq!((memory.bytes(), memory.overlapping(8000..8001).len()), (6000, 1));
        assert_eq!(memory.evictions(), 0);
    }

    #[test]
    fn what_is_queued_is_read_from_here_until_it_was_tried() {
        let memory = memory(12_000);
        let bits = std::cell::Cell::new(0);
        let remember = |_| bits.set(bits.get() + 1);
        assert!(memory.queue(0, &Bytes::from(vec![1; 6000]), remember));
        assert!(memory.queue(8192, &Bytes::from(vec![2; 6000]), remember));
        assert!(!memory.queue(0, &Bytes::from(vec![1; 6000]), remember), "it is there");
        assert!(!memory.queue(16384, &Bytes::from(vec![1; 1]), remember), "there is no room");
        assert_eq!((bits.get(), memory.bytes(), memory.overlapping(0..1 << 20).len()), (2, 0, 2));
        // Nobody else writes it, nor makes it go.
        assert!(memory.write_out(|_, _| Ok(true)).0.is_empty());
        memory.release(&[0, 8192]);
        memory.with_ranges(&[], |ranges| assert_eq!(ranges.len(), 2));
        memory.tried(0, Ok(()));
        memory.tried(8192, Err(io::ErrorKind::StorageFull.into()));
        memory.settle();
        assert_eq!((memory.bytes(), memory.overlapping(0..1 << 20).len()), (6000, 1));
        assert_eq!(memory.write_out(|_, _| Ok(true)).0, [8192]);
        memory.release(&[8192]);
        assert!(memory.queue(0, &Bytes::from(vec![1; 12_000]), remember), "all of the budget is back");
    }

    #[test]
    fn what_was_written_stays_until_it_is_released() {
        let memory = memory(1 << 20);
        for start in [0, 8192, 16384] {
            assert!(memory.keep(start, Bytes::from(vec![1; 5000]), false, |_| {}, |_| {}));
        }
        let write = |start, bytes: &[u8]| {
            assert_eq!(bytes.len(), 5000);
            if start == 16384 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(true) }
        };
        let (written, ended) = memory.write_out(write);
        assert_eq!((written.as_slice(), memory.bytes()), ([0, 8192].as_slice(), 15_000));
        assert!(ended.is_err());
        memory.with_ranges(&written, |ranges| {
            assert!(matches!(ranges, [range] if *range == (16384..24576)), "{ranges:?}");
        });
        memory.release(&written);
        assert_eq!((memory.bytes(), memory.overlapping(0..1 << 20).len()), (5000, 1));
    }
}
