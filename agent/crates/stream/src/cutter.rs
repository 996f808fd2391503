//! Cuts a stretch of tar into the chunks it holds whole, compares each with its digest, and stores it.

use std::time::Duration;

use bytes::Bytes;
use sluice_image::records::{ChunkRecord, DigestAlgorithm, ExtentRecord};
use sluice_store::Layer;

use crate::StreamError;
use crate::claims::Ticket;

/// How often background work looks whether the store has space again: nothing tells.
const SPACE_POLL: Duration = Duration::from_millis(200);

/// What is wrong with a chunk when its neighbours may be well.
pub(crate) const DIGEST_MISMATCH: &str = "digest mismatch";

/// See the module text.
pub(crate) struct Cutter<'a> {
    layer: &'a Layer,
    algorithm: DigestAlgorithm,
    ticket: &'a Ticket,
    /// Whether the run was given up.
    given_up: &'a dyn Fn() -> bool,
    tar: u64,
    extent: Option<ExtentRecord>,
    next_extent: u64,
    chunk: Option<OpenChunk>,
    /// The first chunk that was not what it should be: the others are taken all the same.
    damaged: Option<StreamError>,
    /// Only the rest of the open chunk is taken.
    ending: bool,
}

struct OpenChunk {
    record: ChunkRecord,
    bytes: Vec<u8>,
    /// Store bytes of the chunk that extents cover and that are still to come.
    left: u64,
    /// False when the stretch began inside the chunk, or it is here already.
    wanted: bool,
}

impl<'a> Cutter<'a> {
    pub(crate) fn new(
        layer: &'a Layer,
        tar: u64,
        algorithm: DigestAlgorithm,
        ticket: &'a Ticket,
        given_up: &'a dyn Fn() -> bool,
    ) -> Result<Self, StreamError> {
        let next_extent = layer.extent_at(tar).map_err(|error| StreamError::io(layer.digest(), &error))?;
        let mut cutter = Self {
            layer,
            algorithm,
            ticket,
            given_up,
            tar,
            extent: None,
            next_extent,
            chunk: None,
            damaged: None,
            ending: false,
        };
        cutter.load_extent()?;
        Ok(cutter)
    }

