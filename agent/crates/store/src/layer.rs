//! One layer's file and which of its blocks are verified.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use sluice_image::index::header::{HEADER_LEN, IndexHeader};
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, DigestAlgorithm, ExtentRecord};

use crate::bitmap::Bitmap;
use crate::flush::Flushing;
use crate::memory::Memory;
use crate::parts::Parts;
use crate::records::Records;
use crate::space::Space;
use crate::state::{LayerRecord, Page};
use crate::writer::Job;
use crate::{OnFile, StoreError};

/// See the module text.
#[derive(Debug)]
pub struct Layer {
    digest: String,
    diff_id: String,
    generation: u64,
    dir: PathBuf,
    size: u64,
    /// The one descriptor by which it is written and flushed: the kernel tells each open file once that a write was lost.
    pub(crate) file: Arc<File>,
    chunks: Records<ChunkRecord>,
    extents: Records<ExtentRecord>,
    /// What digests chunks; `None` if the index of a complete layer cannot be read.
    pub(crate) algorithm: Option<DigestAlgorithm>,
    pub(crate) verified: Bitmap,
    /// What of it is recorded, and so on the disk for good.
    pub(crate) durable: Bitmap,
    /// What the disk lost before: it is kept in memory until it is on the disk.
    pub(crate) doubtful: OnceLock<Bitmap>,
    pub(crate) complete: AtomicBool,
    /// What proves the parts of chunks that are not here as a whole.
    pub(crate) parts: Parts,
    /// Verified chunks that are not on the disk for good.
    pub(crate) memory: Arc<Memory>,
    pub(crate) space: Arc<Space>,
    /// Held for reading from before bytes are written until their bits are set, for writing while bits are cleared because a
    /// flush failed: so a bit that is set afterwards speaks of bytes written afterwards.
    inserting: RwLock<()>,
    pub(crate) flushing: Mutex<Flushing>,
    /// Something that was written came back different: the next flush counts as failed.
    pub(crate) suspect: AtomicBool,
    /// Held while `verified`, `durable` and `complete` change together.
    maps: Mutex<()>,
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
        let algorithm = match algorithm_of(&dir.join("index")) {
            Ok(algorithm) => Some(algorithm),
            // It is not needed to read what is recorded.
            Err(_) if record.complete => None,
            Err(error) => return Err(error),
        };
        let layer = Self {
            digest: digest.to_owned(),
            diff_id: record.diff_id.clone(),
            generation: record.generation,
            size: record.store_size,
            file: Arc::new(file),
            chunks: Records::open(&dir.join("chunks"))?,
            extents: Records::open(&dir.join("extents"))?,
            algorithm,
            verified,
            durable,
            doubtful: OnceLock::new(),
            complete: AtomicBool::new(record.complete),
            parts: Parts::default(),
            memory: Arc::new(Memory::new(Arc::clone(&space))),
            space,
            inserting: RwLock::default(),
            flushing: Mutex::new(Flushing::new(record.complete)),
            suspect: AtomicBool::new(false),
            maps: Mutex::default(),
            dir,
        };
        // What an earlier process wrote and did not record: it may be what the disk lost.
        layer.clear_away(&layer.durable.clear_runs());
        Ok(layer)
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

    /// Whether every block is verified.
    pub fn is_full(&self) -> bool {
        self.verified.count() == self.verified.len()
    }

    /// Bytes verified and here.
    pub fn local_bytes(&self) -> u64 {
        self.verified.count() * BLOCK_SIZE
    }

