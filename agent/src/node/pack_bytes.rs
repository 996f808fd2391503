//! The bytes of a start pack: the first of them are fetched while the image is still made ready, since the link is idle meanwhile.

use std::ops::Range;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sluice_registry::RegistryError;
use sluice_registry::artifact::ArtifactReader;
use sluice_stream::Scheduler;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::pack::{IN_FLIGHT, PIECE};

/// Bytes fetched before anybody can take them: held in memory.
const MOST_EARLY: u64 = 12 << 20;

/// See the module text.
#[derive(Debug)]
pub(super) struct PackBytes {
    pack: ArtifactReader,
    early: Option<Early>,
    pub(super) began: Instant,
}

/// The first bytes, without gaps. Nothing more comes when this is dropped.
#[derive(Debug)]
struct Early {
    bytes: watch::Receiver<BytesMut>,
    fetching: JoinHandle<()>,
}

impl PackBytes {
    /// With the node's `scheduler` it begins to fetch at once.
    pub(super) fn new(pack: ArtifactReader, scheduler: Option<Scheduler>) -> Self {
        let early = scheduler.map(|scheduler| {
            let (sender, bytes) = watch::channel(BytesMut::new());
            Early { bytes, fetching: tokio::spawn(fetch_early(pack.clone(), scheduler, sender)) }
        });
        Self { pack, early, began: Instant::now() }
    }

    pub(super) fn size(&self) -> u64 {
        self.pack.size()
    }

    /// How many bytes came early until now.
    pub(super) fn came_early(&self) -> u64 {
        self.early.as_ref().map_or(0, |early| early.bytes.borrow().len() as u64)
    }

    /// A range that is fetched early, once it is here; none if it is not, or does not come.
    pub(super) async fn early(&self, range: &Range<u64>) -> Option<Bytes> {
        let mut bytes = self.early.as_ref().filter(|_| range.end <= MOST_EARLY)?.bytes.clone();
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        let came = bytes.wait_for(|bytes| bytes.len() >= end).await.ok()?;
        came.get(start..end).map(Bytes::copy_from_slice)
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

async fn fetch_early(pack: ArtifactReader, scheduler: Scheduler, sender: watch::Sender<BytesMut>) {
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
        sender.send_modify(|early| early.extend_from_slice(&bytes));
        Ok(())
    };
    if let Err(error) = pieces.buffered(IN_FLIGHT).try_for_each(keep).await {
        tracing::debug!(%error, "the start pack does not come early");
    }
}
