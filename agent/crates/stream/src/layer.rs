//! A layer whose bytes are fetched when they are read, and filled in the background.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sluice_image::index::LayerIndex;
use sluice_image::records::{ChunkRecord, DigestAlgorithm, SpanRecord};
use sluice_store::{Layer, Store};
use tokio::sync::{Notify, watch};

use crate::run::{self, Run};
use crate::source::read_all;
use crate::{BlobSource, Lane, Scheduler, StreamError};

/// Compressed bytes that a background fetch asks for at most.
const FILL_RUN: u64 = 4 << 20;
/// Compressed bytes that a demand fetch asks for at most beyond its first span.
const DEMAND_RUN: u64 = 8 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// What was verified is made durable this often while filling.
const FLUSH_INTERVAL: Duration = Duration::from_secs(2);
/// How often damaged bytes are fetched again before the layer is given up.
const CORRUPT_ATTEMPTS: u32 = 2;

/// What a streamed layer is made of.
#[derive(Debug)]
pub struct LayerParts {
    /// Its place in the store.
    pub layer: Arc<Layer>,
    /// The store.
    pub store: Store,
    /// Its blob in the registry.
    pub blob: Arc<dyn BlobSource>,
    /// Its index blob, for windows.
    pub index_blob: Arc<dyn BlobSource>,
    /// The node's scheduler.
    pub scheduler: Scheduler,
    /// How long a blocked read waits for a source that is away.
    pub outage_timeout: Duration,
}

/// See the module text.
#[derive(Debug)]
pub struct StreamedLayer {
    parts: LayerParts,
    spans: Vec<SpanRecord>,
    windows_offset: u64,
    layer_size: u64,
    tar_size: u64,
    algorithm: DigestAlgorithm,
    random_access: bool,
    /// Decoding goes on from one span into the next, so that a fetch may bring several.
    continuous: bool,
    /// First spans of the runs under way, and which spans they bring.
    under_way: Mutex<HashSet<usize>>,
    arrived: Arc<Notify>,
    complete: watch::Sender<bool>,
    broken: Mutex<Option<StreamError>>,
}

impl StreamedLayer {
    /// `index` is the layer's table of contents; of it only the spans stay in memory.
    pub fn new(parts: LayerParts, index: &LayerIndex) -> Arc<Self> {
        let header = index.header();
        Arc::new(Self {
            spans: index.spans().to_vec(),
            windows_offset: header.windows.offset.get(),
            layer_size: header.layer_size.get(),
            tar_size: header.tar_size.get(),
            algorithm: index.digest_algorithm(),
            random_access: index.random_access(),
            continuous: index.spans_are_continuous(),
            under_way: Mutex::default(),
            arrived: Arc::new(Notify::new()),
            complete: watch::channel(parts.layer.is_complete()).0,
            broken: Mutex::default(),
            parts,
        })
    }

