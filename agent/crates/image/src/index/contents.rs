//! Files, chunks and skeleton of the tar that passes, and the sink that gets the contents.

use std::collections::HashMap;

use super::IndexError;
use super::blob::{Parts, content_key};
use super::layout::{Layout, chunks};
use crate::records::DigestAlgorithm;
use crate::tar::{Content, Step, TarEntry, TarKind, TarParser};
use crate::varint;

/// Receives the contents of a layer's files, by store offset, ascending but for rewinds.
pub trait ContentSink {
    /// Content at `store_offset`; what is never written is zero.
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> std::io::Result<()>;
    /// What was written at or after `store_offset` was a copy of an earlier file: it is to be zero again.
    fn rewind(&mut self, store_offset: u64) -> std::io::Result<()>;
}

/// Takes contents and forgets them: for `sluice index`.
#[derive(Debug, Default)]
pub struct NoSink;

impl ContentSink for NoSink {
    fn write(&mut self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn rewind(&mut self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// Files, chunks and skeleton of the tar that passes.
pub(super) struct Contents<S> {
    sink: S,
    pub(super) layout: Layout,
    chunk_size: u32,
    parts: Parts,
    known: HashMap<[u8; 32], u64>,
    open: Option<OpenFile>,
    pub(super) entries: u64,
}

impl<S> std::fmt::Debug for Contents<S> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Contents").field("entries", &self.entries).finish_non_exhaustive()
    }
}

/// The file whose content passes.
struct OpenFile {
    content: Content,
    store_offset: u64,
    /// Bytes of the file that are in finished chunks.
    done: u64,
    chunk: Vec<u8>,
    first_digest: usize,
    written: bool,
}

impl<S: ContentSink> Contents<S> {
    pub(super) fn new(chunk_size: u32, sink: S) -> Result<Self, IndexError> {
        Ok(Self {
            sink,
            layout: Layout::default(),
            chunk_size,
            parts: Parts::new()?,
            known: HashMap::new(),
            open: None,
            entries: 0,
        })
    }

    pub(super) fn parse(&mut self, parser: &mut TarParser, mut tar: &[u8]) -> Result<(), IndexError> {
        while !tar.is_empty() {
            let (consumed, step) = parser.step(tar)?;
            let (bytes, rest) = tar.split_at_checked(consumed).unwrap_or((tar, &[]));
            match step {
                Step::Content { offset } => self.content(offset, bytes)?,
                Step::Skeleton => self.meta(bytes)?,
                Step::Entry(entry) => {
                    self.meta(bytes)?;
                    self.entry(*entry)?;
                }
            }
            tar = rest;
        }
        Ok(())
    }

    fn meta(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.close_when_full()?;
        self.parts.skeleton(bytes)
    }

    fn entry(&mut self, entry: TarEntry) -> Result<(), IndexError> {
        self.entries += 1;
        if let TarKind::File(content) = entry.kind
            && content.size > 0
        {
            // Before a hole of any size is filled with zeros.
            self.layout.check(content.size)?;
            self.open = Some(OpenFile {
                store_offset: self.layout.next(),
                done: 0,
                chunk: Vec::new(),
                first_digest: self.parts.digests.len(),
                written: false,
                content,
            });
            self.close_when_full()?;
        }
        Ok(())
    }

    fn content(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), IndexError> {
        self.fill_hole(offset)?;
        while !bytes.is_empty() {
            let chunk_size = self.chunk_size as usize;
            let Some(open) = &mut self.open else {
                return Err(IndexError::Corrupt("content without a file"));
            };
            let taken = bytes.len().min(chunk_size - open.chunk.len());
            let (now, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
            open.chunk.extend_from_slice(now);
            bytes = rest;
            if open.chunk.len() == chunk_size {
                self.end_chunk()?;
            }
        }
        self.close_when_full()
    }

    /// Zeros up to `offset` of the open file: a hole of a sparse one.
    fn fill_hole(&mut self, offset: u64) -> Result<(), IndexError> {
        loop {
            let chunk_size = self.chunk_size as usize;
            let Some(open) = &mut self.open else { return Ok(()) };
            let gap = offset.saturating_sub(open.done + open.chunk.len() as u64);
            if gap == 0 {
                return Ok(());
            }
            let taken = (chunk_size - open.chunk.len()).min(usize::try_from(gap).unwrap_or(usize::MAX));
            open.chunk.resize(open.chunk.len() + taken, 0);
            if open.chunk.len() == chunk_size {
                self.end_chunk()?;
            }
        }
    }

    fn end_chunk(&mut self) -> Result<(), IndexError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        self.parts.digests.extend_from_slice(&DigestAlgorithm::Blake3.digest(&open.chunk));
        let at = open.store_offset + open.done;
        open.done += open.chunk.len() as u64;
        // A file of one chunk is written only once it is known to be new.
        let only = open.done == open.content.size && open.first_digest + 32 == self.parts.digests.len();
        if !only {
            open.written = true;
            self.sink.write(at, &open.chunk).map_err(IndexError::Sink)?;
            open.chunk.clear();
        }
        Ok(())
    }

    /// Ends the open file if all its stored bytes have passed.
    fn close_when_full(&mut self) -> Result<(), IndexError> {
        let Some(open) = &self.open else { return Ok(()) };
        let last_stored = open.content.segments().last().map_or(0, |(offset, len)| offset + len);
        let passed = open.done + if open.done == open.content.size { 0 } else { open.chunk.len() as u64 };
        if passed < last_stored {
            return Ok(());
        }
        let size = open.content.size;
        self.fill_hole(size)?;
        if self.open.as_ref().is_some_and(|open| open.done < size) {
            self.end_chunk()?;
        }
        let Some(open) = self.open.take() else { return Ok(()) };
        let key = content_key(size, self.parts.digests.get(open.first_digest..).unwrap_or(&[]));
        if let Some(number) = self.known.get(&key) {
            varint::put(&mut self.parts.files, number + 1);
            self.parts.digests.truncate(open.first_digest);
            if open.written {
                self.sink.rewind(open.store_offset).map_err(IndexError::Sink)?;
            }
            return Ok(());
        }
        varint::put(&mut self.parts.files, 0);
        self.known.insert(key, self.layout.own_count());
        debug_assert_eq!(
            chunks(size, 0, self.chunk_size).count() * 32,
            self.parts.digests.len() - open.first_digest
        );
        if !open.written {
            self.sink.write(open.store_offset, &open.chunk).map_err(IndexError::Sink)?;
        }
        self.layout.place(size)?;
        Ok(())
    }

    pub(super) fn finish(self) -> (Parts, S) {
        (self.parts, self.sink)
    }
}
