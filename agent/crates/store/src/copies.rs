//! Contents that another layer of the store has already: copied from there instead of fetched, and verified like any others.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, DigestAlgorithm};

use crate::layer::{blocks, span_of};
use crate::records::{DigestRecord, Records};
use crate::{Layer, Store, StoreError};

/// Records read at a time when two layers are compared.
const RECORDS_AT_ONCE: usize = 4096;

/// Where else a layer's chunks are.
#[derive(Debug)]
pub struct LocalCopies {
    store: Store,
    /// Digests of layers that have any.
    layers: Vec<String>,
    /// Sorted.
    found: Vec<Found>,
    /// The source last used: neighbours mostly have the same one.
    last: Mutex<Option<Arc<Layer>>>,
}

/// A chunk of the layer that another layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    store_offset: u64,
    /// In `layers`.
    layer: u32,
    source_offset: u64,
}

impl Store {
    /// Looks which chunks of `layer` other layers have. Reads two small files per layer, in order; nothing if `layer` is complete.
    pub fn local_copies(&self, layer: &Layer) -> Result<LocalCopies, StoreError> {
        let mut copies = LocalCopies {
            store: self.clone(),
            layers: Vec::new(),
            found: Vec::new(),
            last: Mutex::default(),
        };
        if layer.is_complete() {
            return Ok(copies);
        }
        for digest in self.layers()? {
            if digest == layer.digest() {
                continue;
            }
            let Some(other) = self.layer(&digest)? else { continue };
            match compare(layer, &other, copies.layers.len() as u32) {
                Ok(found) if found.is_empty() => {}
                Ok(found) => {
                    copies.found.extend(found);
                    copies.layers.push(digest);
                }
                Err(error) => {
                    tracing::warn!(layer = digest, %error, "its contents are not looked through for copies");
                }
            }
        }
        copies.found.sort_unstable();
        Ok(copies)
    }
}

impl LocalCopies {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Store offset of the first chunk at or after `offset` that may be copied.
    pub fn next(&self, offset: u64) -> Option<u64> {
        let at = self.found.partition_point(|found| found.store_offset < offset);
        self.found.get(at).map(|found| found.store_offset)
    }

    /// Copies a chunk of `layer` from another one, if one has it now and its bytes are what they should be. Blocks the thread.
    pub fn copy(
        &self,
        layer: &Layer,
        chunk: &ChunkRecord,
        algorithm: DigestAlgorithm,
    ) -> Result<bool, StoreError> {
        let start = chunk.store_offset.get();
        let first = self.found.partition_point(|found| found.store_offset < start);
        let candidates = self.found.get(first..).unwrap_or(&[]);
        for found in candidates.iter().take_while(|found| found.store_offset == start) {
            let Some(source) = self.source(found.layer)? else { continue };
            match layer.copy_from(&source, found.source_offset, chunk, algorithm) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(from = source.digest(), offset = found.source_offset, size = chunk.len.get(), %error, "cannot copy; it is fetched instead");
                }
            }
        }
        Ok(false)
    }

    fn source(&self, layer: u32) -> Result<Option<Arc<Layer>>, StoreError> {
        let Some(digest) = self.layers.get(layer as usize) else { return Ok(None) };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = last.as_ref().filter(|layer| layer.digest() == digest) {
            return Ok(Some(Arc::clone(layer)));
        }
        // It may be gone by now.
        *last = self.store.layer(digest)?;
        Ok(last.clone())
    }
}

