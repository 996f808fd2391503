//! The first pull of a layer that has no index: decoded, indexed and stored while it arrives.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use sluice_image::index::{ContentSink, IndexError, IndexOptions, LayerIndex, LayerIndexer};
use sluice_store::{Ingest, Layer, Store};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::outage::Outage;
use crate::{BlobSource, Lane, Scheduler, SourceError, StreamError};

/// Bytes that may wait for the indexer; then the transfer waits. Several layers are pulled at once.
const WAITING_BYTES: u32 = 512 << 10;
/// How often a pull that found no space looks whether there is some: nothing tells.
const SPACE_POLL: Duration = Duration::from_millis(200);

/// A piece of the blob; its permit bounds how much waits.
type Piece = (Bytes, Option<OwnedSemaphorePermit>);

/// A layer that is now local, and the index that fell out.
#[derive(Debug)]
pub struct FirstPull {
    /// Complete.
    pub layer: Arc<Layer>,
    /// With windows: ready to be published.
    pub index: LayerIndex,
}

/// Pulls a layer in order. `digest` and `diff_id` are what manifest and configuration say; nothing is kept unless both match.
/// `progress` is told how many compressed bytes came. A source that is away, and a full disk, are waited for up to
/// `outage_timeout`.
pub async fn first_pull(
    store: &Store,
    scheduler: &Scheduler,
    source: Arc<dyn BlobSource>,
    (digest, diff_id): (&str, &str),
    outage_timeout: Duration,
    progress: impl Fn(u64) + Send,
) -> Result<FirstPull, StreamError> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (to_store, expected, expected_diff_id) = (store.clone(), digest.to_owned(), diff_id.to_owned());
    let indexing = tokio::task::spawn_blocking(move || {
        index(&to_store, receiver, &expected, &expected_diff_id, outage_timeout)
    });
    let sent = send(&*source, scheduler, sender, digest, outage_timeout, progress).await;
    let indexed = indexing
        .await
        .map_err(|error| StreamError::Store { layer: digest.to_owned(), message: error.to_string() })?;
    match (sent, indexed) {
        (_, Ok(pulled)) => Ok(pulled),
        (Err(error), Err(_)) | (Ok(()), Err(error)) => Err(error),
    }
}

/// Sends the blob to the indexer; a broken transfer goes on where it stopped.
async fn send(
    source: &dyn BlobSource,
    scheduler: &Scheduler,
    sender: mpsc::UnboundedSender<Piece>,
    digest: &str,
    outage_timeout: Duration,
    progress: impl Fn(u64),
) -> Result<(), StreamError> {
    let mut offset = 0;
    let mut outage = Outage::new(outage_timeout);
    let room = Arc::new(Semaphore::new(WAITING_BYTES as usize));
    while offset < source.size() {
        let mut body = source.read(offset..source.size(), Lane::Demand);
        let mut failed = None;
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => {
                    let len = piece.len() as u64;
                    offset += len;
                    outage.over();
                    scheduler.counters().add_bytes(Lane::Demand, len);
                    progress(len);
                    let len = u32::try_from(len).unwrap_or(WAITING_BYTES).min(WAITING_BYTES);
                    // The semaphore is never closed.
                    let permit = tokio::select! {
                        permit = Arc::clone(&room).acquire_many_owned(len) => permit.ok(),
                        () = sender.closed() => None,
                    };
                    if sender.send((piece, permit)).is_err() {
                        return Ok(()); // The indexer failed and says why.
                    }
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if offset < source.size() {
            let early = || SourceError { message: "the transfer ended early".to_owned(), transient: true };
            let source_error = failed.unwrap_or_else(early);
            let (layer, end) = (digest.to_owned(), source.size());
            let error = StreamError::Fetch { layer, start: offset, end, source: source_error };
            outage.pause(&error, digest, offset..end).await?;
        }
    }
    Ok(())
}

/// Waits for space instead of failing, for a while.
struct Patient {
    ingest: Ingest,
    patience: Duration,
}

impl ContentSink for Patient {
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let since = Instant::now();
        loop {
            match self.ingest.write(store_offset, bytes) {
                Err(error) if is_full(&error) && since.elapsed() < self.patience => {
                    std::thread::sleep(SPACE_POLL);
                }
                other => return other,
            }
        }
    }

    fn rewind(&mut self, store_offset: u64) -> std::io::Result<()> {
        self.ingest.rewind(store_offset)
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

fn index(
    store: &Store,
    mut pieces: mpsc::UnboundedReceiver<Piece>,
    digest: &str,
    diff_id: &str,
    patience: Duration,
) -> Result<FirstPull, StreamError> {
    let ingest = store.begin_ingest().map_err(|error| StreamError::store(digest, &error))?;
    let failed = |error| match error {
        IndexError::Sink(source) if is_full(&source) => StreamError::DiskFull { layer: digest.to_owned() },
        error => StreamError::index(digest, &error),
    };
    let mut indexer =
        LayerIndexer::new(IndexOptions::default(), Patient { ingest, patience }).map_err(failed)?;
    while let Some((piece, _permit)) = pieces.blocking_recv() {
        indexer.push(&piece).map_err(failed)?;
    }
    let (index, Patient { ingest, .. }) = indexer.finish(digest).map_err(failed)?;
    let actual = index.header().diff_id_text();
    if actual != diff_id {
        return Err(StreamError::DiffId { layer: digest.to_owned(), expected: diff_id.to_owned(), actual });
    }
    let layer = store.commit_ingest(ingest, &index).map_err(|error| StreamError::store(digest, &error))?;
    Ok(FirstPull { layer, index })
}
