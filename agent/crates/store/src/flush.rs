//! Flushes: what was verified becomes durable, and then recorded. Or is forgotten.
//!
//! A write into the page cache that the disk refuses later is told of once, at the next flush of the same open file, and it is not
//! said which write it was; the flush after that succeeds (Linux since 4.13). So flushes of a layer come one at a time, and
//! when one fails all that was written and not recorded counts as lost. It is fetched again; to find the bytes that the disk
//! does not take, each lost chunk is then kept in memory and flushed by itself.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use sluice_image::records::BLOCK_SIZE;

use crate::bitmap::{Bitmap, PAGE_BYTES, mask};
use crate::layer::blocks;
use crate::state::Page;
use crate::{Layer, StoreError};

/// Held while a layer is flushed.
#[derive(Debug)]
pub(crate) struct Flushing {
    /// Whether the layer is recorded as complete.
    pub(crate) complete: bool,
}

impl Flushing {
    pub(crate) fn new(complete: bool) -> Self {
        Self { complete }
    }
}

/// What a flush made durable.
#[derive(Debug)]
pub(crate) struct Flushed {
    /// Pages of the map that are to be recorded.
    pub(crate) pages: Vec<Page>,
    /// Store offsets of chunks that need not be in memory any more, once they are recorded.
    written: Vec<u64>,
}

impl Layer {
    pub(crate) fn flushing(&self) -> MutexGuard<'_, Flushing> {
        self.flushing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what memory holds, but for what is doubtful, flushes the file, and returns the pages of the map that are to be recorded
    /// now. `written` are chunks held in memory that were written already. The caller holds [`Self::flushing`].
    pub(crate) fn sync(&self, mut written: Vec<u64>) -> Result<Flushed, StoreError> {
        self.memory.settle();
        let write = |start, bytes: &[u8]| {
            if self.is_doubtful(start) {
                return Ok(false);
            }
            self.write(start, bytes).map(|()| true)
        };
        let (more, ended) = self.memory.write_out(write);
        if let Err(error) = ended {
            tracing::debug!(layer = self.digest(), %error, "the disk still takes no more");
        }
        written.extend(more);
        written.sort_unstable();
        // Taken before the flush: bits set meanwhile are dirty again and come with the next one. What is in memory only is not
        // to be recorded.
        let pages = self.memory.with_ranges(&written, |held| {
            let mut pages = self.verified.take_dirty();
            if !held.is_empty() {
                let held: Vec<Range<u64>> = held.iter().cloned().map(blocks).collect();
                self.verified.mark_pages(mask(&mut pages, &held).into_iter());
            }
            pages
        });
        if pages.is_empty() {
            return Ok(Flushed { pages, written });
        }
        let flushed = self.file.sync_data();
        let suspect = self.suspect.swap(false, Ordering::AcqRel);
        match flushed {
            Ok(()) if !suspect => Ok(Flushed { pages, written }),
            Ok(()) => Err(self.lost(io::Error::other("what was written came back different"), &[])),
            Err(error) => Err(self.lost(error, &[])),
        }
    }

    /// A flush failed: nobody can tell what reached the disk. What was not recorded is forgotten, but for what memory has; and taken out of
    /// the file, but for the chunks at the store offsets `flushed`, which memory has, too: another flush was about them.
    fn lost(&self, source: io::Error, flushed: &[u64]) -> StoreError {
        let count = self.while_nothing_is_inserted(|| {
            // What is written now would be taken out of the file as well, and then count as written.
            self.memory.settle();
            self.memory.with_ranges(&[], |held| {
                let keep = Bitmap::new(self.verified.len(), false);
                self.durable.pages().iter().for_each(|(page, bytes)| keep.load_page(*page, bytes));
                let flushed = held.iter().filter(|range| flushed.contains(&range.start));
                flushed.cloned().map(blocks).for_each(|range| keep.set(range));
                let lost = self.verified.retain(&keep);
                let mut count = 0;
                self.clear_away(&lost);
                for run in lost {
                    count += run.end - run.start;
                    self.doubtful().set(run);
                }
                for range in held.iter().cloned().map(blocks) {
                    self.verified.set(range.clone());
                    count = count.saturating_sub(range.end - range.start);
                }
                self.memory.cleared();
                count
            })
        });
        let bytes = count * BLOCK_SIZE;
        tracing::error!(layer = self.digest(), bytes, error = %source, "a flush of the layer store failed: what was not recorded is fetched again");
        StoreError::Lost { layer: self.digest().to_owned(), bytes, source }
    }

