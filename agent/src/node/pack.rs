//! A start pack, fetched in pieces: those are asked for, in order, that nobody else is fetching by then.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sluice_prefetch::{Head, PACK_HEAD, Pace, PackFrame, PackTable};
use sluice_registry::artifact::ArtifactReader;
use sluice_stream::{Expected, FetchDone, Lane, StreamedLayer};

use super::Node;
use super::reads::{ReadLog, Recording};

/// Bytes asked for at once, if a frame has not more. Small, since what is asked for is waited for by demand too.
const PIECE: u64 = 1 << 20;
/// Pieces under way at once: enough for 200 Mbit/s with 20 ms round trip, and 1 Gbit/s with 2 ms.
const IN_FLIGHT: usize = 3;

type Layers = HashMap<String, Arc<StreamedLayer>>;

/// Some frames that stand together, on their way.
struct Piece {
    bytes: Range<u64>,
    frames: Vec<PackFrame>,
    /// Demand waits for them.
    _expected: Vec<Expected>,
}

/// What came of a pack.
#[derive(Debug, Default)]
struct Taken {
    requests: u64,
    bytes: u64,
    chunks: u64,
    /// Chunks that had come another way meanwhile.
    twice: u64,
}

impl Node {
    /// Takes a start pack's chunks as they arrive, each compared with the layer's index. What demand or others have fetched, or are
    /// about to, is left out; for what was asked for demand waits.
    pub(super) async fn take_pack(
        &self,
        pack: &ArtifactReader,
        layers: &Layers,
        pace: &Pace,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let began = Instant::now();
        let mut taken = Taken::default();
        let (table, beginning) = self.pack_table(pack, &mut taken).await?;
        self.pack_came(recorded, began, 0..taken.bytes);
        let table = Arc::new(table);
        let mut next = 0;
        let pieces = std::iter::from_fn(|| {
            let piece = next_piece(&table, &mut next, layers);
            piece
                .inspect_err(|error| tracing::warn!(%error, "cannot look for what is missing"))
                .ok()
                .flatten()
        });
        // Looked for only when there is a place for it: what demand took by then is left out.
        let fetches = futures::stream::iter(pieces).map(|piece| {
            let (pack, beginning) = (pack.clone(), beginning.clone());
            async move {
                let known =
                    usize::try_from(piece.bytes.start).ok().zip(usize::try_from(piece.bytes.end).ok());
                let known = known
                    .and_then(|(start, end)| (end <= beginning.len()).then(|| beginning.slice(start..end)));
                let (bytes, fetched) = match known {
                    Some(bytes) => (bytes, false),
                    None => {
                        self.scheduler.prefetch_turn().await;
                        pace.wait().await;
                        let began = Instant::now();
                        let bytes = pack.read_all(piece.bytes.clone()).await?;
                        self.pack_came(recorded, began, piece.bytes.clone());
                        (bytes, true)
                    }
                };
                anyhow::Ok((piece, bytes, fetched))
            }
        });
        let mut fetches = fetches.buffered(IN_FLIGHT);
        while let Some((piece, bytes, fetched)) = fetches.try_next().await? {
            if fetched {
                let len = bytes.len() as u64;
                (taken.requests, taken.bytes) = (taken.requests + 1, taken.bytes + len);
                self.scheduler.counters().add_bytes(Lane::Prefetch, len);
                pace.spend(len);
            }
            let (table, layers, log) = (Arc::clone(&table), layers.clone(), Arc::clone(&self.reads));
            // Decompression, digests and writes: not on the threads that serve reads.
            let (kept, twice) =
                tokio::task::spawn_blocking(move || keep(&table, &piece, &bytes, &layers, &log)).await??;
            taken.chunks += kept;
            taken.twice += twice;
        }
        tracing::info!(?taken, size = pack.size(), took = ?began.elapsed(), "the start pack is here");
        Ok(())
    }

