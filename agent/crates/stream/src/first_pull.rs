//! The first pull of a layer that has no index: decoded, indexed and stored while it arrives.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer};
use sluice_store::{Ingest, Layer, Store};
use tokio::sync::mpsc;

use crate::{BlobSource, Lane, Scheduler, SourceError, StreamError};

/// Each may hold a receive buffer of up to 400 KiB.
const PIECES_WAITING: usize = 8;
const ATTEMPTS: u32 = 8;

/// A layer that is now local, and the index that fell out.
#[derive(Debug)]
pub struct FirstPull {
    /// Complete.
    pub layer: Arc<Layer>,
    /// With windows: ready to be published.
    pub index: LayerIndex,
}

/// Pulls a layer in order. `digest` and `diff_id` are what manifest and configuration say; nothing is kept unless both match.
/// `progress` is told how many compressed bytes came.
pub async fn first_pull(
    store: &Store,
    scheduler: &Scheduler,
    source: Arc<dyn BlobSource>,
    digest: &str,
    diff_id: &str,
    progress: impl Fn(u64) + Send,
) -> Result<FirstPull, StreamError> {
    let (sender, receiver) = mpsc::channel(PIECES_WAITING);
    let (to_store, expected, expected_diff_id) = (store.clone(), digest.to_owned(), diff_id.to_owned());
    let indexing =
        tokio::task::spawn_blocking(move || index(&to_store, receiver, &expected, &expected_diff_id));
    let sent = send(&*source, scheduler, sender, progress).await;
    let indexed = indexing
        .await
        .map_err(|error| StreamError::Store { layer: digest.to_owned(), message: error.to_string() })?;
    match (sent, indexed) {
        (_, Ok(pulled)) => Ok(pulled),
        (Err(source_error), Err(_)) => Err(StreamError::Fetch {
            layer: digest.to_owned(),
            start: 0,
            end: source.size(),
            source: source_error,
        }),
        (Ok(()), Err(error)) => Err(error),
    }
}

/// Sends the blob to the indexer; a broken transfer goes on where it stopped.
async fn send(
    source: &dyn BlobSource,
    scheduler: &Scheduler,
    sender: mpsc::Sender<Bytes>,
    progress: impl Fn(u64),
) -> Result<(), SourceError> {
    let mut offset = 0;
    let mut attempt = 0;
    while offset < source.size() {
        let mut body = source.read(offset..source.size(), Lane::Demand);
        let mut failed = None;
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => {
                    let len = piece.len() as u64;
                    offset += len;
                    attempt = 0;
                    scheduler.counters().add_bytes(Lane::Demand, len);
                    progress(len);
                    if sender.send(piece).await.is_err() {
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
            let error = failed.unwrap_or_else(|| SourceError {
                message: "the transfer ended early".to_owned(),
                transient: true,
            });
            attempt += 1;
            if !error.transient || attempt >= ATTEMPTS {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
        }
    }
    Ok(())
}

fn index(
    store: &Store,
    mut pieces: mpsc::Receiver<Bytes>,
    digest: &str,
    diff_id: &str,
) -> Result<FirstPull, StreamError> {
    let ingest: Ingest = store.begin_ingest().map_err(|error| StreamError::store(digest, &error))?;
    let failed = |error| StreamError::index(digest, &error);
    let mut indexer = LayerIndexer::new(IndexOptions::default(), ingest).map_err(failed)?;
    while let Some(piece) = pieces.blocking_recv() {
        indexer.push(&piece).map_err(failed)?;
    }
    let (index, ingest) = indexer.finish(digest).map_err(failed)?;
    let actual = index.header().diff_id_text();
    if actual != diff_id {
        return Err(StreamError::DiffId { layer: digest.to_owned(), expected: diff_id.to_owned(), actual });
    }
    let layer = store.commit_ingest(ingest, &index).map_err(|error| StreamError::store(digest, &error))?;
    Ok(FirstPull { layer, index })
}
