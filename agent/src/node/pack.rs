//! A start pack, fetched in pieces: those are asked for, in order, that nobody else is fetching by then.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sluice_image::parts::ranges_of;
use sluice_prefetch::{Head, PACK_HEAD, Pace, PackFrame, PackTable};
use sluice_stream::{Expected, FetchDone, Lane, StreamedLayer};
use tokio::sync::{Semaphore, mpsc};

use super::Node;
use super::pack_bytes::PackBytes;
use super::reads::{ReadLog, Recording};

/// Bytes asked for at once, if a frame has not more. Small, since what is asked for is waited for by demand too.
pub(super) const PIECE: u64 = 1 << 20;
/// Pieces under way at once: enough for 200 Mbit/s with 20 ms round trip, and 1 Gbit/s with 2 ms.
pub(super) const IN_FLIGHT: usize = 3;
/// Pieces that demand waits for, in the order in which they come.
const EXPECTED: usize = 16;

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
    /// Takes a start pack's chunks and parts as they arrive, each compared with the layer's index. What demand or others have fetched, or are
    /// about to, is left out; for what was asked for demand waits.
    pub(super) async fn take_pack(
        &self,
        pack: PackBytes,
        layers: &Layers,
        pace: &Pace,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let began = Instant::now();
        let mut taken = Taken::default();
        let (pack, table) = (&pack, Arc::new(self.pack_table(&pack, &mut taken, recorded).await?));
        let mut next = 0;
        let pieces = std::iter::from_fn(|| {
            let piece = next_piece(&table, &mut next, layers);
            piece
                .inspect_err(|error| tracing::warn!(%error, "cannot look for what is missing"))
                .ok()
                .flatten()
        });
        let in_flight = &Semaphore::new(IN_FLIGHT);
        // Looked for only when there is a place for it: what demand took by then is left out.
        let fetches = futures::stream::iter(pieces).map(|piece| async move {
            if pack.comes_early(&piece.bytes).await {
                return anyhow::Ok((piece, None));
            }
            let _place = in_flight.acquire().await?;
            self.scheduler.prefetch_turn().await;
            pace.wait().await;
            let began = Instant::now();
            let bytes = pack.read(piece.bytes.clone()).await?;
            Ok((piece, Some((bytes, began))))
        });
        let mut fetches = fetches.buffered(EXPECTED);
        let (sender, mut receiver) = mpsc::channel(IN_FLIGHT);
        // What comes is not waited with until what came is kept.
        let fetch = async move {
            while let Some(fetched) = fetches.try_next().await? {
                if sender.send(fetched).await.is_err() {
                    break;
                }
            }
            anyhow::Ok(())
        };
        let keep = async {
            while let Some((piece, fetched)) = receiver.recv().await {
                let bytes = match fetched {
                    Some((bytes, began)) => {
                        self.count_pack(&mut taken, recorded, began, piece.bytes.clone());
                        pace.spend(bytes.len() as u64);
                        bytes
                    }
                    // Only now, so that what waits is in memory once.
                    None => pack.early(&piece.bytes),
                };
                let (table, layers, log) = (Arc::clone(&table), layers.clone(), Arc::clone(&self.reads));
                // Decompression, digests and writes: not on the threads that serve reads.
                let (kept, twice) =
                    tokio::task::spawn_blocking(move || keep(&table, &piece, &bytes, &layers, &log))
                        .await??;
                taken.chunks += kept;
                taken.twice += twice;
            }
            anyhow::Ok(())
        };
        futures::try_join!(fetch, keep)?;
        let early = pack.came_early();
        if early > 0 {
            self.count_pack(&mut taken, recorded, pack.began, 0..early);
        }
        tracing::info!(?taken, size = pack.size(), took = ?began.elapsed(), "the start pack is here");
        Ok(())
    }

    /// Counts a part of the pack that came, and records it.
    fn count_pack(&self, taken: &mut Taken, recorded: Option<&Recording>, began: Instant, bytes: Range<u64>) {
        let len = bytes.end.saturating_sub(bytes.start);
        (taken.requests, taken.bytes) = (taken.requests + len.div_ceil(PIECE), taken.bytes + len);
        self.scheduler.counters().add_bytes(Lane::Prefetch, len);
        crate::metrics::count(&self.reads.metrics.packs);
        self.reads.metrics.pack_bytes.fetch_add(len, Ordering::Relaxed);
        if let Some(recording) = recorded {
            let (lane, offset) = (Lane::Prefetch, bytes.start);
            let fetch = FetchDone { layer: "", lane, offset, len, began, first_byte: None, whole: true };
            recording.pack_fetched(&fetch);
        }
    }

    async fn pack_table(
        &self,
        pack: &PackBytes,
        taken: &mut Taken,
        recorded: Option<&Recording>,
    ) -> Result<PackTable> {
        let mut beginning = BytesMut::new();
        let mut wanted = PACK_HEAD;
        loop {
            let range = beginning.len() as u64..wanted.min(pack.size());
            let bytes = if pack.comes_early(&range).await {
                pack.early(&range)
            } else {
                let began = Instant::now();
                let bytes = pack.read(range.clone()).await?;
                self.count_pack(taken, recorded, began, range);
                bytes
            };
            beginning.extend_from_slice(&bytes);
            match PackTable::parse(&beginning, pack.size())? {
                Head::Table(table) => return Ok(table),
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
        for (layer, offset, parts) in table.items(frame) {
            wanted |= layers.get(layer).map_or(Ok(false), |layer| layer.wants(offset, parts))?;
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
    let mut chunks: HashMap<&str, Vec<(u64, u64)>> = HashMap::new();
    for (layer, offset, parts) in frames.iter().flat_map(|frame| table.items(frame)) {
        chunks.entry(layer).or_default().push((offset, parts));
    }
    let expected = chunks.into_iter().filter_map(|(layer, chunks)| Some(layers.get(layer)?.expect(chunks)));
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
            // One that is not there is local.
            let Some(layer) = layers.get(&item.layer) else { continue };
            let (at, parts) = (item.store_offset, item.parts);
            let taken = match parts {
                0 => layer.offer(at, &item.bytes)?,
                parts => layer.offer_parts(at, parts, &item.proof, &item.bytes)?,
            };
            match (taken, parts) {
                (false, _) => twice += 1,
                (true, 0) => log.packed(&item.layer, at..at + item.bytes.len() as u64),
                // The last may be shorter, by less than a block.
                (true, _) => ranges_of(u32::MAX, parts).for_each(|part| {
                    log.packed(&item.layer, at + u64::from(part.start)..at + u64::from(part.end));
                }),
            }
            kept += u64::from(taken);
        }
    }
    Ok((kept, twice))
}
