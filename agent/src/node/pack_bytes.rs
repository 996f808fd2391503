//! The bytes of a start pack: the first of them are fetched while the image is still made ready, since the link is idle meanwhile.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use sluice_registry::RegistryError;
use sluice_registry::artifact::ArtifactReader;
use tokio::sync::watch;

use super::pack::{IN_FLIGHT, PIECE};

/// Bytes fetched before anybody can take them: held in memory.
const MOST_EARLY: u64 = 16 << 20;

/// See the module text.
#[derive(Debug)]
pub(super) struct PackBytes {
    pack: ArtifactReader,
    /// What came early, from the beginning on; closed when no more comes.
    early: watch::Receiver<BytesMut>,
    progress: Arc<Progress>,
    pub(super) began: Instant,
}

#[derive(Debug, Default)]
struct Progress {
    /// Where the last piece ends that was asked for early.
    asked: AtomicU64,
    stopped: AtomicBool,
}

impl PackBytes {
    /// `early`: begins to fetch at once.
    pub(super) fn new(pack: ArtifactReader, early: bool) -> Self {
        let (sender, receiver) = watch::channel(BytesMut::new());
        let (progress, began) = (Arc::new(Progress::default()), Instant::now());
        if early {
            tokio::spawn(fetch_early(pack.clone(), Arc::clone(&progress), sender));
        }
        Self { pack, early: receiver, progress, began }
    }

    pub(super) fn size(&self) -> u64 {
        self.pack.size()
    }

    /// From now on only what is asked for by [`PackBytes::read`] is fetched; bytes that were already.
    pub(super) fn stop(&self) -> u64 {
        self.progress.stopped.store(true, Ordering::Release);
        self.progress.asked.load(Ordering::Acquire)
    }

    /// A range that was asked for early, once it is here; none if it was not, or does not come.
    pub(super) async fn early(&self, range: &Range<u64>) -> Option<Bytes> {
        if range.end > self.progress.asked.load(Ordering::Acquire) {
            return None;
        }
        let mut early = self.early.clone();
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        let came = early.wait_for(|bytes| bytes.len() >= end).await.ok()?;
        came.get(start..end).map(Bytes::copy_from_slice)
    }

    pub(super) async fn read(&self, range: Range<u64>) -> Result<Bytes, RegistryError> {
        self.pack.read_all(range).await
    }
}

impl Drop for PackBytes {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn fetch_early(pack: ArtifactReader, progress: Arc<Progress>, sender: watch::Sender<BytesMut>) {
    let end = pack.size().min(MOST_EARLY);
    let begin = |start: u64| {
        let range = start..(start + PIECE).min(end);
        // Whoever stops us may miss the last piece: it is fetched twice then.
        let wanted = !progress.stopped.load(Ordering::Acquire);
        if wanted {
            progress.asked.store(range.end, Ordering::Release);
        }
        wanted.then_some(range)
    };
    let starts = (0..end).step_by(usize::try_from(PIECE).unwrap_or(usize::MAX));
    let ranges = starts.map_while(begin);
    let mut pieces = futures::stream::iter(ranges).map(|range| pack.read_all(range)).buffered(IN_FLIGHT);
    while let Some(piece) = pieces.next().await {
        match piece {
            Ok(bytes) => sender.send_modify(|early| early.extend_from_slice(&bytes)),
            Err(error) => return tracing::debug!(%error, "the start pack does not come early"),
        }
    }
}