    /// Bytes verified that are in memory: the disk could not take them, or lost them before.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// Whether a flush would record something.
    pub fn is_unrecorded(&self) -> bool {
        self.verified.is_dirty()
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

    /// Chunks with bytes in `range`, in order.
    pub fn chunks(&self, range: Range<u64>) -> io::Result<Vec<ChunkRecord>> {
        let mut found = Vec::new();
        let mut number = self.first_chunk(range.start)?;
        while let Some(chunk) = self.chunks.get(number)?.filter(|chunk| chunk.store_offset.get() < range.end)
        {
            found.push(chunk);
            number += 1;
        }
        Ok(found)
    }

    /// Chunks with bytes in `range` that are not verified as a whole, in order.
    pub fn missing_chunks(&self, range: Range<u64>) -> io::Result<Vec<ChunkRecord>> {
        let mut chunks = self.chunks(range)?;
        chunks.retain(|chunk| !self.has(span_of(chunk)));
        Ok(chunks)
    }

    /// The first chunk with bytes in `range` that are not verified.
    pub fn first_missing(&self, range: Range<u64>) -> io::Result<Option<ChunkRecord>> {
        let missing = self.verified.run(range.start / BLOCK_SIZE) * BLOCK_SIZE;
        if missing >= range.end.min(self.size) {
            return Ok(None);
        }
        Ok(self.next_missing(missing)?.filter(|chunk| chunk.store_offset.get() < range.end))
    }

    /// The first chunk at or after `offset` that is not verified as a whole.
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
    pub(crate) fn first_chunk(&self, offset: u64) -> io::Result<u64> {
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

    /// Takes a chunk whose digest the caller has checked. It is read from memory until it is written. When the disk takes no more it
    /// stays there, within the budget; an urgent one makes older ones go. Says whether it was kept.
    pub fn insert_verified(&self, chunk: &ChunkRecord, bytes: &Bytes, urgent: bool) -> bool {
        let _inserting = self.inserting();
        let start = chunk.store_offset.get();
        if self.is_doubtful(start) {
            return self.keep(start, bytes, urgent);
        }
        let len = (bytes.len() as u64).next_multiple_of(BLOCK_SIZE);
        if self.space.admit(len).is_err() {
            return self.keep(start, bytes, urgent);
        }
        let job = Job {
            file: Arc::clone(&self.file),
            memory: Arc::clone(&self.memory),
            start,
            bytes: bytes.clone(),
        };
        let remember = |range| self.verified.set(blocks(range));
        if self.space.queue.add(job, |job| self.memory.queue(start, &job.bytes, remember)) {
            return true;
        }
        if let Err(error) = self.file.write_all_at(bytes, start) {
            self.space.refused(len, &error);
            if !crate::space::is_full(&error) {
                tracing::warn!(layer = self.digest, offset = start, size = bytes.len(), %error, "cannot write to the layer store; keeping bytes in memory");
            }
            return self.keep(start, bytes, urgent);
        }
        self.verified.set(blocks(span_of(chunk)));
        true
    }

    /// Keeps a chunk in memory.
    fn keep(&self, start: u64, bytes: &Bytes, urgent: bool) -> bool {
        let forget = |range| {
            let blocks = blocks(range);
            // One that is on the disk, too, can be read from there.
            if !self.durable.all(blocks.clone()) {
                self.verified.clear(blocks);
            }
        };
        let remember = |range| self.verified.set(blocks(range));
        let keep = || self.memory.keep(start, bytes.clone(), urgent, forget, remember);
        if keep() {
            return true;
        }
        // What is about to be written has its share of the memory.
        self.space.queue.settle();
        keep()
    }

    /// Takes a chunk that is all zeros, as the caller has checked: it needs no space.
    pub fn insert_hole(&self, chunk: &ChunkRecord) {
        let span = span_of(chunk);
        let inserting = self.inserting();
        // Damage that fsck found may stand there.
        match sluice_kernel::file::punch_hole(self.file.as_fd(), span.start, span.end - span.start) {
            Ok(()) => self.verified.set(blocks(span)),
            Err(error) => {
                tracing::debug!(layer = self.digest, offset = span.start, %error, "no hole can be made: zeros are written");
                drop(inserting);
                // An urgent one is always kept.
                self.insert_verified(chunk, &Bytes::from(vec![0; chunk.len.get() as usize]), true);
            }
        }
    }

    /// Writes to the file, if there is space.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // What is allocated: whole blocks.
        let len = (bytes.len() as u64).next_multiple_of(BLOCK_SIZE);
        self.space.admit(len)?;
        self.file.write_all_at(bytes, offset).inspect_err(|error| self.space.refused(len, error))
    }

    /// See the field.
    pub(crate) fn inserting(&self) -> RwLockReadGuard<'_, ()> {
        self.inserting.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is being inserted, and keeps it so during `work`.
    pub(crate) fn while_nothing_is_inserted<T>(&self, work: impl FnOnce() -> T) -> T {
        let _alone = self.inserting.write().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// See the field `maps`.
    pub(crate) fn with_maps<T>(&self, work: impl FnOnce() -> T) -> T {
        let _together = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// Whether the disk lost the chunk at a store offset before, and has it not yet.
    pub(crate) fn is_doubtful(&self, start: u64) -> bool {
        let block = start / BLOCK_SIZE;
        self.doubtful.get().is_some_and(|doubtful| doubtful.all(block..block + 1))
    }

    /// The map of what is doubtful.
    pub(crate) fn doubtful(&self) -> &Bitmap {
        self.doubtful.get_or_init(|| Bitmap::new(self.verified.len(), false))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A chunk by number.
    pub(crate) fn chunk(&self, number: u64) -> io::Result<Option<ChunkRecord>> {
        self.chunks.get(number)
    }

    /// Takes a chunk whose blocks are another layer's, and whose digest was checked. The caller is [`Self::inserting`].
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
pub(crate) fn span_of(chunk: &ChunkRecord) -> Range<u64> {
    let start = chunk.store_offset.get();
    start..start + u64::from(chunk.len.get()).next_multiple_of(BLOCK_SIZE)
}

/// What a chunk has of a store range.
pub(crate) fn bytes_in(chunk: &ChunkRecord, range: &Range<u64>) -> Range<u64> {
    let start = chunk.store_offset.get();
    let end = start + u64::from(chunk.len.get());
    range.start.clamp(start, end)..range.end.clamp(start, end)
}

/// Numbers of the blocks that hold a store range.
pub(crate) fn blocks(range: Range<u64>) -> Range<u64> {
    range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
}

/// What digests the chunks of an index blob, by its header.
fn algorithm_of(path: &Path) -> Result<DigestAlgorithm, StoreError> {
    let mut header = [0; HEADER_LEN];
    File::open(path).and_then(|file| file.read_exact_at(&mut header, 0)).on("read", path)?;
    let parsed = IndexHeader::parse(&header);
    let header = parsed.map_err(|source| StoreError::Index { layer: path.display().to_string(), source })?;
    Ok(header.digest_algorithm())
}