    /// The layer in the store.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.parts.layer
    }

    /// Becomes true when the layer is complete.
    pub fn completion(&self) -> watch::Receiver<bool> {
        self.complete.subscribe()
    }

    /// Reads from what is here; `false` if some of it is not.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
        let here = self.parts.layer.try_read(offset, buffer)?;
        if here {
            self.parts.scheduler.counters().from_disk.fetch_add(1, Ordering::Relaxed);
        }
        Ok(here)
    }

    /// Reads a range, fetching what is not here; waits for a source that is away, up to the outage time-out.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, StreamError> {
        let counters = self.parts.scheduler.counters();
        counters.from_registry.fetch_add(1, Ordering::Relaxed);
        counters.waiting.fetch_add(1, Ordering::Relaxed);
        let fetched = {
            let _demand = self.parts.scheduler.demand();
            self.ensure(offset..offset.saturating_add(len as u64), Lane::Demand).await
        };
        counters.waiting.fetch_sub(1, Ordering::Relaxed);
        fetched?;
        let mut buffer = vec![0; len];
        match self.parts.layer.try_read(offset, &mut buffer) {
            Ok(true) => Ok(Bytes::from(buffer)),
            Ok(false) => Err(StreamError::Store {
                layer: self.parts.layer.digest().to_owned(),
                message: format!("bytes {offset}+{len} vanished from the store"),
            }),
            Err(error) => Err(StreamError::io(self.parts.layer.digest(), &error)),
        }
    }

    /// Makes a store range local.
    async fn ensure(&self, range: Range<u64>, lane: Lane) -> Result<(), StreamError> {
        let mut outage = Outage::new(self.parts.outage_timeout);
        loop {
            if let Some(error) = self.lock_broken().clone() {
                return Err(error);
            }
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before looking, so that nothing that arrives in between is missed.
            arrived.as_mut().enable();
            let missing = self.missing(range.clone())?;
            let Some(chunk) = missing.first() else { return Ok(()) };
            let spans = self.spans_of(chunk)?;
            let Some(claim) = self.claim(spans.clone(), lane) else {
                // Somebody fetches it already; a fetch that fails also wakes us.
                arrived.await;
                continue;
            };
            match self.fetch(&claim, lane).await {
                Ok(()) => outage.over(),
                Err(error) => {
                    drop(claim);
                    outage.pause(&error, self.parts.layer.digest(), range.clone()).await?;
                }
            }
        }
    }

    fn missing(&self, range: Range<u64>) -> Result<Vec<ChunkRecord>, StreamError> {
        let layer = &self.parts.layer;
        layer.missing_chunks(range).map_err(|error| StreamError::io(layer.digest(), &error))
    }

    /// Spans that hold a chunk's bytes.
    fn spans_of(&self, chunk: &ChunkRecord) -> Result<Range<usize>, StreamError> {
        let layer = &self.parts.layer;
        let start = chunk.store_offset.get();
        let extents = layer
            .extents(start..start + u64::from(chunk.len.get()))
            .map_err(|error| StreamError::io(layer.digest(), &error))?;
        let end = start + u64::from(chunk.len.get());
        let tar_at = |extent: &sluice_image::records::ExtentRecord, store: u64| {
            extent.tar_offset.get() + store.saturating_sub(extent.store_offset.get())
        };
        let first = extents.first().map_or(0, |extent| tar_at(extent, start));
        let last = extents.last().map_or(first + 1, |extent| {
            tar_at(extent, end.min(extent.store_offset.get() + extent.len.get()))
        });
        if !self.random_access {
            return Ok(0..self.spans.len());
        }
        let from = self.spans.partition_point(|span| span.tar_offset.get() <= first).saturating_sub(1);
        let to = self.spans.partition_point(|span| span.tar_offset.get() < last);
        Ok(from..to.max(from + 1))
    }

    /// Claims spans for one fetch; `None` if any of them is being fetched.
    fn claim(&self, spans: Range<usize>, _: Lane) -> Option<Claim<'_>> {
        let mut under_way = self.lock_under_way();
        if spans.clone().any(|span| under_way.contains(&span)) {
            return None;
        }
        under_way.extend(spans.clone());
        Some(Claim { layer: self, spans })
    }

    async fn fetch(&self, claim: &Claim<'_>, lane: Lane) -> Result<(), StreamError> {
        let mut attempts = 0;
        loop {
            match self.fetch_once(claim, lane).await {
                Err(error @ StreamError::Corrupt { .. }) => {
                    attempts += 1;
                    tracing::warn!(layer = self.parts.layer.digest(), %error, attempts, "damaged bytes came");
                    if attempts >= CORRUPT_ATTEMPTS {
                        *self.lock_broken() = Some(error.clone());
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    async fn fetch_once(&self, claim: &Claim<'_>, lane: Lane) -> Result<(), StreamError> {
        let spans = &claim.spans;
        let digest = || self.parts.layer.digest().to_owned();
        let Some(span) = self.spans.get(spans.start).copied() else {
            return Err(StreamError::Index { layer: digest(), message: "its index has no spans".to_owned() });
        };
        let compressed = self.compressed(spans.clone());
        let window = self.window(&span, lane).await.map_err(|source| StreamError::Fetch {
            layer: digest(),
            start: compressed.start,
            end: compressed.end,
            source,
        })?;
        let tar_end = self.spans.get(spans.end).map_or(self.tar_size, |span| span.tar_offset.get());
        let run =
            Run { tar: span.tar_offset.get()..tar_end, span, window, compressed, algorithm: self.algorithm };
        let _place = self.parts.scheduler.decoding_place(lane).await;
        let layer = Arc::clone(&self.parts.layer);
        let came = run::fetch(run, layer, &*self.parts.blob, lane, Arc::clone(&self.arrived)).await?;
        self.parts.scheduler.counters().add_bytes(lane, came);
        Ok(())
    }

    /// Compressed bytes of spans: one more than to the next span's if that begins inside a byte.
    fn compressed(&self, spans: Range<usize>) -> Range<u64> {
        let start = self.spans.get(spans.start).map_or(0, |span| span.compressed_offset.get());
        let end = self
            .spans
            .get(spans.end)
            .map_or(self.layer_size, |next| next.compressed_offset.get() + u64::from(next.bits > 0));
        start..end.min(self.layer_size)
    }

    async fn window(&self, span: &SpanRecord, lane: Lane) -> Result<Vec<u8>, crate::SourceError> {
        let len = u64::from(span.window_len.get());
        if len == 0 {
            return Ok(Vec::new());
        }
        let start = self.windows_offset + span.window_offset.get();
        read_all(&*self.parts.index_blob, start..start + len, lane).await
    }

    /// Fetches everything that is missing, in order, when nothing more urgent is to be done; then checks the whole.
    pub async fn fill(&self) -> Result<(), StreamError> {
        let mut offset = 0;
        let mut outage = Outage::new(Duration::MAX);
        let mut flushed = Instant::now();
        loop {
            if let Some(error) = self.lock_broken().clone() {
                return Err(error);
            }
            let layer = &self.parts.layer;
            let next = layer.next_missing(offset).map_err(|error| StreamError::io(layer.digest(), &error))?;
            let Some(chunk) = next else {
                if layer.is_full() {
                    break;
                }
                offset = 0;
                continue;
            };
            let _turn = self.parts.scheduler.background_turn().await;
            match self.fill_step(&chunk).await {
                Ok(()) => outage.over(),
                Err(error) => {
                    let start = chunk.store_offset.get();
                    outage.pause(&error, layer.digest(), start..start + u64::from(chunk.len.get())).await?;
                }
            }
            offset = chunk.store_offset.get();
            if flushed.elapsed() >= FLUSH_INTERVAL {
                self.flush().await?;
                flushed = Instant::now();
            }
        }
        self.finish().await
    }

    /// Fetches the run of spans that begins with `chunk`'s.
    async fn fill_step(&self, chunk: &ChunkRecord) -> Result<(), StreamError> {
        let mut spans = self.spans_of(chunk)?;
        if self.random_access && self.continuous {
            let start = self.compressed(spans.clone()).start;
            while spans.end < self.spans.len()
                && self.compressed(start_to(&spans, spans.end + 1)).end - start <= FILL_RUN
                && !self.lock_under_way().contains(&spans.end)
            {
                spans.end += 1;
            }
        }
        debug_assert!(FILL_RUN <= DEMAND_RUN);
        let arrived = self.arrived.notified();
        tokio::pin!(arrived);
        arrived.as_mut().enable();
        match self.claim(spans, Lane::Fill) {
            Some(claim) => self.fetch(&claim, Lane::Fill).await,
            None => {
                arrived.await;
                Ok(())
            }
        }
    }

    /// Makes durable what was verified so far.
    pub async fn flush(&self) -> Result<(), StreamError> {
        let (store, layer) = (self.parts.store.clone(), Arc::clone(&self.parts.layer));
        let digest = layer.digest().to_owned();
        match tokio::task::spawn_blocking(move || store.flush(&layer)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(StreamError::store(&digest, &error)),
            Err(error) => Err(StreamError::Store { layer: digest, message: error.to_string() }),
        }
    }

    /// Checks the diffID of a full layer and marks it complete.
    async fn finish(&self) -> Result<(), StreamError> {
        let (store, layer) = (self.parts.store.clone(), Arc::clone(&self.parts.layer));
        let digest = layer.digest().to_owned();
        let checked = tokio::task::spawn_blocking(move || check_and_complete(&store, &layer)).await;
        match checked {
            Ok(Ok(())) => {
                self.complete.send_replace(true);
                Ok(())
            }
            Ok(Err(error)) => {
                *self.lock_broken() = Some(error.clone());
                Err(error)
            }
            Err(error) => Err(StreamError::Store { layer: digest, message: error.to_string() }),
        }
    }

    fn lock_under_way(&self) -> MutexGuard<'_, HashSet<usize>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_broken(&self) -> MutexGuard<'_, Option<StreamError>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start_to(spans: &Range<usize>, end: usize) -> Range<usize> {
    spans.start..end
}

/// Replays the tar of a full layer and compares its diffID with the image's. A layer that was indexed by its own table of contents
/// is verified by that table's digests, up to the manifest that names it: its tar is not known.
fn check_and_complete(store: &Store, layer: &Layer) -> Result<(), StreamError> {
    let digest = layer.digest();
    let blob = std::fs::read(layer.index_path()).map_err(|error| StreamError::io(digest, &error))?;
    let index = LayerIndex::from_blob(blob).map_err(|error| StreamError::index(digest, &error))?;
    if !index.has_own_tar() {
        return store.mark_complete(layer).map_err(|error| StreamError::store(digest, &error));
    }
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let read = |offset: u64, buffer: &mut [u8]| {
        if layer.try_read(offset, buffer)? {
            Ok(())
        } else {
            Err(std::io::Error::other("a verified block is gone"))
        }
    };
    index
        .replay_tar(read, |bytes| context.update(bytes))
        .map_err(|error| StreamError::index(digest, &error))?;
    let sum = context.finish();
    let actual =
        format!("sha256:{}", sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    if actual != layer.diff_id() {
        return Err(StreamError::DiffId {
            layer: digest.to_owned(),
            expected: layer.diff_id().to_owned(),
            actual,
        });
    }
    store.mark_complete(layer).map_err(|error| StreamError::store(digest, &error))
}

/// Spans that one fetch brings. Dropped, it wakes those who waited for them, whatever came.
#[derive(Debug)]
struct Claim<'a> {
    layer: &'a StreamedLayer,
    spans: Range<usize>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut under_way = self.layer.lock_under_way();
        for span in self.spans.clone() {
            under_way.remove(&span);
        }
        drop(under_way);
        self.layer.arrived.notify_waiters();
    }
}

/// Waiting for a source that is away.
#[derive(Debug)]
struct Outage {
    since: Option<Instant>,
    pause: Duration,
    timeout: Duration,
}

impl Outage {
    fn new(timeout: Duration) -> Self {
        Self { since: None, pause: FIRST_PAUSE, timeout }
    }

    fn over(&mut self) {
        self.since = None;
        self.pause = FIRST_PAUSE;
    }

    /// Waits a while if trying again may help and the time-out has not passed; gives the error back otherwise.
    async fn pause(
        &mut self,
        error: &StreamError,
        layer: &str,
        range: Range<u64>,
    ) -> Result<(), StreamError> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let size = range.end - range.start;
        if !error.is_transient() || since.elapsed() >= self.timeout {
            tracing::error!(layer, offset = range.start, size, %error, "read failed");
            return Err(error.clone());
        }
        tracing::warn!(layer, offset = range.start, size, %error, waited_ms = since.elapsed().as_millis() as u64, "waiting for the registry");
        let jitter = rand_fraction(range.start ^ since.elapsed().as_nanos() as u64);
        tokio::time::sleep(self.pause.mul_f64(0.5 + jitter)).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// A number from 0 to 1 that differs between waiters: enough to spread their retries.
fn rand_fraction(seed: u64) -> f64 {
    let mixed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    mixed as f64 / f64::from(1 << 24)
}