    /// The spans have passed: whether the rest of a chunk that began in them is still to come.
    pub(crate) fn is_ended(&mut self) -> bool {
        self.ending = true;
        self.chunk.as_ref().is_none_or(|chunk| !chunk.wanted)
    }

    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            if self.ending && self.is_ended() {
                return Ok(());
            }
            let Some(extent) = self.extent else {
                self.tar += bytes.len() as u64;
                return Ok(());
            };
            let start = extent.tar_offset.get();
            if self.tar < start {
                let skipped = bytes.len().min(usize::try_from(start - self.tar).unwrap_or(usize::MAX));
                bytes = bytes.get(skipped..).unwrap_or(&[]);
                self.tar += skipped as u64;
                continue;
            }
            let in_extent = self.tar - start;
            if in_extent >= extent.len.get() {
                self.load_extent()?;
                continue;
            }
            let store = extent.store_offset.get() + in_extent;
            let taken = self.content(store, extent.len.get() - in_extent, bytes)?;
            bytes = bytes.get(taken..).unwrap_or(&[]);
            self.tar += taken as u64;
        }
        Ok(())
    }

    /// Ends the stretch: an error if a chunk of it was damaged.
    pub(crate) fn finish(self) -> Result<(), StreamError> {
        self.damaged.map_or(Ok(()), Err)
    }

    /// What differs, and at which bytes of the store: those of the chunk that was to come.
    pub(crate) fn corrupt_here(&self, what: String) -> StreamError {
        let chunk = self.chunk.as_ref().map(|chunk| chunk.record).or_else(|| {
            let extent = self.extent?;
            let in_extent = self.tar.saturating_sub(extent.tar_offset.get());
            // An error on top of an error: the offset alone is told then.
            self.layer.chunk_at(extent.store_offset.get() + in_extent).ok().flatten()
        });
        match chunk {
            Some(chunk) => StreamError::corrupt(self.layer.digest(), &chunk, what),
            None => StreamError::Corrupt {
                layer: self.layer.digest().to_owned(),
                path: None,
                offset: self.layer.size(),
                size: 0,
                what,
            },
        }
    }

    /// Takes content for the chunk at `store`, at most to the chunk's or the extent's end.
    fn content(&mut self, store: u64, extent_left: u64, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.chunk.as_ref().is_none_or(|chunk| store >= chunk.end()) {
            self.open_chunk(store)?;
        }
        let Some(chunk) = &mut self.chunk else {
            return Err(self.corrupt_here("content outside every chunk".to_owned()));
        };
        let room = (chunk.end() - store).min(extent_left);
        let taken = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if chunk.wanted {
            let at = (store - chunk.record.store_offset.get()) as usize;
            if let Some(target) = chunk.bytes.get_mut(at..at + taken) {
                target.copy_from_slice(bytes.get(..taken).unwrap_or(bytes));
            }
        }
        chunk.left = chunk.left.saturating_sub(taken as u64);
        if chunk.left == 0 {
            self.close_chunk()?;
        }
        Ok(taken)
    }

    fn open_chunk(&mut self, store: u64) -> Result<(), StreamError> {
        let io = |error: std::io::Error| StreamError::io(self.layer.digest(), &error);
        self.chunk = None;
        let Some(record) = self.layer.chunk_at(store).map_err(io)? else {
            return Err(self.corrupt_here("no such chunk".to_owned()));
        };
        let start = record.store_offset.get();
        let end = start + u64::from(record.len.get());
        let extents = self.layer.extents(start..end).map_err(io)?;
        let covered = |extent: &ExtentRecord| {
            let from = extent.store_offset.get().max(start);
            let to = (extent.store_offset.get() + extent.len.get()).min(end);
            (from, to.saturating_sub(from))
        };
        let all: u64 = extents.iter().map(|extent| covered(extent).1).sum();
        let before: u64 =
            extents.iter().map(covered).map(|(from, len)| store.saturating_sub(from).min(len)).sum();
        let wanted = before == 0 && !self.layer.has(start..end);
        self.chunk = Some(OpenChunk {
            record,
            left: all - before,
            wanted,
            bytes: if wanted { vec![0; record.len.get() as usize] } else { Vec::new() },
        });
        Ok(())
    }

    fn close_chunk(&mut self) -> Result<(), StreamError> {
        let Some(chunk) = self.chunk.take().filter(|chunk| chunk.wanted) else { return Ok(()) };
        if self.algorithm.digest(&chunk.bytes) != chunk.record.digest {
            let what = DIGEST_MISMATCH.to_owned();
            let error = StreamError::corrupt(self.layer.digest(), &chunk.record, what);
            self.damaged.get_or_insert(error);
            return Ok(());
        }
        let bytes = Bytes::from(chunk.bytes);
        // Background work waits here for space, and so does the transfer behind it; it hurries when somebody comes to wait for it.
        while !self.layer.insert_verified(&chunk.record, &bytes, self.ticket.urgent()) {
            if (self.given_up)() {
                return Err(StreamError::DiskFull { layer: self.layer.digest().to_owned() });
            }
            std::thread::sleep(SPACE_POLL);
        }
        self.ticket.arrived(self.layer.digest(), crate::layer::bytes_of(&chunk.record));
        Ok(())
    }

    fn load_extent(&mut self) -> Result<(), StreamError> {
        self.extent = self
            .layer
            .extent(self.next_extent)
            .map_err(|error| StreamError::io(self.layer.digest(), &error))?;
        self.next_extent += 1;
        Ok(())
    }
}

impl OpenChunk {
    fn end(&self) -> u64 {
        self.record.store_offset.get() + u64::from(self.record.len.get())
    }
}
