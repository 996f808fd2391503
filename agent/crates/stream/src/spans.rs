//! Which spans hold which chunks, and where spans stand in the blob.

use std::io;
use std::ops::Range;

use sluice_image::index::LayerIndex;
use sluice_image::records::{ChunkRecord, ExtentRecord, SpanRecord};
use sluice_store::Layer;

/// zstd gives nothing of a block (128 KiB at most) before all of it came; deflate has tables before it.
const TAIL_MARGIN: u64 = 132 * 1024;

/// A layer's spans; all that stays in memory of its index.
#[derive(Debug)]
pub(crate) struct Spans {
    spans: Vec<SpanRecord>,
    layer_size: u64,
    tar_size: u64,
    /// Where the index blob holds windows.
    windows_offset: u64,
    /// False: decoding can begin at the first span only.
    pub(crate) random_access: bool,
    /// Decoding goes on from one span into the next, so that a fetch may bring several.
    pub(crate) continuous: bool,
}

/// Where a chunk's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere: it is a hole of a sparse file.
    Hole,
    /// These spans.
    Spans(Range<usize>),
}

impl Spans {
    pub(crate) fn new(index: &LayerIndex) -> Self {
        let header = index.header();
        Self {
            spans: index.spans().to_vec(),
            layer_size: header.layer_size.get(),
            tar_size: header.tar_size.get(),
            windows_offset: header.windows.offset.get(),
            random_access: index.random_access(),
            continuous: index.spans_are_continuous(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(crate) fn get(&self, span: usize) -> Option<&SpanRecord> {
        self.spans.get(span)
    }

    /// The span in which a chunk begins: a run brings whole what begins in its spans. All spans if decoding begins at the first
    /// only.
    pub(crate) fn place_of(&self, layer: &Layer, chunk: &ChunkRecord) -> io::Result<Place> {
        let Some(tar) = tar_of(layer, chunk)? else { return Ok(Place::Hole) };
        if !self.random_access {
            return Ok(Place::Spans(0..self.spans.len()));
        }
        let span = self.spans.partition_point(|span| span.tar_offset.get() <= tar.start).saturating_sub(1);
        Ok(Place::Spans(span..span + 1))
    }

    /// Whether a chunk that begins in a span is missing.
    pub(crate) fn is_wanted(&self, layer: &Layer, span: usize) -> io::Result<bool> {
        let tar = self.tar(span..span + 1);
        let mut number = layer.extent_at(tar.start)?;
        while let Some(extent) = layer.extent(number)?.filter(|extent| extent.tar_offset.get() < tar.end) {
            let start = tar.start.max(extent.tar_offset.get()) - extent.tar_offset.get();
            let end = tar.end.saturating_sub(extent.tar_offset.get()).min(extent.len.get());
            let store = extent.store_offset.get();
            for chunk in layer.missing_chunks(store + start..store + end)? {
                if tar_of(layer, &chunk)?.is_some_and(|chunk| tar.contains(&chunk.start)) {
                    return Ok(true);
                }
            }
            number += 1;
        }
        Ok(false)
    }

    /// Compressed bytes of spans and of the rest of the last chunk that begins in them. How many those are is estimated, unless
    /// all that it could take is to be had.
    pub(crate) fn with_tail(&self, layer: &Layer, spans: Range<usize>, all: bool) -> io::Result<Range<u64>> {
        let compressed = self.compressed(spans.clone());
        let tar_end = self.tar(spans.end..spans.end).start;
        let Some(extent) = layer.extent(layer.extent_at(tar_end)?)? else { return Ok(compressed) };
        let store = extent.store_offset.get() + tar_end.saturating_sub(extent.tar_offset.get());
        let Some(chunk) = layer.chunk_at(store)? else { return Ok(compressed) };
        let Some(tar) = tar_of(layer, &chunk)?.filter(|tar| tar.start < tar_end && tar_end < tar.end) else {
            return Ok(compressed);
        };
        let last = self.spans.partition_point(|span| span.tar_offset.get() < tar.end);
        let most = self.compressed(spans.start..last).end;
        let tail = tar.end - tar_end;
        let likely = compressed.end.saturating_add(tail + tail / 8 + TAIL_MARGIN);
        Ok(compressed.start..if all { most } else { most.min(likely) })
    }

    /// Store offset of what follows the span in which a chunk ends.
    pub(crate) fn behind(&self, layer: &Layer, chunk: &ChunkRecord) -> io::Result<u64> {
        let Place::Spans(spans) = self.place_of(layer, chunk)? else {
            return Ok(chunk.store_offset.get() + u64::from(chunk.len.get()));
        };
        let tar = self.tar(spans.end..spans.end).start;
        Ok(layer.extent(layer.extent_at(tar)?)?.map_or(layer.size(), |extent| {
            extent.store_offset.get() + tar.saturating_sub(extent.tar_offset.get())
        }))
    }

    /// Tar bytes of spans.
    pub(crate) fn tar(&self, spans: Range<usize>) -> Range<u64> {
        let at = |span: usize| self.spans.get(span).map_or(self.tar_size, |span| span.tar_offset.get());
        at(spans.start)..at(spans.end)
    }

    /// Compressed bytes of spans: one more than to the next span's if that begins inside a byte.
    pub(crate) fn compressed(&self, spans: Range<usize>) -> Range<u64> {
        let start = self.spans.get(spans.start).map_or(0, |span| span.compressed_offset.get());
        let end = self
            .spans
            .get(spans.end)
            .map_or(self.layer_size, |next| next.compressed_offset.get() + u64::from(next.bits > 0));
        start..end.min(self.layer_size)
    }

    /// Where the index blob holds a span's window; empty if it has none.
    pub(crate) fn window(&self, span: &SpanRecord) -> Range<u64> {
        let start = self.windows_offset + span.window_offset.get();
        start..start + u64::from(span.window_len.get())
    }
}

/// Tar bytes from a chunk's first to its last; `None` if it is all hole.
fn tar_of(layer: &Layer, chunk: &ChunkRecord) -> io::Result<Option<Range<u64>>> {
    let store = chunk.store_offset.get()..chunk.store_offset.get() + u64::from(chunk.len.get());
    let pieces: Vec<Range<u64>> = layer
        .extents(store.clone())?
        .iter()
        .map(|extent| tar_range(extent, &store))
        .filter(|tar| !tar.is_empty())
        .collect();
    Ok(pieces.first().zip(pieces.last()).map(|(first, last)| first.start..last.end))
}

/// Tar bytes of what an extent has of a store range.
fn tar_range(extent: &ExtentRecord, store: &Range<u64>) -> Range<u64> {
    let (from, to) = (extent.store_offset.get(), extent.store_offset.get() + extent.len.get());
    let tar = |offset: u64| extent.tar_offset.get() + (offset - from);
    let start = store.start.max(from);
    tar(start)..tar(store.end.min(to).max(start))
}
