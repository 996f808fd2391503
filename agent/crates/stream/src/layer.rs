//! A layer whose bytes are fetched when they are read.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sluice_image::entry::EntryKind;
use sluice_image::index::LayerIndex;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, DigestAlgorithm};
use sluice_store::{Layer, LocalCopies, Store};
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;

use crate::claims::{Claim, Claims, RunState};
use crate::outage::Outage;
use crate::run::{self, Run};
use crate::spans::{Place, Spans};
use crate::told::Told;
use crate::windows::Windows;
use crate::{BlobSource, Lane, Scheduler, SourceError, StreamError};

/// How often damaged bytes are fetched before the read fails: the second time elsewhere, if there is an elsewhere.
const CORRUPT_ATTEMPTS: u32 = 2;
/// A broken transfer of a layer that decodes from anywhere is tried to go on for this long; then it is begun anew.
const RESUME_PATIENCE: Duration = Duration::from_millis(500);
/// The file that has damaged bytes is looked up this often at most: it takes reading the index.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(1);

/// A blocked process waits so long for the next chunk that comes another way; then it fetches by itself.
const EXPECTED_PATIENCE: Duration = Duration::from_secs(1);

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
    pub(crate) parts: LayerParts,
    pub(crate) spans: Spans,
    windows: Arc<Windows>,
    pub(crate) claims: Arc<Claims>,
    pub(crate) algorithm: DigestAlgorithm,
    copies: OnceCell<LocalCopies>,
    pub(crate) complete: watch::Sender<bool>,
    broken: Mutex<Option<StreamError>>,
    /// Digest of so many zeros, the last asked for.
    zeros: Mutex<(u32, [u8; 32])>,
    pub(crate) made: Instant,
    /// Milliseconds after `made` when bytes last came.
    pub(crate) last_byte_ms: AtomicU64,
    pub(crate) last_failure: Mutex<Option<StreamError>>,
    looked_up: Mutex<Option<Instant>>,
    /// Store offsets of chunks that are on their way by another way than the blob, and which of their parts.
    pub(crate) expected: Mutex<HashMap<u64, u64>>,
}

