//! The background fill: what other layers have is copied, the rest fetched in order, then the whole is checked.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_image::index::LayerIndex;
use sluice_image::records::ChunkRecord;
use sluice_store::{Layer, Store, StoreError};

use crate::layer::{bytes_of, end_of};
use crate::outage::Outage;
use crate::spans::Place;
use crate::{Lane, StreamError, StreamedLayer};

/// Compressed bytes that a background fetch asks for at most, if its first span has not more.
const FILL_RUN: u64 = 4 << 20;
/// What was verified is made durable this often while filling.
const FLUSH_INTERVAL: Duration = Duration::from_secs(2);
/// A disk that loses whatever is written for so long ends a fill.
const DISK_PATIENCE: Duration = Duration::from_secs(10);
/// How often a paused fill looks whether the store has space again: nothing tells.
const SPACE_POLL: Duration = Duration::from_millis(500);
/// Chunks copied in one turn.
const COPIES_AT_ONCE: usize = 64;

impl StreamedLayer {
    /// Brings everything that is missing, in order, when nothing more urgent is to be done; then checks the whole. Waits for a
    /// source that is away, and for space. Bytes that stay damaged are passed over, and are an error at the end. What the disk
    /// loses is fetched again; if that goes on, it is an error.
    pub async fn fill(self: &Arc<Self>) -> Result<(), StreamError> {
        self.copy_all().await?;
        let mut disk = Outage::new(DISK_PATIENCE);
        loop {
            let all = 0..self.parts.layer.size();
            self.fill_all(&mut disk).await?;
            match self.finish().await {
                Err(error @ StreamError::Lost { .. }) => {
                    disk.pause(&error, self.parts.layer.digest(), all).await?;
                }
                other => return other,
            }
        }
    }

    /// Brings everything that is missing; `disk` knows how long it has been losing what came.
    async fn fill_all(self: &Arc<Self>, disk: &mut Outage) -> Result<(), StreamError> {
        let layer = Arc::clone(&self.parts.layer);
        let mut offset = 0;
        let mut outage = Outage::new(Duration::MAX);
        let mut damaged: Option<StreamError> = None;
        let mut flushed = Instant::now();
        loop {
            if let Some(error) = self.broken().clone() {
                return Err(error);
            }
            if flushed.elapsed() >= FLUSH_INTERVAL {
                match self.flush_if_space().await {
                    Ok(()) => disk.over(),
                    Err(error @ StreamError::Lost { .. }) => {
                        disk.pause(&error, layer.digest(), 0..layer.size()).await?;
                    }
                    Err(error) => return Err(error),
                }
                flushed = Instant::now();
            }
            let Some(chunk) = layer.next_missing(offset).map_err(|error| self.io(&error))? else {
                match damaged {
                    Some(error) => return Err(self.with_path(error).await),
                    None if layer.is_full() => return Ok(()),
                    None => offset = 0,
                }
                continue;
            };
            let bytes = bytes_of(&chunk);
            offset = bytes.start;
            match self.fill_step(&chunk, &mut flushed).await {
                Ok(()) => outage.over(),
                Err(error @ StreamError::Corrupt { .. }) => {
                    offset = self.behind_damage(&error, &chunk)?;
                    damaged.get_or_insert(error);
                }
                Err(error) => outage.pause(&error, layer.digest(), bytes).await?,
            }
        }
    }

