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

/// Where else a layer's chunks are. Four bytes per chunk: where in the other layer is looked up in its file when it is copied.
#[derive(Debug)]
pub struct LocalCopies {
    store: Store,
    /// Digests of layers that have any, complete ones first.
    layers: Vec<String>,
    /// Of each chunk the layers that have it, as far as they are remembered, by number in `layers`; [`NOWHERE`].
    found: Vec<[u16; REMEMBERED]>,
    /// The source last used: neighbours mostly have the same one.
    last: Mutex<Option<Arc<Source>>>,
}

/// Other layers that are remembered of a chunk.
const REMEMBERED: usize = 2;
const NOWHERE: u16 = u16::MAX;

#[derive(Debug)]
struct Source {
    layer: Arc<Layer>,
    digests: Records<DigestRecord>,
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
        let mut others = Vec::new();
        for digest in self.layers()?.into_iter().filter(|digest| digest != layer.digest()) {
            others.extend(self.layer(&digest)?);
        }
        others.sort_by_key(|other| !other.is_complete());
        for other in others {
            if copies.layers.len() >= usize::from(NOWHERE) {
                break;
            }
            match copies.look_into(layer, &other) {
                Ok(0) => {}
                Ok(_) => copies.layers.push(other.digest().to_owned()),
                Err(error) => {
                    tracing::warn!(layer = other.digest(), %error, "its contents are not looked through for copies");
                }
            }
        }
        Ok(copies)
    }
}

impl LocalCopies {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.found.iter().filter(|found| is_somewhere(found)).count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Store offset of the first chunk of `layer` at or after `offset` that may be copied.
    pub fn next(&self, layer: &Layer, offset: u64) -> io::Result<Option<u64>> {
        if self.is_empty() {
            return Ok(None);
        }
        let mut number = layer.first_chunk(offset)?;
        while let Some(ahead) =
            self.found.get(number as usize..).and_then(|rest| rest.iter().position(is_somewhere))
        {
            number += ahead as u64;
            let start = layer.chunk(number)?.map(|chunk| chunk.store_offset.get());
            if start.is_none_or(|start| start >= offset) {
                return Ok(start);
            }
            number += 1;
        }
        Ok(None)
    }

    /// Copies a chunk of `layer` from another one, if one has it now and its bytes are what they should be. Blocks the thread.
    pub fn copy(
        &self,
        layer: &Layer,
        chunk: &ChunkRecord,
        algorithm: DigestAlgorithm,
    ) -> Result<bool, StoreError> {
        if self.is_empty() {
            return Ok(false);
        }
        let failed = |source| StoreError::File { what: "read", path: layer.dir().to_path_buf(), source };
        let number = layer.first_chunk(chunk.store_offset.get()).map_err(failed)?;
        for other in self.found.get(number as usize).into_iter().flatten() {
            let Some(source) = self.source(*other)? else { continue };
            let copied = source.find(chunk).and_then(|found| match found {
                Some(offset) => layer.copy_from(&source.layer, offset, chunk, algorithm),
                None => Ok(false),
            });
            match copied {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(from = source.layer.digest(), size = chunk.len.get(), %error, "cannot copy; it is fetched instead");
                }
            }
        }
        Ok(false)
    }

    fn source(&self, number: u16) -> Result<Option<Arc<Source>>, StoreError> {
        let Some(digest) = self.layers.get(usize::from(number)) else { return Ok(None) };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = last.as_ref().filter(|source| source.layer.digest() == digest) {
            return Ok(Some(Arc::clone(source)));
        }
        // It may be gone by now.
        let open = |layer| match Source::open(layer) {
            Ok(source) => Some(Arc::new(source)),
            Err(error) => {
                tracing::warn!(layer = digest, %error, "nothing is copied from it");
                None
            }
        };
        *last = self.store.layer(digest)?.and_then(open);
        Ok(last.clone())
    }

    /// Remembers chunks of `layer` that `other` has, by their whole digests; how many it has.
    fn look_into(&mut self, layer: &Layer, other: &Layer) -> Result<u64, StoreError> {
        let (Some(mine), Some(theirs)) = (Sorted::open(layer)?, Sorted::open(other)?) else { return Ok(0) };
        let (this, mut count) = (self.layers.len() as u16, 0);
        self.found.resize(mine.records.count() as usize, [NOWHERE; REMEMBERED]);
        join(mine, theirs, |one, same| {
            let (Some(mine), Some(theirs)) = (layer.chunk(one)?, other.chunk(same)?) else { return Ok(()) };
            if mine.digest == theirs.digest && mine.len == theirs.len {
                count += 1;
                let places = self.found.get_mut(one as usize).into_iter().flatten();
                places.filter(|place| **place == NOWHERE).take(1).for_each(|place| *place = this);
            }
            Ok(())
        })
        .map_err(|source| StoreError::File {
            what: "read",
            path: other.dir().to_path_buf(),
            source,
        })?;
        Ok(count)
    }
}

fn is_somewhere(found: &[u16; REMEMBERED]) -> bool {
    found.iter().any(|place| *place != NOWHERE)
}

impl Source {
    fn open(layer: Arc<Layer>) -> Result<Self, StoreError> {
        let digests = Records::open(&layer.dir().join("digests"))?;
        Ok(Self { layer, digests })
    }

    /// Where it has a chunk, the first place if there are several.
    fn find(&self, chunk: &ChunkRecord) -> io::Result<Option<u64>> {
        let prefix = *chunk.digest.first_chunk().unwrap_or(&[0; 8]);
        let at = self.digests.partition_point(|record| record.prefix < prefix)?;
        let Some(record) = self.digests.get(at)?.filter(|record| record.prefix == prefix) else {
            return Ok(None);
        };
        let found = self.layer.chunk(record.number())?;
        let same = found.filter(|found| found.digest == chunk.digest && found.len == chunk.len);
        Ok(same.map(|found| found.store_offset.get()))
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

/// Pairs of records with equal prefixes; of several in `theirs` the first is taken.
fn join(
    mut mine: Sorted,
    mut theirs: Sorted,
    mut pair: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut left, mut right) = (mine.next()?, theirs.next()?);
    while let (Some(one), Some(other)) = (left, right) {
        match one.prefix.cmp(&other.prefix) {
            std::cmp::Ordering::Less => left = mine.next()?,
            std::cmp::Ordering::Greater => right = theirs.next()?,
            std::cmp::Ordering::Equal => {
                pair(one.number(), other.number())?;
                left = mine.next()?;
            }
        }
    }
    Ok(())
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
