//! Bytes that a process will want soon: fetched before it asks, or taken from elsewhere, if they are what the index says.

use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sluice_image::parts::{PART_SIZE, parts_of};
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
    /// Store offsets, and which parts.
    chunks: Vec<(u64, u64)>,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut expected = self.layer.lock(&self.layer.expected);
        for (at, parts) in &self.chunks {
            let Entry::Occupied(mut one) = expected.entry(*at) else { continue };
            *one.get_mut() &= !parts;
            if *one.get() == 0 {
                one.remove();
            }
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

    /// Brings a store range as [`prefetch`](Self::prefetch) does, and waits for what another fetch brings of it. Gives the
    /// compressed bytes that were asked for; `None`: not all of it is here.
    pub async fn bring(self: &Arc<Self>, range: Range<u64>) -> Result<Option<u64>, StreamError> {
        let layer = &self.parts.layer;
        let mut asked = 0;
        loop {
            let arrived = self.claims.arrived.notified();
            tokio::pin!(arrived);
            // Registered before looking, so that nothing that arrives in between is missed.
            arrived.as_mut().enable();
            asked += self.prefetch(range.clone()).await?;
            let missing = layer.first_missing(range.clone()).map_err(|error| self.io(&error))?;
            let Some(chunk) = missing else { return Ok(Some(asked)) };
            match self.spans.place_of(layer, &chunk).map_err(|error| self.io(&error))? {
                Place::Spans(spans) if self.claims.is_claimed(spans.start) => arrived.await,
                _ => return Ok(layer.has(range).then_some(asked)),
            }
        }
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

    /// Whether a chunk, or any of `parts` of it, is missing, and no fetch is about to bring it. 0 is the whole chunk.
    pub fn wants(&self, store_offset: u64, parts: u64) -> std::io::Result<bool> {
        let layer = &self.parts.layer;
        let missing = |chunk: &ChunkRecord| match parts {
            0 => !layer.has(bytes_of(chunk)),
            parts => layer.missing_parts(chunk) & parts != 0,
        };
        let Some(chunk) = layer.chunk_at(store_offset)?.filter(missing) else { return Ok(false) };
        Ok(match self.spans.place_of(layer, &chunk)? {
            Place::Hole => false,
            Place::Spans(spans) => !self.claims.is_claimed(spans.start),
        })
    }

    /// Says that chunks, or parts of them, are on their way by another way than the layer's blob, e.g. in a start pack: until what
    /// this gives is dropped, a blocked process waits for them instead of fetching them too. By store offset of the chunk; 0 is all of it.
    pub fn expect(self: &Arc<Self>, chunks: Vec<(u64, u64)>) -> Expected {
        let chunks: Vec<_> =
            chunks.into_iter().map(|(at, parts)| (at, if parts == 0 { u64::MAX } else { parts })).collect();
        let mut expected = self.lock(&self.expected);
        chunks.iter().for_each(|(at, parts)| *expected.entry(*at).or_default() |= parts);
        drop(expected);
        Expected { layer: Arc::clone(self), chunks }
    }

    /// Whether all that is missing of what a chunk has of a range is on its way.
    pub(crate) fn is_expected(&self, chunk: &ChunkRecord, range: &Range<u64>) -> bool {
        let start = chunk.store_offset.get();
        let Some(expected) = self.lock(&self.expected).get(&start).copied() else { return false };
        let in_chunk = range.start.saturating_sub(start)..range.end.saturating_sub(start);
        let wanted =
            parts_of(chunk.len.get(), in_chunk).map(|parts| parts & self.parts.layer.missing_parts(chunk));
        wanted.is_none_or(|wanted| wanted & !expected == 0)
    }

    /// Takes a whole chunk that came another way than from the layer's blob, e.g. in a start pack, if it is what the index says.
    /// False: it was here already, or there is no space for it. Blocks the thread for the digest and the write.
    pub fn offer(&self, store_offset: u64, bytes: &Bytes) -> Result<bool, StreamError> {
        let layer = &self.parts.layer;
        let corrupt = |what| self.not_taken(store_offset, bytes, what);
        let chunk = self.chunk_that_begins(store_offset)?;
        let chunk = chunk.filter(|chunk| chunk.len.get() as usize == bytes.len());
        let chunk = chunk.ok_or_else(|| corrupt("the layer has no such chunk"))?;
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

    /// Takes parts of a chunk, one behind the other, if `proof` shows that they are what the index says; see [`sluice_image::parts`].
    /// False, and blocking, as [`Self::offer`].
    pub fn offer_parts(
        &self,
        store_offset: u64,
        parts: u64,
        proof: &[[u8; 32]],
        bytes: &Bytes,
    ) -> Result<bool, StreamError> {
        let layer = &self.parts.layer;
        let corrupt = |what| self.not_taken(store_offset, bytes, what);
        let chunk = self.chunk_that_begins(store_offset)?.filter(|_| layer.takes_parts());
        let chunk = chunk.ok_or_else(|| corrupt("the layer has no such chunk that is taken apart"))?;
        let missing = layer.missing_parts(&chunk) & parts;
        if missing == 0 {
            return Ok(false);
        }
        let proved = sluice_image::parts::check(chunk.len.get(), parts, bytes, proof, &chunk.digest);
        let mut proved = proved.ok_or_else(|| corrupt("digest mismatch"))?;
        proved.retain(|part| missing & (1 << (part.offset / PART_SIZE)) != 0);
        let kept = layer.insert_parts(&chunk, &proved);
        self.claims.arrived.notify_waiters();
        Ok(kept)
    }

    fn chunk_that_begins(&self, store_offset: u64) -> Result<Option<ChunkRecord>, StreamError> {
        let found = self.parts.layer.chunk_at(store_offset).map_err(|error| self.io(&error))?;
        Ok(found.filter(|chunk| chunk.store_offset.get() == store_offset))
    }

    fn not_taken(&self, offset: u64, bytes: &Bytes, what: &str) -> StreamError {
        StreamError::Corrupt {
            layer: self.parts.layer.digest().to_owned(),
            path: None,
            offset,
            size: bytes.len() as u64,
            what: what.to_owned(),
        }
    }
}