    /// Fetches the run of spans that begins with `chunk`'s.
    async fn fill_step(
        self: &Arc<Self>,
        chunk: &ChunkRecord,
        flushed: &mut Instant,
    ) -> Result<(), StreamError> {
        let layer = &self.parts.layer;
        let spans = match self.spans.place_of(layer, chunk).map_err(|error| self.io(&error))? {
            Place::Hole => return self.insert_hole(chunk),
            Place::Spans(spans) => self.whole_run(spans)?,
        };
        let _turn = self.parts.scheduler.background_turn().await;
        self.wait_for_space().await;
        let arrived = self.claims.arrived.notified();
        tokio::pin!(arrived);
        arrived.as_mut().enable();
        let claim = match self.claim(spans, Lane::Fill) {
            Ok(claim) => claim,
            Err(run) => {
                arrived.await;
                return run.failed_for_good(chunk).cloned().map_or(Ok(()), Err);
            }
        };
        if layer.has(bytes_of(chunk)) {
            // It came while this waited for its turn.
            return Ok(());
        }
        let fetching = self.fetch(&claim, Lane::Fill);
        tokio::pin!(fetching);
        // A layer in one piece is one run: it is made durable meanwhile.
        loop {
            tokio::select! {
                fetched = &mut fetching => return fetched,
                () = tokio::time::sleep(FLUSH_INTERVAL) => {
                    match self.flush_if_space().await {
                        // The run goes on; what was lost of it is fetched again behind it.
                        Ok(()) | Err(StreamError::Lost { .. }) => {}
                        Err(error) => return Err(error),
                    }
                    *flushed = Instant::now();
                }
            }
        }
    }

    /// Where to go on after damage: the rest of its span came, or cannot come.
    fn behind_damage(&self, error: &StreamError, chunk: &ChunkRecord) -> Result<u64, StreamError> {
        let layer = &self.parts.layer;
        let found = match error {
            StreamError::Corrupt { offset, .. } => layer.chunk_at(*offset),
            _ => Ok(None),
        };
        let damaged = found.map_err(|error| self.io(&error))?.unwrap_or(*chunk);
        // Damage before the wanted chunk: its span does not decode from its beginning, so nothing of it comes.
        let from = if damaged.store_offset.get() < chunk.store_offset.get() { chunk } else { &damaged };
        let behind = self.spans.behind(layer, from).map_err(|error| self.io(&error))?;
        Ok(behind.max(end_of(chunk)))
    }

    /// As many spans more as one fetch brings, as long as something in them is missing and nobody fetches it.
    fn whole_run(&self, mut spans: Range<usize>) -> Result<Range<usize>, StreamError> {
        let start = self.spans.compressed(spans.clone()).start;
        while self.spans.random_access
            && self.spans.continuous
            && spans.end < self.spans.len()
            && self.spans.compressed(spans.start..spans.end + 1).end - start <= FILL_RUN
            && !self.claims.is_claimed(spans.end)
            && self.spans.is_wanted(&self.parts.layer, spans.end).map_err(|error| self.io(&error))?
        {
            spans.end += 1;
        }
        Ok(spans)
    }

    /// Copies what other layers of the store have.
    async fn copy_all(self: &Arc<Self>) -> Result<(), StreamError> {
        let copies = self.copies().await?;
        let mut offset = copies.next(&self.parts.layer, 0).map_err(|error| self.io(&error))?;
        while let Some(start) = offset {
            let _turn = self.parts.scheduler.background_turn().await;
            if !self.parts.layer.has_space() {
                // What cannot be copied now is fetched later.
                return Ok(());
            }
            let this = Arc::clone(self);
            let copied = tokio::task::spawn_blocking(move || this.copy_some(start)).await;
            offset = copied.map_err(|error| self.store_failed(error.to_string()))??;
        }
        Ok(())
    }

    /// Copies some chunks from `start` on; where to go on.
    fn copy_some(&self, start: u64) -> Result<Option<u64>, StreamError> {
        let mut next = Some(start);
        for _ in 0..COPIES_AT_ONCE {
            let Some(offset) = next else { break };
            let chunk = self.parts.layer.chunk_at(offset).map_err(|error| self.io(&error))?;
            let Some(chunk) = chunk.filter(|chunk| chunk.store_offset.get() == offset) else { break };
            if !self.parts.layer.has(bytes_of(&chunk)) {
                self.copy(&chunk)?;
            }
            next = self.copies_after(bytes_of(&chunk).end)?;
        }
        Ok(next)
    }