impl Layer {
    /// Takes a chunk from another layer; `false` if it is not there or not what it should be.
    fn copy_from(
        &self,
        source: &Layer,
        source_offset: u64,
        chunk: &ChunkRecord,
        algorithm: DigestAlgorithm,
    ) -> io::Result<bool> {
        let len = chunk.len.get() as usize;
        let there = source_offset..source_offset + len as u64;
        if !source.has(there.clone()) {
            return Ok(false);
        }
        let mut bytes = vec![0; len];
        let in_file = source.memory.overlapping(there.clone()).is_empty();
        // Parts of it may be read meanwhile: nothing unverified takes their place.
        let apart = self.verified.any(blocks(span_of(chunk)));
        if in_file && !apart && !self.is_doubtful(chunk.store_offset.get()) {
            let _inserting = self.inserting();
            if self.share_blocks(source, there, chunk)? {
                self.file().read_exact_at(&mut bytes, chunk.store_offset.get())?;
                if algorithm.digest(&bytes) == chunk.digest {
                    self.shared(chunk);
                    return Ok(true);
                }
                return Ok(false);
            }
        }
        if !source.try_read(source_offset, &mut bytes)? || algorithm.digest(&bytes) != chunk.digest {
            return Ok(false);
        }
        Ok(self.insert_verified(chunk, &Bytes::from(bytes), false))
    }

    /// Makes the chunk's blocks those of the source, if the file system can.
    fn share_blocks(&self, source: &Layer, there: Range<u64>, chunk: &ChunkRecord) -> io::Result<bool> {
        let len = u64::from(chunk.len.get()).next_multiple_of(BLOCK_SIZE);
        let (from, to) = (source.file().as_fd(), self.file().as_fd());
        if !self.may_share() {
            return Ok(false);
        }
        let shared = sluice_kernel::file::reflink_range(from, there.start, to, chunk.store_offset.get(), len)
            .map_err(io::Error::other)?;
        if !shared {
            self.cannot_share();
        }
        Ok(shared)
    }
}

/// Chunks of `layer` that `other` has, by their whole digests.
fn compare(layer: &Layer, other: &Layer, number: u32) -> Result<Vec<Found>, StoreError> {
    let (Some(mine), Some(theirs)) = (Sorted::open(layer)?, Sorted::open(other)?) else {
        return Ok(Vec::new());
    };
    let failed = |source| StoreError::File { what: "read", path: other.dir().to_path_buf(), source };
    join(mine, theirs, |mine, theirs| {
        let (Some(mine), Some(theirs)) = (layer.chunk(mine)?, other.chunk(theirs)?) else { return Ok(None) };
        let same = mine.digest == theirs.digest && mine.len == theirs.len;
        Ok(same.then(|| Found {
            store_offset: mine.store_offset.get(),
            layer: number,
            source_offset: theirs.store_offset.get(),
        }))
    })
    .map_err(failed)
}

/// Pairs of records with equal prefixes; of several in `theirs` the first is taken.
fn join(
    mut mine: Sorted,
    mut theirs: Sorted,
    pair: impl Fn(u64, u64) -> io::Result<Option<Found>>,
) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    let (mut left, mut right) = (mine.next()?, theirs.next()?);
    while let (Some(one), Some(other)) = (left, right) {
        match one.prefix.cmp(&other.prefix) {
            std::cmp::Ordering::Less => left = mine.next()?,
            std::cmp::Ordering::Greater => right = theirs.next()?,
            std::cmp::Ordering::Equal => {
                found.extend(pair(one.number(), other.number())?);
                left = mine.next()?;
            }
        }
    }
    Ok(found)
}

/// A layer's `digests`, read in order.
struct Sorted {
    records: Records<DigestRecord>,
    buffer: Vec<DigestRecord>,
    at: usize,
    next: u64,
}

impl Sorted {
    /// `None` for a layer of a store that had no such file yet.
    fn open(layer: &Layer) -> Result<Option<Self>, StoreError> {
        let path = layer.dir().join("digests");
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(Self { records: Records::open(&path)?, buffer: Vec::new(), at: 0, next: 0 }))
    }

    fn next(&mut self) -> io::Result<Option<DigestRecord>> {
        if self.at == self.buffer.len() {
            self.buffer = self.records.several(self.next, RECORDS_AT_ONCE)?;
            self.next += self.buffer.len() as u64;
            self.at = 0;
        }
        let record = self.buffer.get(self.at).copied();
        self.at += 1;
        Ok(record)
    }
}