    /// Counts a request for a part of the pack, and records it.
    fn pack_came(&self, recorded: Option<&Recording>, began: Instant, bytes: Range<u64>) {
        let len = bytes.end.saturating_sub(bytes.start);
        crate::metrics::count(&self.reads.metrics.packs);
        self.reads.metrics.pack_bytes.fetch_add(len, Ordering::Relaxed);
        if let Some(recording) = recorded {
            let (lane, offset) = (Lane::Prefetch, bytes.start);
            let fetch = FetchDone { layer: "", lane, offset, len, began, first_byte: None, whole: true };
            recording.pack_fetched(&fetch);
        }
    }

    /// The table, and the bytes that came with it.
    async fn pack_table(&self, pack: &ArtifactReader, taken: &mut Taken) -> Result<(PackTable, Bytes)> {
        let mut beginning = BytesMut::new();
        let mut wanted = PACK_HEAD;
        loop {
            let range = beginning.len() as u64..wanted.min(pack.size());
            let bytes = pack.read_all(range).await?;
            taken.requests += 1;
            taken.bytes += bytes.len() as u64;
            self.scheduler.counters().add_bytes(Lane::Prefetch, bytes.len() as u64);
            beginning.extend_from_slice(&bytes);
            match PackTable::parse(&beginning, pack.size())? {
                Head::Table(table) => return Ok((table, beginning.freeze())),
                Head::Needs(bytes) => wanted = bytes,
            }
        }
    }
}

/// The next frames that stand together and bring something that nobody else does.
fn next_piece(table: &PackTable, next: &mut usize, layers: &Layers) -> std::io::Result<Option<Piece>> {
    let mut frames: Vec<PackFrame> = Vec::new();
    while let Some(frame) = table.frames().get(*next) {
        let begin = frames.first().map_or(frame.bytes.start, |first| first.bytes.start);
        if !frames.is_empty() && frame.bytes.end - begin > PIECE {
            break;
        }
        let mut wanted = false;
        for (layer, offset) in table.chunks(frame) {
            wanted |= layers.get(layer).map_or(Ok(false), |layer| layer.wants(offset))?;
        }
        match (wanted, frames.is_empty()) {
            (true, _) => frames.push(frame.clone()),
            (false, true) => {}
            (false, false) => break,
        }
        *next += 1;
    }
    let (Some(first), Some(last)) = (frames.first(), frames.last()) else { return Ok(None) };
    let bytes = first.bytes.start..last.bytes.end;
    let mut offsets: HashMap<&str, Vec<u64>> = HashMap::new();
    for (layer, offset) in frames.iter().flat_map(|frame| table.chunks(frame)) {
        offsets.entry(layer).or_default().push(offset);
    }
    let expected =
        offsets.into_iter().filter_map(|(layer, offsets)| Some(layers.get(layer)?.expect(offsets)));
    let expected = expected.collect();
    Ok(Some(Piece { bytes, frames, _expected: expected }))
}

/// Puts a piece's chunks into the store; how many were new there, and how many not. Blocks the thread.
fn keep(
    table: &PackTable,
    piece: &Piece,
    bytes: &Bytes,
    layers: &Layers,
    log: &ReadLog,
) -> Result<(u64, u64)> {
    let (mut kept, mut twice) = (0, 0);
    for frame in &piece.frames {
        let at = |byte: u64| usize::try_from(byte.saturating_sub(piece.bytes.start)).unwrap_or(usize::MAX);
        let packed = bytes.get(at(frame.bytes.start)..at(frame.bytes.end)).unwrap_or_default();
        for item in table.unpack(frame, packed)? {
            match layers
                .get(&item.layer)
                .map(|layer| layer.offer(item.store_offset, &item.bytes))
                .transpose()?
            {
                Some(true) => {
                    let end = item.store_offset + item.bytes.len() as u64;
                    log.packed(&item.layer, item.store_offset..end);
                    kept += 1;
                }
                Some(false) => twice += 1,
                // The layer is local.
                None => {}
            }
        }
    }
    Ok((kept, twice))
}