    /// Pauses while the store takes nothing more.
    async fn wait_for_space(&self) {
        let layer = &self.parts.layer;
        if layer.has_space() {
            return;
        }
        tracing::warn!(layer = layer.digest(), "no space in the layer store: the background fill pauses");
        while !layer.has_space() {
            tokio::time::sleep(SPACE_POLL).await;
        }
        tracing::info!(layer = layer.digest(), "the layer store has space: the background fill goes on");
    }

    /// Makes durable what was verified so far, but for what only memory has.
    pub async fn flush(&self) -> Result<(), StreamError> {
        self.in_store(|store, layer| store.flush(layer)).await
    }

    /// A flush that finds no space is tried again with the next one.
    async fn flush_if_space(&self) -> Result<(), StreamError> {
        match self.flush().await {
            Err(error @ StreamError::DiskFull { .. }) => {
                tracing::warn!(%error, "what was verified is not recorded yet");
                Ok(())
            }
            other => other,
        }
    }

    /// Checks the diffID of a full layer and marks it complete, as soon as all of it is on the disk. `Lost`: it is not full any more.
    async fn finish(&self) -> Result<(), StreamError> {
        // What is recorded is read without comparing each chunk again.
        self.flush_if_space().await?;
        let digest = self.parts.layer.digest().to_owned();
        let layer = Arc::clone(&self.parts.layer);
        let checked = tokio::task::spawn_blocking(move || check_diff_id(&layer)).await;
        match checked.map_err(|error| self.store_failed(error.to_string()))? {
            Ok(()) => {}
            Err(error @ StreamError::Lost { .. }) => return Err(error),
            Err(error) => {
                *self.broken() = Some(error.clone());
                return Err(error);
            }
        }
        loop {
            match self.in_store(|store, layer| store.mark_complete(layer)).await {
                Ok(()) => break,
                Err(StreamError::DiskFull { .. }) => {
                    self.wait_for_space().await;
                    tokio::time::sleep(SPACE_POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
        tracing::debug!(layer = digest, "complete");
        self.complete.send_replace(true);
        Ok(())
    }

    async fn in_store(
        &self,
        work: impl FnOnce(&Store, &Layer) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StreamError> {
        let (store, layer) = (self.parts.store.clone(), Arc::clone(&self.parts.layer));
        match tokio::task::spawn_blocking(move || work(&store, &layer)).await {
            Ok(done) => done.map_err(|error| StreamError::store(self.parts.layer.digest(), &error)),
            Err(error) => Err(self.store_failed(error.to_string())),
        }
    }
}

/// Replays the tar of a full layer and compares its diffID with the image's. A layer that was indexed by its own table of contents
/// is verified by that table's digests, up to the manifest that names it: its tar is not known.
fn check_diff_id(layer: &Layer) -> Result<(), StreamError> {
    let digest = layer.digest();
    let blob = std::fs::read(layer.index_path()).map_err(|error| StreamError::io(digest, &error))?;
    let index = LayerIndex::from_blob(blob).map_err(|error| StreamError::index(digest, &error))?;
    if !index.has_own_tar() {
        return Ok(());
    }
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let gone = Cell::new(false);
    let read = |offset: u64, buffer: &mut [u8]| {
        gone.set(!layer.try_read(offset, buffer)?);
        if gone.get() { Err(std::io::Error::other("a verified block is gone")) } else { Ok(()) }
    };
    index.replay_tar(read, |bytes| context.update(bytes)).map_err(|error| match gone.get() {
        // That says nothing of the index.
        true => StreamError::Lost { layer: digest.to_owned(), message: error.to_string() },
        false => StreamError::index(digest, &error),
    })?;
    let sum = context.finish();
    let actual =
        format!("sha256:{}", sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    if actual == layer.diff_id() {
        return Ok(());
    }
    Err(StreamError::DiffId { layer: digest.to_owned(), expected: layer.diff_id().to_owned(), actual })
}