impl StreamedLayer {
    /// `index` is the layer's table of contents; of it only the spans stay in memory.
    pub fn new(parts: LayerParts, index: &LayerIndex) -> Arc<Self> {
        let section = &index.header().windows;
        let section = section.offset.get()..section.offset.get().saturating_add(section.len.get());
        Arc::new(Self {
            spans: Spans::new(index),
            windows: Windows::new(Arc::clone(&parts.index_blob), section, parts.layer.windows_path()),
            claims: Arc::default(),
            algorithm: index.digest_algorithm(),
            copies: OnceCell::new(),
            complete: watch::channel(parts.layer.is_complete()).0,
            broken: Mutex::default(),
            zeros: Mutex::default(),
            made: Instant::now(),
            last_byte_ms: AtomicU64::new(0),
            last_failure: Mutex::default(),
            looked_up: Mutex::default(),
            expected: Mutex::default(),
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

    /// Another handle of the layer, complete and with the same contents, is in the store: to be handed over.
    pub fn replaced(&self) {
        self.complete.send_replace(true);
    }

    /// Forgets that the whole was not what it should be, once the cause is gone.
    pub fn try_again(&self) {
        *self.broken() = None;
    }

    /// Reads from what is here; `false` if some of it is not.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
        let here = self.parts.layer.try_read(offset, buffer)?;
        if here {
            self.parts.scheduler.counters().from_disk.fetch_add(1, Ordering::Relaxed);
        }
        Ok(here)
    }

    /// Reads a range, fetching what is not here; waits for a source that is away, up to the outage time-out, and for a layer that
    /// can only be decoded in order as long as bytes of it come.
    pub async fn read(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes, StreamError> {
        let counters = self.parts.scheduler.counters();
        counters.from_registry.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting::new(&counters.waiting);
        let range = offset..offset.saturating_add(len as u64);
        let _demand = self.parts.scheduler.demand();
        loop {
            if let Err(error) = self.ensure(range.clone()).await {
                return Err(self.failed(error, range).await);
            }
            // Not before: thousands may be waiting.
            let mut buffer = vec![0; len];
            match self.parts.layer.try_read(offset, &mut buffer) {
                Ok(true) => return Ok(Bytes::from(buffer)),
                // It had to make way for others' bytes on a full disk, or the disk does not give it: it is brought again.
                Ok(false) => {}
                Err(error) => return Err(self.failed(self.io(&error), range).await),
            }
        }
    }

    /// Makes a store range local, for a process that is blocked.
    async fn ensure(self: &Arc<Self>, range: Range<u64>) -> Result<(), StreamError> {
        let layer = &self.parts.layer;
        let mut outage = Outage::new(self.parts.outage_timeout);
        // The fetch that this reader began, or the one that it waits for.
        let mut own: Option<(ChunkRecord, JoinHandle<Result<(), StreamError>>)> = None;
        let mut others: Option<Arc<RunState>> = None;
        let mut since = Instant::now();
        let mut patient = true;
        loop {
            if let Some(error) = self.broken().clone() {
                return Err(error);
            }
            let arrived = self.claims.arrived.notified();
            tokio::pin!(arrived);
            // Registered before looking, so that nothing that arrives in between is missed.
            arrived.as_mut().enable();
            let Some(chunk) = layer.first_missing(range.clone()).map_err(|error| self.io(&error))? else {
                return Ok(());
            };
            if let Some((wanted, fetching)) = &mut own {
                let fetched = tokio::select! {
                    () = arrived => continue,
                    fetched = fetching => fetched.map_err(|error| self.store_failed(error.to_string()))?,
                };
                match fetched {
                    // Something else in the same spans may be damaged.
                    Err(error) if !layer.has(bytes_of(wanted)) => {
                        outage.pause(&error, layer.digest(), range.clone()).await?;
                    }
                    _ => outage.over(),
                }
                own = None;
                since = Instant::now();
                continue;
            }
            if let Some(error) = others.take().and_then(|run| run.failed_for_good(&chunk).cloned()) {
                return Err(error);
            }
            if patient && self.is_expected(&chunk, &range) {
                patient = tokio::time::timeout(EXPECTED_PATIENCE, arrived).await.is_ok();
                continue;
            }
            match self.begin(&chunk).await? {
                Begun::Here => {}
                Begun::Fetch(fetching) => own = Some((chunk, fetching)),
                Begun::Others(run) => {
                    // A fetch that fails also wakes us.
                    let left = self.patience_left(since);
                    let woken = tokio::time::timeout(left, arrived).await;
                    if woken.is_err() && self.patience_left(since).is_zero() {
                        return Err(self.nothing_came(&chunk));
                    }
                    others = Some(run);
                }
            }
        }
    }

    /// Brings a chunk from where it can be had soonest.
    async fn begin(self: &Arc<Self>, chunk: &ChunkRecord) -> Result<Begun, StreamError> {
        let place = self.spans.place_of(&self.parts.layer, chunk).map_err(|error| self.io(&error))?;
        let Place::Spans(spans) = place else {
            return self.insert_hole(chunk).map(|()| Begun::Here);
        };
        if self.copy_now(chunk).await? {
            return Ok(Begun::Here);
        }
        let claim = match self.claim(spans, Lane::Demand) {
            Ok(claim) => claim,
            Err(run) => return Ok(Begun::Others(run)),
        };
        if self.parts.layer.has(bytes_of(chunk)) {
            // Another's fetch ended between the look and the claim.
            return Ok(Begun::Here);
        }
        // A task of its own: it goes on for others when this reader has what it wants, or leaves.
        let this = Arc::clone(self);
        Ok(Begun::Fetch(tokio::spawn(async move {
            let _place = this.parts.scheduler.demand_place().await;
            this.fetch(&claim, Lane::Demand).await
        })))
    }

    /// Claims spans for one fetch; the run that has one of them already, if so.
    pub(crate) fn claim(&self, spans: Range<usize>, lane: Lane) -> Result<Claim, Arc<RunState>> {
        self.claims.claim(spans, lane, self.spans.random_access, &self.parts.scheduler)
    }

    /// Fetches what is claimed.
    pub(crate) async fn fetch(&self, claim: &Claim, lane: Lane) -> Result<(), StreamError> {
        let mut attempts = 0;
        let fetched = loop {
            match self.fetch_once(claim, lane, attempts > 0).await {
                Err(error @ StreamError::Corrupt { .. }) => {
                    attempts += 1;
                    tracing::warn!(%error, attempts, "damaged bytes came");
                    if attempts >= CORRUPT_ATTEMPTS {
                        break Err(error);
                    }
                }
                other => break other,
            }
        };
        if let Err(error) = &fetched {
            claim.run.fail(error);
        }
        *self.lock(&self.last_failure) = fetched.as_ref().err().cloned();
        fetched
    }

    async fn fetch_once(&self, claim: &Claim, lane: Lane, elsewhere: bool) -> Result<(), StreamError> {
        let spans = claim.spans.clone();
        let digest = || self.parts.layer.digest().to_owned();
        let Some(span) = self.spans.get(spans.start).copied() else {
            return Err(StreamError::Index { layer: digest(), message: "its index has no spans".to_owned() });
        };
        let layer = &self.parts.layer;
        let compressed = if self.spans.random_access {
            self.spans.with_tail(layer, spans.clone(), elsewhere).map_err(|error| self.io(&error))?
        } else {
            self.spans.compressed(spans.clone())
        };
        let (windows, at) = (Arc::clone(&self.windows), self.spans.window(&span));
        let window = tokio::spawn(async move { windows.read(at, lane, elsewhere).await });
        let run = Run {
            tar: (spans.start..=spans.end).map(|span| self.spans.tar(span..span).start).collect(),
            first_span: spans.start,
            span,
            window,
            compressed,
            algorithm: self.algorithm,
            lane,
            elsewhere,
            patience: if self.spans.random_access {
                RESUME_PATIENCE.min(self.parts.outage_timeout / 4)
            } else {
                self.parts.outage_timeout
            },
        };
        let state = (&*claim.run, claim.ticket());
        let told = Told::new(self, lane, run.compressed.clone());
        let fetched =
            run::fetch(run, Arc::clone(layer), &*self.parts.blob, &self.parts.scheduler, state, &told).await;
        told.ended(fetched.is_ok());
        fetched
    }

    /// How long somebody who waits for another's fetch still does: as long as bytes come, and the outage time-out beyond.
    fn patience_left(&self, waiting_since: Instant) -> Duration {
        let last_byte = self.made + Duration::from_millis(self.last_byte_ms.load(Ordering::Relaxed));
        self.parts.outage_timeout.saturating_sub(last_byte.max(waiting_since).elapsed())
    }

    fn nothing_came(&self, chunk: &ChunkRecord) -> StreamError {
        self.lock(&self.last_failure).clone().unwrap_or_else(|| StreamError::Fetch {
            layer: self.parts.layer.digest().to_owned(),
            start: bytes_of(chunk).start,
            end: bytes_of(chunk).end,
            source: SourceError {
                message: format!("nothing came for {} s", self.parts.outage_timeout.as_secs()),
                transient: true,
            },
        })
    }

    /// A chunk that no extent covers is zeros, if the index says so too.
    pub(crate) fn insert_hole(&self, chunk: &ChunkRecord) -> Result<(), StreamError> {
        let len = chunk.len.get();
        let mut zeros = self.lock(&self.zeros);
        if zeros.0 != len {
            *zeros = (len, self.algorithm.digest(&vec![0; len as usize]));
        }
        if zeros.1 != chunk.digest {
            let what = "a hole whose digest is not that of zeros".to_owned();
            return Err(StreamError::corrupt(self.parts.layer.digest(), chunk, what));
        }
        drop(zeros);
        self.parts.layer.insert_hole(chunk);
        self.claims.arrived.notify_waiters();
        Ok(())
    }

    /// Which chunks other layers of the store have. Looked up once.
    pub(crate) async fn copies(&self) -> Result<&LocalCopies, StreamError> {
        let look = || async {
            let (store, layer) = (self.parts.store.clone(), Arc::clone(&self.parts.layer));
            match tokio::task::spawn_blocking(move || store.local_copies(&layer)).await {
                Ok(found) => found.map_err(|error| StreamError::store(self.parts.layer.digest(), &error)),
                Err(error) => Err(self.store_failed(error.to_string())),
            }
        };
        self.copies.get_or_try_init(look).await
    }

    /// Copies a chunk from another layer, if it is known already that one has it: a blocked process does not wait for the look-up.
    async fn copy_now(self: &Arc<Self>, chunk: &ChunkRecord) -> Result<bool, StreamError> {
        let Some(copies) = self.copies.get() else {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = this.copies().await {
                    tracing::warn!(%error, "other layers are not looked through for copies");
                }
            });
            return Ok(false);
        };
        if copies.is_empty() {
            return Ok(false);
        }
        let (this, chunk) = (Arc::clone(self), *chunk);
        let copied = tokio::task::spawn_blocking(move || this.copy(&chunk)).await;
        copied.map_err(|error| self.store_failed(error.to_string()))?
    }

    /// Copies a chunk from another layer, if one has it. Blocks the thread.
    pub(crate) fn copy(&self, chunk: &ChunkRecord) -> Result<bool, StreamError> {
        let Some(copies) = self.copies.get() else { return Ok(false) };
        let layer = &self.parts.layer;
        let copied = copies
            .copy(layer, chunk, self.algorithm)
            .map_err(|error| StreamError::store(layer.digest(), &error))?;
        if copied {
            let copied_bytes = &self.parts.scheduler.counters().copied_bytes;
            copied_bytes.fetch_add(chunk.len.get().into(), Ordering::Relaxed);
            self.claims.arrived.notify_waiters();
        }
        Ok(copied)
    }

    /// Store offset of the first chunk at or after `offset` that another layer may have.
    pub(crate) fn copies_after(&self, offset: u64) -> Result<Option<u64>, StreamError> {
        let Some(copies) = self.copies.get() else { return Ok(None) };
        copies.next(&self.parts.layer, offset).map_err(|error| self.io(&error))
    }

    /// Adds the file to an error about damaged bytes.
    pub(crate) async fn with_path(self: &Arc<Self>, mut error: StreamError) -> StreamError {
        if let StreamError::Corrupt { path, offset, .. } = &mut error {
            let (this, offset) = (Arc::clone(self), *offset);
            *path = tokio::task::spawn_blocking(move || this.file_at(offset)).await.ok().flatten();
        }
        error
    }

    /// Logs a read that fails, with the file it is about.
    async fn failed(self: &Arc<Self>, mut error: StreamError, range: Range<u64>) -> StreamError {
        let at = match &error {
            StreamError::Corrupt { offset, .. } => *offset,
            _ => range.start,
        };
        let this = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || this.file_at(at)).await.ok().flatten();
        if let StreamError::Corrupt { path, .. } = &mut error {
            path.clone_from(&found);
        }
        let (layer, size) = (self.parts.layer.digest(), range.end - range.start);
        tracing::error!(layer, path = found, offset = range.start, size, %error, "read failed");
        error
    }

