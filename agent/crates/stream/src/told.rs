//! What a run of a layer is told to: counters, the watcher, and who waits for another's fetch.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::watch::FetchDone;
use crate::{Lane, SourceError, StreamError, StreamedLayer, run};

/// Keeps account of a run.
pub(crate) struct Told<'a> {
    layer: &'a StreamedLayer,
    lane: Lane,
    compressed: Range<u64>,
    began: Instant,
    first_byte: OnceLock<Instant>,
    bytes: AtomicU64,
}

impl<'a> Told<'a> {
    pub(crate) fn new(layer: &'a StreamedLayer, lane: Lane, compressed: Range<u64>) -> Self {
        let (first_byte, bytes) = (OnceLock::new(), AtomicU64::new(0));
        Self { layer, lane, compressed, began: Instant::now(), first_byte, bytes }
    }

    pub(crate) fn ended(&self, whole: bool) {
        let Some(watcher) = self.layer.parts.scheduler.watcher() else { return };
        watcher.fetched(FetchDone {
            layer: self.layer.parts.layer.digest(),
            lane: self.lane,
            offset: self.compressed.start,
            len: self.bytes.load(Ordering::Relaxed),
            began: self.began,
            first_byte: self.first_byte.get().copied(),
            whole,
        });
    }
}

impl run::Progress for Told<'_> {
    fn came(&self, bytes: u64) {
        self.first_byte.get_or_init(Instant::now);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.layer.parts.scheduler.counters().add_bytes(self.lane, bytes);
        self.layer.last_byte_ms.store(self.layer.made.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn broke(&self, source: &SourceError) {
        *self.layer.lock(&self.layer.last_failure) = Some(StreamError::Fetch {
            layer: self.layer.parts.layer.digest().to_owned(),
            start: self.compressed.start,
            end: self.compressed.end,
            source: source.clone(),
        });
    }
}
