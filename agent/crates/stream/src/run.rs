//! One run: consecutive spans fetched by one GET, decoded as they arrive, cut into chunks, compared, stored.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use sluice_image::decode::Decoder;
use sluice_image::records::{ChunkRecord, DigestAlgorithm, ExtentRecord, SpanRecord};
use sluice_store::Layer;
use tokio::sync::{Notify, mpsc};

use crate::{BlobSource, Lane, StreamError};

/// Pieces of a body that may wait for the decoder.
const PIECES_WAITING: usize = 16;

/// What is to be fetched.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) span: SpanRecord,
    pub(crate) window: Vec<u8>,
    pub(crate) compressed: Range<u64>,
    pub(crate) tar: Range<u64>,
    pub(crate) algorithm: DigestAlgorithm,
}

/// Fetches and stores a run; every stored chunk wakes `arrived`. Returns the compressed bytes that came.
pub(crate) async fn fetch(
    run: Run,
    layer: Arc<Layer>,
    source: &dyn BlobSource,
    lane: Lane,
    arrived: Arc<Notify>,
) -> Result<u64, StreamError> {
    let (sender, receiver) = mpsc::channel(PIECES_WAITING);
    let digest = layer.digest().to_owned();
    let compressed = run.compressed.clone();
    let mut body = source.read(compressed.clone(), lane);
    let decoding = tokio::task::spawn_blocking(move || decode(&run, &layer, receiver, &arrived));
    let mut came = 0;
    let mut failed = None;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => {
                came += piece.len() as u64;
                if sender.send(piece).await.is_err() {
                    break; // The decoder has all it needs, or failed: it says so below.
                }
            }
            Err(source) => {
                failed = Some(source);
                break;
            }
        }
    }
    drop(sender);
    let decoded = decoding
        .await
        .map_err(|error| StreamError::Store { layer: digest.clone(), message: error.to_string() })?;
    match (decoded, failed) {
        (Ok(()), _) => Ok(came),
        // A body that broke off explains a decoder that had too little.
        (Err(_), Some(source)) => {
            Err(StreamError::Fetch { layer: digest, start: compressed.start, end: compressed.end, source })
        }
        (Err(error), None) => Err(error),
    }
}

fn decode(
    run: &Run,
    layer: &Layer,
    mut pieces: mpsc::Receiver<Bytes>,
    arrived: &Notify,
) -> Result<(), StreamError> {
    let corrupt = |what: String| StreamError::Corrupt { layer: layer.digest().to_owned(), offset: 0, what };
    let mut decoder = Decoder::at_span(&run.span, &run.window).map_err(|error| corrupt(error.to_string()))?;
    let mut cutter = Cutter::new(layer, run.tar.start, run.algorithm)?;
    let mut tar = run.tar.start;
    while tar < run.tar.end {
        let Some(piece) = pieces.blocking_recv() else {
            return Err(corrupt(format!("the blob ends at tar offset {tar}")));
        };
        let mut input: &[u8] = &piece;
        loop {
            let step = decoder.step(input).map_err(|error| corrupt(error.to_string()))?;
            input = input.get(step.consumed..).unwrap_or(&[]);
            let output = decoder.output();
            let wanted = output.len().min(usize::try_from(run.tar.end - tar).unwrap_or(usize::MAX));
            cutter.take(output.get(..wanted).unwrap_or(output), arrived)?;
            tar += wanted as u64;
            if tar == run.tar.end || (step.consumed == 0 && output.is_empty() && !step.boundary) {
                break;
            }
        }
    }
    Ok(())
}

/// Cuts a stretch of tar into the chunks it holds whole.
struct Cutter<'a> {
    layer: &'a Layer,
    algorithm: DigestAlgorithm,
    tar: u64,
    extent: Option<ExtentRecord>,
    next_extent: u64,
    chunk: Option<OpenChunk>,
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
    fn new(layer: &'a Layer, tar: u64, algorithm: DigestAlgorithm) -> Result<Self, StreamError> {
        let next_extent = layer.extent_at(tar).map_err(|error| StreamError::io(layer.digest(), &error))?;
        let mut cutter = Self { layer, algorithm, tar, extent: None, next_extent, chunk: None };
        cutter.load_extent()?;
        Ok(cutter)
    }

    fn take(&mut self, mut bytes: &[u8], arrived: &Notify) -> Result<(), StreamError> {
        while !bytes.is_empty() {
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
            let taken = self.content(store, extent.len.get() - in_extent, bytes, arrived)?;
            bytes = bytes.get(taken..).unwrap_or(&[]);
            self.tar += taken as u64;
        }
        Ok(())
    }

    /// Takes content for the chunk at `store`, at most to the chunk's or the extent's end.
    fn content(
        &mut self,
        store: u64,
        extent_left: u64,
        bytes: &[u8],
        arrived: &Notify,
    ) -> Result<usize, StreamError> {
        if self.chunk.as_ref().is_none_or(|chunk| store >= chunk.end()) {
            self.open_chunk(store)?;
        }
        let Some(chunk) = &mut self.chunk else {
            return Err(self.corrupt(store, "content outside every chunk"));
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
            self.close_chunk(arrived)?;
        }
        Ok(taken)
    }

    fn open_chunk(&mut self, store: u64) -> Result<(), StreamError> {
        let io = |error: std::io::Error| StreamError::io(self.layer.digest(), &error);
        let record =
            self.layer.chunk_at(store).map_err(io)?.ok_or_else(|| self.corrupt(store, "no such chunk"))?;
        let start = record.store_offset.get();
        let end = start + u64::from(record.len.get());
        let extents = self.layer.extents(start..end).map_err(io)?;
        let covered = |extent: &ExtentRecord| {
            let from = extent.store_offset.get().max(start);
            let to = (extent.store_offset.get() + extent.len.get()).min(end);
            (from, to.saturating_sub(from))
        };
        let first = extents.first().map_or(start, |extent| covered(extent).0);
        self.chunk = Some(OpenChunk {
            record,
            left: extents
                .iter()
                .map(|extent| covered(extent).1)
                .sum::<u64>()
                .saturating_sub(store.saturating_sub(first)),
            wanted: store == first && !self.layer.has(start..end),
            bytes: Vec::new(),
        });
        if let Some(chunk) = self.chunk.as_mut().filter(|chunk| chunk.wanted) {
            chunk.bytes = vec![0; chunk.record.len.get() as usize];
        }
        Ok(())
    }

    fn close_chunk(&mut self, arrived: &Notify) -> Result<(), StreamError> {
        let Some(chunk) = self.chunk.take().filter(|chunk| chunk.wanted) else { return Ok(()) };
        let offset = chunk.record.store_offset.get();
        if self.algorithm.digest(&chunk.bytes) != chunk.record.digest {
            return Err(self.corrupt(offset, "digest mismatch"));
        }
        if !self.layer.insert_verified(&chunk.record, &Bytes::from(chunk.bytes), false) {
            return Err(StreamError::DiskFull { layer: self.layer.digest().to_owned() });
        }
        arrived.notify_waiters();
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

    fn corrupt(&self, offset: u64, what: &str) -> StreamError {
        StreamError::Corrupt { layer: self.layer.digest().to_owned(), offset, what: what.to_owned() }
    }
}

impl OpenChunk {
    fn end(&self) -> u64 {
        self.record.store_offset.get() + u64::from(self.record.len.get())
    }
}
