//! Bytes that a process will want soon: fetched before it asks, or taken from elsewhere, if they are what the index says.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sluice_image::records::ChunkRecord;

use crate::layer::{bytes_of, end_of};
use crate::spans::Place;
use crate::{Lane, StreamError, StreamedLayer};

/// Compressed bytes that one prefetch asks for at most, if its first span has not more. Demand waits no longer than such a run's
/// remaining span takes.
const PREFETCH_RUN: u64 = 4 << 20;

/// See [`StreamedLayer::expect`].
#[derive(Debug)]
pub struct Expected {
    layer: Arc<StreamedLayer>,
    store_offsets: Vec<u64>,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut expected = self.layer.lock(&self.layer.expected);
        for offset in &self.store_offsets {
            expected.remove(offset);
        }
        drop(expected);
        // Whoever waited for what did not come goes on.
        self.layer.claims.arrived.notify_waiters();
    }
}

impl StreamedLayer {
    /// Brings what is missing of a store range, behind all demand and before the fill, in runs of whole spans. What another
    /// fetch brings, or what there is no space for, is passed over. Gives the compressed bytes that were asked for.
    pub async fn prefetch(self: &Arc<Self>, range: Range<u64>) -> Result<u64, StreamError> {
        let layer = &self.parts.layer;
        let _prefetching = self.parts.scheduler.prefetching();
        let mut asked = 0;
        let mut offset = range.start;
        while layer.has_space() {
            let missing = layer.first_missing(offset..range.end).map_err(|error| self.io(&error))?;
            let Some(chunk) = missing else { break };
            let first = match self.spans.place_of(layer, &chunk).map_err(|error| self.io(&error))? {
                Place::Hole => {
                    self.insert_hole(&chunk)?;
                    offset = end_of(&chunk);
                    continue;
                }
                Place::Spans(spans) => spans,
            };
            let behind = self.spans.behind(layer, &chunk).map_err(|error| self.io(&error))?;
            offset = behind.max(end_of(&chunk));
            let spans = self.run_ahead(first, range.end, &mut offset)?;
            let Ok(claim) = self.claim(spans.clone(), Lane::Prefetch) else { continue };
            let compressed = self.spans.compressed(spans);
            asked += compressed.end - compressed.start;
            self.fetch(&claim, Lane::Prefetch).await?;
        }
        Ok(asked)
    }

    /// As many spans as one run takes, while something before `end` is missing in them; `offset` moves behind them.
    fn run_ahead(
        &self,
        mut spans: Range<usize>,
        end: u64,
        offset: &mut u64,
    ) -> Result<Range<usize>, StreamError> {
        let layer = &self.parts.layer;
        let start = self.spans.compressed(spans.clone()).start;
        while self.spans.random_access
            && self.spans.continuous
            && *offset < end
            && spans.end < self.spans.len()
            && self.spans.compressed(spans.start..spans.end + 1).end - start <= PREFETCH_RUN
            && !self.claims.is_claimed(spans.end)
        {
            let next = layer.first_missing(*offset..end).map_err(|error| self.io(&error))?;
            let Some(next) = next else { break };
            if self.spans.place_of(layer, &next).map_err(|error| self.io(&error))?
                != Place::Spans(spans.end..spans.end + 1)
            {
                break;
            }
            let behind = self.spans.behind(layer, &next).map_err(|error| self.io(&error))?;
            *offset = behind.max(end_of(&next));
            spans.end += 1;
        }
        Ok(spans)
    }

    /// Whether a chunk is missing and no fetch is about to bring it.
    pub fn wants(&self, store_offset: u64) -> std::io::Result<bool> {
        let layer = &self.parts.layer;
        let Some(chunk) = layer.chunk_at(store_offset)?.filter(|chunk| !layer.has(bytes_of(chunk))) else {
            return Ok(false);
        };
        Ok(match self.spans.place_of(layer, &chunk)? {
            Place::Hole => false,
            Place::Spans(spans) => !self.claims.is_claimed(spans.start),
        })
    }

    /// Says that chunks are on their way by another way than the layer's blob, e.g. in a start pack: until what this gives is
    /// dropped, a blocked process waits for them instead of fetching them too.
    pub fn expect(self: &Arc<Self>, store_offsets: Vec<u64>) -> Expected {
        self.lock(&self.expected).extend(store_offsets.iter().copied());
        Expected { layer: Arc::clone(self), store_offsets }
    }

    pub(crate) fn is_expected(&self, chunk: &ChunkRecord) -> bool {
        self.lock(&self.expected).contains(&chunk.store_offset.get())
    }

    /// Takes a whole chunk that came another way than from the layer's blob, e.g. in a start pack, if it is what the index says.
    /// False: it was here already, or there is no space for it. Blocks the thread for the digest and the write.
    pub fn offer(&self, store_offset: u64, bytes: &Bytes) -> Result<bool, StreamError> {
        let layer = &self.parts.layer;
        let corrupt = |what: &str| StreamError::Corrupt {
            layer: layer.digest().to_owned(),
            path: None,
            offset: store_offset,
            size: bytes.len() as u64,
            what: what.to_owned(),
        };
        let found = layer.chunk_at(store_offset).map_err(|error| self.io(&error))?;
        let chunk = found
            .filter(|chunk| {
                chunk.store_offset.get() == store_offset && chunk.len.get() as usize == bytes.len()
            })
            .ok_or_else(|| corrupt("the layer has no such chunk"))?;
        if layer.has(bytes_of(&chunk)) {
            return Ok(false);
        }
        if self.algorithm.digest(bytes) != chunk.digest {
            return Err(corrupt("digest mismatch"));
        }
        let kept = layer.insert_verified(&chunk, bytes, false);
        self.claims.arrived.notify_waiters();
        Ok(kept)
    }

    /// The whole chunks, `(store offset, bytes)`, that hold a store range. What is not local is left out.
    pub fn local_chunks(
        layer: &sluice_store::Layer,
        range: Range<u64>,
    ) -> std::io::Result<Vec<(u64, Bytes)>> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(chunk) = layer.chunk_at(at)?.filter(|chunk| chunk.store_offset.get() < range.end) else {
                break;
            };
            let place = bytes_of(&chunk);
            let mut bytes = vec![0; chunk.len.get() as usize];
            if layer.try_read(place.start, &mut bytes)? {
                found.push((place.start, Bytes::from(bytes)));
            }
            at = end_of(&chunk);
        }
        Ok(found)
    }
}
