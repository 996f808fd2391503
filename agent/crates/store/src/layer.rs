//! One layer's file and which of its blocks are verified.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, ExtentRecord};

use crate::bitmap::Bitmap;
use crate::records::Records;
use crate::state::LayerRecord;
use crate::{OnFile, StoreError};

/// See the module text.
#[derive(Debug)]
pub struct Layer {
    digest: String,
    diff_id: String,
    dir: PathBuf,
    size: u64,
    file: File,
    chunks: Records<ChunkRecord>,
    extents: Records<ExtentRecord>,
    verified: Bitmap,
    complete: AtomicBool,
    /// Verified chunks that the disk could not take, by store offset.
    memory: Mutex<BTreeMap<u64, Bytes>>,
    memory_bytes: AtomicU64,
    memory_budget_bytes: u64,
    disk_full: AtomicBool,
}

impl Layer {
    pub(crate) fn open(
        digest: &str,
        dir: PathBuf,
        record: &LayerRecord,
        bits: &[(u32, Vec<u8>)],
        memory_budget_bytes: u64,
    ) -> Result<Self, StoreError> {
        let path = dir.join("data");
        let file = File::options().read(true).write(true).open(&path).on("open", &path)?;
        let verified = Bitmap::new(record.store_size / BLOCK_SIZE, record.complete);
        for (page, bytes) in bits {
            verified.load_page(*page, bytes);
        }
        // What was loaded is stored already.
        drop(verified.take_dirty());
        Ok(Self {
            digest: digest.to_owned(),
            diff_id: record.diff_id.clone(),
            size: record.store_size,
            file,
            chunks: Records::open(&dir.join("chunks"))?,
            extents: Records::open(&dir.join("extents"))?,
            verified,
            complete: AtomicBool::new(record.complete),
            memory: Mutex::default(),
            memory_bytes: AtomicU64::new(0),
            memory_budget_bytes,
            disk_full: AtomicBool::new(false),
            dir,
        })
    }

    /// `sha256:…` of the layer blob.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// `sha256:…` of the uncompressed tar.
    pub fn diff_id(&self) -> &str {
        &self.diff_id
    }

    /// Bytes of the layer's file: a multiple of the block size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The local file, for hand-over once the layer is complete.
    pub fn data_path(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The index blob, as far as it is here.
    pub fn index_path(&self) -> PathBuf {
        self.dir.join("index")
    }

    /// Whether every block is verified and the diffID was checked.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    pub(crate) fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Whether every block is verified.
    pub fn is_full(&self) -> bool {
        self.verified.count() == self.verified.len()
    }

    /// Bytes verified and here.
    pub fn local_bytes(&self) -> u64 {
        self.verified.count() * BLOCK_SIZE
    }

    /// Bytes verified that are only in memory: the disk could not take them.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes.load(Ordering::Acquire)
    }

    /// Whether the last write found no space.
    pub fn disk_full(&self) -> bool {
        self.disk_full.load(Ordering::Acquire)
    }

    /// Whether all bytes of a range are verified. The range may end beyond the file: only what is in it counts.
    pub fn has(&self, range: Range<u64>) -> bool {
        self.verified.all(blocks(range.start..range.end.min(self.size)))
    }