    /// A file that has the bytes at a store offset; `None` also when this was asked a moment ago.
    pub(crate) fn file_at(&self, offset: u64) -> Option<String> {
        let mut looked_up = self.lock(&self.looked_up);
        if looked_up.is_some_and(|at| at.elapsed() < LOOK_UP_INTERVAL) {
            return None;
        }
        *looked_up = Some(Instant::now());
        drop(looked_up);
        // What cannot be found out is left out of a message about something worse.
        let index = LayerIndex::from_blob(std::fs::read(self.parts.layer.index_path()).ok()?).ok()?;
        let mut entries = index.entries().ok()?;
        entries.find_map(|entry| {
            let entry = entry.ok()?;
            match entry.kind {
                EntryKind::File { size, store_offset }
                    if size > 0 && (store_offset..store_offset + size).contains(&offset) =>
                {
                    Some(String::from_utf8_lossy(&entry.path).into_owned())
                }
                _ => None,
            }
        })
    }

    pub(crate) fn broken(&self) -> MutexGuard<'_, Option<StreamError>> {
        self.lock(&self.broken)
    }

    pub(crate) fn io(&self, error: &std::io::Error) -> StreamError {
        StreamError::io(self.parts.layer.digest(), error)
    }

    pub(crate) fn store_failed(&self, message: String) -> StreamError {
        StreamError::Store { layer: self.parts.layer.digest().to_owned(), message }
    }

    pub(crate) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Store bytes of a chunk.
pub(crate) fn bytes_of(chunk: &ChunkRecord) -> Range<u64> {
    chunk.store_offset.get()..chunk.store_offset.get() + u64::from(chunk.len.get())
}

/// Where the blocks of a chunk end: from any offset before that the search for what is missing finds the chunk again.
pub(crate) fn end_of(chunk: &ChunkRecord) -> u64 {
    bytes_of(chunk).end.next_multiple_of(BLOCK_SIZE)
}

/// How a missing chunk is brought.
enum Begun {
    /// It is here already.
    Here,
    /// By a fetch begun for it.
    Fetch(JoinHandle<Result<(), StreamError>>),
    /// By a fetch that is under way.
    Others(Arc<RunState>),
}

/// Counts a reader as waiting, also when it leaves early.
struct Waiting<'a>(&'a AtomicU64);

impl<'a> Waiting<'a> {
    fn new(counter: &'a AtomicU64) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
