//! One layer's file and which of its blocks are verified.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, ExtentRecord};

use crate::bitmap::{Bitmap, PAGE_BYTES};
use crate::memory::{Memory, overlay};
use crate::records::Records;
use crate::space::Space;
use crate::state::{LayerRecord, Page};
use crate::{OnFile, StoreError};

/// See the module text.
#[derive(Debug)]
pub struct Layer {
    digest: String,
    diff_id: String,
    generation: u64,
    dir: PathBuf,
    size: u64,
    file: File,
    chunks: Records<ChunkRecord>,
    extents: Records<ExtentRecord>,
    verified: Bitmap,
    /// What of it is recorded, and so on the disk for good.
    durable: Bitmap,
    complete: AtomicBool,
    /// Verified chunks that the disk could not take.
    memory: Memory,
    space: Arc<Space>,
}

impl Layer {
    pub(crate) fn open(
        digest: &str,
        dir: PathBuf,
        record: &LayerRecord,
        bits: &[Page],
        space: Arc<Space>,
    ) -> Result<Self, StoreError> {
        let path = dir.join("data");
        let file = File::options().read(true).write(true).open(&path).on("open", &path)?;
        let verified = Bitmap::new(record.store_size / BLOCK_SIZE, record.complete);
        let durable = Bitmap::new(record.store_size / BLOCK_SIZE, record.complete);
        for (page, bytes) in bits {
            verified.load_page(*page, bytes);
            durable.load_page(*page, bytes);
        }
        // What was loaded is stored already.
        drop(verified.take_dirty());
        Ok(Self {
            digest: digest.to_owned(),
            diff_id: record.diff_id.clone(),
            generation: record.generation,
            size: record.store_size,
            file,
            chunks: Records::open(&dir.join("chunks"))?,
            extents: Records::open(&dir.join("extents"))?,
            verified,
            durable,
            complete: AtomicBool::new(record.complete),
            memory: Memory::new(Arc::clone(&space)),
            space,
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

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Bytes of the layer's file: a multiple of the block size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The local file, for hand-over once the layer is complete.
    pub fn data_path(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The local file, read-only. `NotFound` if the layer was removed, also if it came anew: this one's map is not that one's.
    pub fn open_data(&self) -> io::Result<File> {
        let file = File::open(self.data_path())?;
        let (named, own) = (file.metadata()?, self.file.metadata()?);
        if (named.dev(), named.ino()) == (own.dev(), own.ino()) {
            return Ok(file);
        }
        let replaced = format!("layer {} was removed, and came anew", self.digest);
        Err(io::Error::new(io::ErrorKind::NotFound, replaced))
    }

    /// The index blob, as far as it is here.
    pub fn index_path(&self) -> PathBuf {
        self.dir.join("index")
    }

    /// For the windows of the index blob, which are not needed to list files. May be missing.
    pub fn windows_path(&self) -> PathBuf {
        self.dir.join("windows")
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
        self.memory.bytes()
    }

    /// Whether the store has no space.
    pub fn disk_full(&self) -> bool {
        self.space.is_full()
    }

    /// Whether the store would take a chunk now.
    pub fn has_space(&self) -> bool {
        self.space.check(u64::from(sluice_image::records::CHUNK_SIZE)).is_ok()
    }

    /// Whether all bytes of a range are verified. The range may end beyond the file: only what is in it counts.
    pub fn has(&self, range: Range<u64>) -> bool {
        self.verified.all(blocks(range.start..range.end.min(self.size)))
    }

    /// Fills `buffer` from `offset` if all of it is verified; says whether it was. Bytes beyond the end are zero.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let end = offset.saturating_add(buffer.len() as u64).min(self.size);
        let (inside, beyond) = buffer.split_at_mut((end.saturating_sub(offset)) as usize);
        beyond.fill(0);
        loop {
            let evictions = self.memory.evictions();
            if !self.has(offset..end) {
                return Ok(false);
            }
            // Taken before the file is read: what is not held any more was written before.
            let held = self.memory.overlapping(offset..end);
            if overlay(&held, offset, inside) < inside.len() as u64 {
                self.file.read_exact_at(inside, offset)?;
                overlay(&held, offset, inside);
            }
            if evictions == self.memory.evictions() {
                return Ok(true);
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

    /// The first chunk with bytes in `range` that is not verified.
    pub fn first_missing(&self, range: Range<u64>) -> io::Result<Option<ChunkRecord>> {
        if self.has(range.clone()) {
            return Ok(None);
        }
        Ok(self.next_missing(range.start)?.filter(|chunk| chunk.store_offset.get() < range.end))
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

    /// Takes a chunk whose digest the caller has checked. When the disk takes no more it stays in memory, within the budget; an
    /// urgent one makes older ones go. Says whether it was kept.
    pub fn insert_verified(&self, chunk: &ChunkRecord, bytes: &Bytes, urgent: bool) -> bool {
        let start = chunk.store_offset.get();
        if let Err(error) = self.write(start, bytes) {
            if !crate::space::is_full(&error) {
                tracing::warn!(layer = self.digest, offset = start, size = bytes.len(), %error, "cannot write to the layer store; keeping bytes in memory");
            }
            let forget = |range| self.verified.clear(blocks(range));
            let remember = |range| self.verified.set(blocks(range));
            return self.memory.keep(start, bytes.clone(), urgent, forget, remember);
        }
        self.verified.set(blocks(span_of(chunk)));
        true
    }

    /// Takes a chunk that is all zeros, as the caller has checked: it needs no space.
    pub fn insert_hole(&self, chunk: &ChunkRecord) -> io::Result<()> {
        let span = span_of(chunk);
        // Damage that fsck found may stand there.
        match sluice_kernel::file::punch_hole(self.file.as_fd(), span.start, span.end - span.start) {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(layer = self.digest, offset = span.start, %error, "no hole can be made: zeros are written");
                self.write(span.start, &vec![0; (span.end - span.start) as usize])?;
            }
        }
        self.verified.set(blocks(span));
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        self.space.admit(len)?;
        self.file.write_all_at(bytes, offset).inspect_err(|error| self.space.refused(len, error))
    }

    /// Forgets that a range was verified.
    pub(crate) fn unverify(&self, range: Range<u64>) {
        self.complete.store(false, Ordering::Release);
        self.durable.clear(blocks(range.clone()));
        self.verified.clear(blocks(range));
    }

    /// Writes what memory holds, flushes the file, and returns the pages of the map that are to be recorded now. If the flush
    /// fails nobody can tell what reached the disk: `committed` gives the pages of the map as they are recorded, and what was
    /// verified since is forgotten.
    pub(crate) fn sync(
        &self,
        committed: impl FnOnce() -> Result<Vec<Page>, StoreError>,
    ) -> Result<Vec<Page>, StoreError> {
        if let Err(error) = self.memory.drain(|start, bytes| self.write(start, bytes)) {
            tracing::debug!(layer = self.digest, %error, "the disk still takes no more");
        }
        // Taken before the flush: bits set meanwhile are dirty again and come with the next one.
        let mut pages = self.verified.take_dirty();
        if pages.is_empty() {
            return Ok(pages);
        }
        // What is in memory only is not to be recorded. Looked at after the bits: a chunk whose bit was seen is either still
        // held, or written before the flush.
        let held: Vec<Range<u64>> = self.memory.ranges().into_iter().map(blocks).collect();
        if !held.is_empty() {
            self.verified.mark_pages(crate::bitmap::mask(&mut pages, &held).into_iter());
        }
        if let Err(error) = self.file.sync_data() {
            let recorded = committed()?;
            for (page, _) in &pages {
                let bytes = recorded.iter().find(|(one, _)| one == page).map(|(_, bytes)| bytes.as_slice());
                self.verified.load_page(*page, bytes.unwrap_or(&[0; PAGE_BYTES]));
            }
            return Err(error).on("flush", &self.data_path());
        }
        Ok(pages)
    }

    /// Where the run of bytes ends that begins at `offset` and is verified, on the disk and recorded as such: it may be read from
    /// the file at [`Self::data_path`] without asking again. `offset` if there is none.
    pub fn durable_until(&self, offset: u64) -> u64 {
        let end = self.durable.run(offset / BLOCK_SIZE) * BLOCK_SIZE;
        end.min(self.size).max(offset)
    }

    /// Pages that were recorded.
    pub(crate) fn recorded(&self, pages: &[Page]) {
        for (page, bytes) in pages {
            self.durable.load_page(*page, bytes);
        }
    }

    /// Marks pages again that could not be recorded.
    pub(crate) fn not_recorded(&self, pages: &[Page]) {
        self.verified.mark_pages(pages.iter().map(|(page, _)| *page));
    }

    /// Makes the next flush record the whole map.
    pub(crate) fn mark_all(&self) {
        let pages = self.verified.len().div_ceil(8 * PAGE_BYTES as u64);
        self.verified.mark_pages(0..pages as u32);
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A chunk by number.
    pub(crate) fn chunk(&self, number: u64) -> io::Result<Option<ChunkRecord>> {
        self.chunks.get(number)
    }

    /// Takes a chunk whose blocks are another layer's, and whose digest was checked.
    pub(crate) fn shared(&self, chunk: &ChunkRecord) {
        self.verified.set(blocks(span_of(chunk)));
    }

    /// Whether it is worth asking the file system to share blocks.
    pub(crate) fn may_share(&self) -> bool {
        self.space.may_share.load(Ordering::Relaxed)
    }

    pub(crate) fn cannot_share(&self) {
        self.space.may_share.store(false, Ordering::Relaxed);
    }

    /// Directory of the layer's files.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
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