    /// Fills `buffer` from `offset` if all of it is verified; says whether it was. Bytes beyond the end are zero.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let end = offset.saturating_add(buffer.len() as u64).min(self.size);
        if !self.has(offset..end) {
            return Ok(false);
        }
        let (inside, beyond) = buffer.split_at_mut((end.saturating_sub(offset)) as usize);
        beyond.fill(0);
        self.file.read_exact_at(inside, offset)?;
        if self.memory_bytes.load(Ordering::Acquire) > 0 {
            self.overlay_memory(offset, inside);
        }
        Ok(true)
    }

    fn overlay_memory(&self, offset: u64, buffer: &mut [u8]) {
        let memory = self.lock_memory();
        let end = offset + buffer.len() as u64;
        // A chunk that begins before may reach into the range.
        let first = memory.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        for (start, bytes) in memory.range(first..end) {
            let from = offset.max(*start);
            let to = end.min(start + bytes.len() as u64);
            if from >= to {
                continue;
            }
            let source = bytes.get((from - start) as usize..(to - start) as usize);
            let target = buffer.get_mut((from - offset) as usize..(to - offset) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
    }

    /// Chunks with bytes in `range` that are not verified, in order.
    pub fn missing_chunks(&self, range: Range<u64>) -> io::Result<Vec<ChunkRecord>> {
        let mut missing = Vec::new();
        let mut number = self.first_chunk(range.start)?;
        while let Some(chunk) = self.chunks.get(number)? {
            if chunk.store_offset.get() >= range.end {
                break;
            }
            if !self.has(span_of(&chunk)) {
                missing.push(chunk);
            }
            number += 1;
        }
        Ok(missing)
    }

    /// The first chunk at or after `offset` that is not verified.
    pub fn next_missing(&self, offset: u64) -> io::Result<Option<ChunkRecord>> {
        let mut number = self.first_chunk(offset)?;
        while let Some(chunk) = self.chunks.get(number)? {
            if !self.has(span_of(&chunk)) {
                return Ok(Some(chunk));
            }
            number += 1;
        }
        Ok(None)
    }

    /// Number of the chunk that holds `offset`, or of the first one after it.
    fn first_chunk(&self, offset: u64) -> io::Result<u64> {
        self.chunks.partition_point(|chunk| span_of(chunk).end <= offset)
    }

    /// Extents with bytes in a range of the layer's file, in order.
    pub fn extents(&self, range: Range<u64>) -> io::Result<Vec<ExtentRecord>> {
        let end_of = |extent: &ExtentRecord| extent.store_offset.get() + extent.len.get();
        let mut number = self.extents.partition_point(|extent| end_of(extent) <= range.start)?;
        let mut found = Vec::new();
        while let Some(extent) =
            self.extents.get(number)?.filter(|extent| extent.store_offset.get() < range.end)
        {
            found.push(extent);
            number += 1;
        }
        Ok(found)
    }

    /// The first extent that ends after `tar_offset`, with its number.
    pub fn extent_at(&self, tar_offset: u64) -> io::Result<u64> {
        self.extents.partition_point(|extent| extent.tar_offset.get() + extent.len.get() <= tar_offset)
    }

    /// An extent by number.
    pub fn extent(&self, number: u64) -> io::Result<Option<ExtentRecord>> {
        self.extents.get(number)
    }

    /// The chunk that holds a store offset.
    pub fn chunk_at(&self, store_offset: u64) -> io::Result<Option<ChunkRecord>> {
        self.chunks.get(self.first_chunk(store_offset)?)
    }

    /// Takes a chunk whose digest the caller has checked. When the disk is full it stays in memory, within the budget; says
    /// whether it was kept at all.
    pub fn insert_verified(&self, chunk: &ChunkRecord, bytes: &Bytes) -> bool {
        let start = chunk.store_offset.get();
        match self.file.write_all_at(bytes, start) {
            Ok(()) => {
                self.disk_full.store(false, Ordering::Release);
            }
            Err(error) => {
                let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
                if !self.disk_full.swap(full, Ordering::AcqRel) || !full {
                    tracing::warn!(layer = self.digest, offset = start, %error, "cannot write to the layer store; keeping bytes in memory");
                }
                let held = self.memory_bytes.fetch_add(bytes.len() as u64, Ordering::AcqRel);
                if held + bytes.len() as u64 > self.memory_budget_bytes {
                    self.memory_bytes.fetch_sub(bytes.len() as u64, Ordering::AcqRel);
                    return false;
                }
                self.lock_memory().insert(start, bytes.clone());
            }
        }
        self.verified.set(blocks(span_of(chunk)));
        true
    }

    /// Forgets that a range was verified.
    pub(crate) fn unverify(&self, range: Range<u64>) {
        self.complete.store(false, Ordering::Release);
        self.verified.clear(blocks(range));
    }

    /// Writes what memory holds, flushes the file, and returns the pages of the map that are to be recorded now.
    pub(crate) fn sync(&self) -> Result<Option<Vec<(u32, Vec<u8>)>>, StoreError> {
        self.write_memory();
        if self.memory_bytes.load(Ordering::Acquire) > 0 {
            // The map speaks of bytes that are in memory only.
            return Ok(None);
        }
        // Taken before the flush: bits set meanwhile are dirty again and come with the next one.
        let pages = self.verified.take_dirty();
        if pages.is_empty() {
            return Ok(None);
        }
        if let Err(error) = self.file.sync_data() {
            self.verified.mark_pages(pages.iter().map(|(page, _)| *page));
            return Err(error).on("flush", &self.data_path());
        }
        Ok(Some(pages))
    }

    pub(crate) fn all_pages(&self) -> Vec<(u32, Vec<u8>)> {
        let pages = self.verified.len().div_ceil(8 * crate::bitmap::PAGE_BYTES as u64);
        self.verified.mark_pages(0..pages as u32);
        self.verified.take_dirty()
    }

    fn write_memory(&self) {
        let mut memory = self.lock_memory();
        while let Some(first) = memory.first_entry() {
            if let Err(error) = self.file.write_all_at(first.get(), *first.key()) {
                tracing::debug!(layer = self.digest, %error, "the disk is still full");
                return;
            }
            self.memory_bytes.fetch_sub(first.get().len() as u64, Ordering::AcqRel);
            first.remove();
            self.disk_full.store(false, Ordering::Release);
        }
    }

    /// Directory of the layer's files.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn lock_memory(&self) -> MutexGuard<'_, BTreeMap<u64, Bytes>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Store range of a chunk, rounded up to whole blocks: the padding behind it is zero by the layout rule.
fn span_of(chunk: &ChunkRecord) -> Range<u64> {
    let start = chunk.store_offset.get();
    start..start + u64::from(chunk.len.get()).next_multiple_of(BLOCK_SIZE)
}

fn blocks(range: Range<u64>) -> Range<u64> {
    range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
}