    /// Takes out of the file, and of the page cache, what must not be read, nor written over in place: after a write that failed ext4
    /// takes the block for written in the page cache, though it is none on the disk. When the page is written again the disk has
    /// the bytes, the flush succeeds, and they are zeros once the page is dropped (Linux 6.18).
    pub(crate) fn clear_away(&self, runs: &[Range<u64>]) {
        let allocated = || self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512);
        let before = allocated();
        for run in runs {
            let (start, len) = (run.start * BLOCK_SIZE, (run.end - run.start) * BLOCK_SIZE);
            if let Err(error) = sluice_kernel::file::punch_hole(self.file.as_fd(), start, len) {
                tracing::warn!(layer = self.digest(), offset = start, size = len, %error, "what was lost stays in the file");
            }
        }
        self.space.freed(before.saturating_sub(allocated()));
    }

    /// Writes and flushes each doubtful chunk that memory holds by itself; gives the store offsets of those that the disk took. The
    /// caller holds [`Self::flushing`].
    pub(crate) fn write_singly(&self) -> Vec<u64> {
        if self.doubtful.get().is_none_or(|doubtful| doubtful.count() == 0) {
            return Vec::new();
        }
        let flushed = RefCell::new(Vec::new());
        let write = |start, bytes: &[u8]| {
            if !self.is_doubtful(start) {
                return Ok(false);
            }
            self.write(start, bytes)?;
            match self.file.sync_data() {
                Ok(()) => {
                    flushed.borrow_mut().push(start);
                    Ok(true)
                }
                Err(error) => {
                    // Others may have been written meanwhile.
                    let error = self.lost(error, &flushed.borrow());
                    tracing::warn!(layer = self.digest(), offset = start, size = bytes.len(), %error, "the disk does not take these bytes; they stay in memory");
                    Ok(false)
                }
            }
        };
        let (written, ended) = self.memory.write_out(write);
        if let Err(error) = ended {
            tracing::debug!(layer = self.digest(), %error, "the disk still takes no more");
        }
        written
    }

    /// The first run of whole blocks in a range that is verified, on the disk and recorded as such: it may be read from the file at
    /// [`Self::data_path`] without asking again. Empty if there is none.
    pub fn durable_in(&self, range: Range<u64>) -> Range<u64> {
        let run = self.durable.run_in(blocks(range.clone()));
        let at = |block: u64| (block * BLOCK_SIZE).clamp(range.start, range.end.max(range.start));
        at(run.start)..at(run.end)
    }

    /// Whether all of it is verified, on the disk, and recorded as such.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable.count() == self.durable.len()
    }

    /// Pages that were recorded.
    pub(crate) fn recorded(&self, flushed: &Flushed) {
        self.with_maps(|| {
            for (page, bytes) in &flushed.pages {
                // What was found damaged since is not there.
                let still = self.verified.page(*page);
                let both: Vec<u8> = bytes.iter().zip(&still).map(|(one, other)| one & other).collect();
                self.durable.load_page(*page, &both);
            }
        });
        if let Some(doubtful) = self.doubtful.get() {
            for (page, bytes) in &flushed.pages {
                let left: Vec<u8> =
                    doubtful.page(*page).iter().zip(bytes).map(|(one, now)| one & !now).collect();
                doubtful.load_page(*page, &left);
            }
        }
        self.memory.release(&flushed.written);
    }

    /// Marks pages again that could not be recorded.
    pub(crate) fn not_recorded(&self, flushed: &Flushed) {
        self.verified.mark_pages(flushed.pages.iter().map(|(page, _)| *page));
    }

    /// What is recorded, or would be if the layer were not recorded as complete.
    pub(crate) fn durable_pages(&self) -> Vec<Page> {
        self.durable.pages()
    }

    /// Makes the next flush record the whole map.
    pub(crate) fn mark_all(&self) {
        let pages = self.verified.len().div_ceil(8 * PAGE_BYTES as u64);
        self.verified.mark_pages(0..pages as u32);
    }

    /// The layer is recorded as complete; it is so unless something of it was lost meanwhile.
    pub(crate) fn set_complete(&self) {
        self.with_maps(|| self.complete.store(self.is_durable(), Ordering::Release));
        self.parts.forget();
    }

    /// Forgets that a range was verified.
    pub(crate) fn unverify(&self, range: Range<u64>) {
        let was_complete = self.with_maps(|| {
            self.durable.clear(blocks(range.clone()));
            self.verified.clear(blocks(range));
            self.complete.swap(false, Ordering::AcqRel)
        });
        self.memory.cleared();
        if was_complete {
            self.space.lost.notify_one();
        }
    }
}
