//! The bytes of a start pack: the first of them are fetched while the image is still made ready, since the link is idle meanwhile, but
//! for a moment not before the layers' tables are here, for which all else waits.

use std::convert::Infallible;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sluice_registry::RegistryError;
use sluice_registry::artifact::ArtifactReader;
use sluice_stream::Scheduler;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::pack::{IN_FLIGHT, PIECE};

/// Bytes fetched before anybody can take them: held in memory.
const MOST_EARLY: u64 = 10 << 20;

/// So long the tables have the link for themselves: where round trips are long it would be idle.
const TABLES_ALONE: Duration = Duration::from_millis(25);

/// Held by whoever waits for tables of a layer.
pub(super) type TablesAwaited = mpsc::Sender<Infallible>;
/// Ends when nobody does any more.
pub(super) type TablesCome = mpsc::Receiver<Infallible>;

/// See the module text.
#[derive(Debug)]
pub(super) struct PackBytes {
    pack: ArtifactReader,
    early: Option<Early>,
    pub(super) began: Instant,
}

/// The first bytes, without gaps: pieces of [`PIECE`] bytes, the last of less. Nothing more comes when this is dropped.
#[derive(Debug)]
struct Early {
    pieces: watch::Receiver<Vec<Bytes>>,
    fetching: JoinHandle<()>,
}

impl PackBytes {
    /// With the node's `scheduler` it begins to fetch as soon as nobody holds `tables` any more, or soon.
    pub(super) fn new(pack: ArtifactReader, scheduler: Option<Scheduler>, tables: TablesCome) -> Self {
        let early = scheduler.map(|scheduler| {
            let (sender, pieces) = watch::channel(Vec::new());
            Early { pieces, fetching: tokio::spawn(fetch_early(pack.clone(), scheduler, tables, sender)) }
        });
        Self { pack, early, began: Instant::now() }
    }

    pub(super) fn size(&self) -> u64 {
        self.pack.size()
    }

    /// How many bytes came early until now.
    pub(super) fn came_early(&self) -> u64 {
        self.early.as_ref().map_or(0, |early| length(&early.pieces.borrow()))
    }

    /// Whether a range is fetched early: waits until it is here, or does not come.
    pub(super) async fn comes_early(&self, range: &Range<u64>) -> bool {
        let Some(early) = self.early.as_ref().filter(|_| range.end <= MOST_EARLY) else { return false };
        early.pieces.clone().wait_for(|pieces| length(pieces) >= range.end).await.is_ok()
    }

    /// A range that came early, copied.
    pub(super) fn early(&self, range: &Range<u64>) -> Bytes {
        self.early.as_ref().map(|early| joined(&early.pieces.borrow(), range)).unwrap_or_default()
    }

    pub(super) async fn read(&self, range: Range<u64>) -> Result<Bytes, RegistryError> {
        self.pack.read_all(range).await
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.fetching.abort();
    }
}

fn length(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// A range of what pieces are together.
fn joined(pieces: &[Bytes], range: &Range<u64>) -> Bytes {
    let len = range.end.saturating_sub(range.start);
    let mut wanted = BytesMut::with_capacity(usize::try_from(len).unwrap_or_default());
    let mut start = 0;
    for piece in pieces {
        let end = start + piece.len() as u64;
        let within = |at: u64| usize::try_from(at.clamp(start, end) - start).unwrap_or(usize::MAX);
        wanted.extend_from_slice(piece.get(within(range.start)..within(range.end)).unwrap_or_default());
        start = end;
    }
    wanted.freeze()
}

async fn fetch_early(
    pack: ArtifactReader,
    scheduler: Scheduler,
    mut tables: TablesCome,
    sender: watch::Sender<Vec<Bytes>>,
) {
    // Either way it begins.
    let _late = tokio::time::timeout(TABLES_ALONE, tables.recv()).await;
    let end = pack.size().min(MOST_EARLY);
    let starts = (0..end).step_by(usize::try_from(PIECE).unwrap_or(usize::MAX));
    let pieces = futures::stream::iter(starts).map(|start| {
        let (pack, scheduler) = (&pack, &scheduler);
        async move {
            scheduler.prefetch_turn().await;
            pack.read_all(start..(start + PIECE).min(end)).await
        }
    });
    let keep = async |bytes: Bytes| {
        sender.send_modify(|early| early.push(bytes));
        Ok(())
    };
    if let Err(error) = pieces.buffered(IN_FLIGHT).try_for_each(keep).await {
        tracing::debug!(%error, "the start pack does not come early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_be_in_several_pieces() {
        let pieces = [&b"0123"[..], b"4567", b"89"].map(Bytes::from_static);
        let part = |range: Range<u64>| joined(&pieces, &range);
        assert_eq!(part(0..10), &b"0123456789"[..]);
        assert_eq!((part(1..3), part(3..5), part(2..9)), ("12".into(), "34".into(), "2345678".into()));
        assert_eq!((part(4..8), part(5..5), part(9..12)), ("4567".into(), Bytes::new(), "9".into()));
    }
}
