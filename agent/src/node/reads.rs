//! Level 0 of recording: the agent's own log of the reads that it answered and of what it fetched, kept only while a start is
//! recorded.
//!
//! It sees what reaches the agent: no read of bytes that are in the page cache, or that the kernel reads by itself.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use sluice_stream::{FetchDone, Lane, Watcher};
use sluice_trace::{FetchLane, Origin, Phase, Process, Record, What};

use crate::metrics::{Metrics, count};

/// Records kept of one start; more are no start's working set.
const MAX_RECORDS: usize = 200_000;

/// The starts that are recorded now.
#[derive(Debug, Default)]
pub(super) struct ReadLog {
    active: AtomicUsize,
    /// A start that came to nothing forgets its own.
    recordings: Mutex<Vec<Weak<Recording>>>,
    /// What is counted, recorded or not.
    pub(super) metrics: Metrics,
}

/// What happens to one start's layers.
#[derive(Debug)]
pub(super) struct Recording {
    /// Digests, in the order in which layers are applied.
    layers: Vec<String>,
    began: Instant,
    /// The same on the clock of the records.
    began_ns: u64,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    records: Vec<Record>,
    lost: u64,
    /// What was fetched ahead: per layer, first byte to the byte behind the last.
    ahead: HashMap<u32, BTreeMap<u64, (u64, Origin)>>,
}

/// A step on the way to a start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) phase: Phase,
    began: Instant,
    pub(super) took: Duration,
}

impl Step {
    /// One that ends now.
    pub(super) fn since(phase: Phase, began: Instant) -> Self {
        Self { phase, began, took: began.elapsed() }
    }
}

impl ReadLog {
    /// Records what happens to these layers from now on; the start began at `began`.
    pub(super) fn begin(&self, layers: Vec<String>, began: Instant) -> Arc<Recording> {
        let now_ns = sluice_kernel::process::monotonic_ns();
        let began_ns = now_ns.saturating_sub(began.elapsed().as_nanos() as u64);
        let recording = Arc::new(Recording { layers, began, began_ns, log: Mutex::default() });
        let mut recordings = lock(&self.recordings);
        recordings.retain(|one| one.strong_count() > 0);
        recordings.push(Arc::downgrade(&recording));
        self.active.store(recordings.len(), Ordering::Release);
        recording
    }

    /// Ends a recording: its records by time, and how many were lost.
    pub(super) fn end(&self, recording: &Arc<Recording>) -> (Vec<Record>, u64) {
        let mut recordings = lock(&self.recordings);
        recordings.retain(|one| one.strong_count() > 0 && one.as_ptr() != Arc::as_ptr(recording));
        self.active.store(recordings.len(), Ordering::Release);
        drop(recordings);
        let Log { mut records, lost, .. } = std::mem::take(&mut *lock(&recording.log));
        records.sort_by_key(|record| record.time_ns);
        (records, lost)
    }

    /// Whether a start is recorded. Not what is counted: that has those which came to nothing, until the next one.
    pub(super) fn is_recording(&self) -> bool {
        lock(&self.recordings).iter().any(|one| one.strong_count() > 0)
    }

    /// A read that came at `asked` was answered, with bytes that were there (`Disk`) or had to be waited for.
    pub(super) fn served(&self, layer: &str, offset: u64, len: usize, asked: Instant, from: Origin) {
        let took = asked.elapsed();
        if from == Origin::Registry {
            self.metrics.read_wait.observe(took);
        }
        self.each(layer, |recording, layer| {
            recording.push(asked, |log| What::Served {
                layer,
                offset,
                len: len as u64,
                service_ns: took.as_nanos() as u64,
                from: if from == Origin::Disk { log.origin(layer, offset) } else { from },
            });
        });
    }

    /// A read failed for good.
    pub(super) fn failed(&self) {
        count(&self.metrics.read_errors);
    }

    /// Chunks of a start pack are here.
    pub(super) fn packed(&self, layer: &str, bytes: Range<u64>) {
        self.came(layer, FetchLane::StartPack, &bytes);
    }

    fn came(&self, layer: &str, lane: FetchLane, bytes: &Range<u64>) {
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        self.each(layer, |recording, layer| {
            recording.push(Instant::now(), |log| {
                let origin = match lane {
                    FetchLane::Prefetch => Some(Origin::Prefetch),
                    FetchLane::StartPack => Some(Origin::StartPack),
                    _ => None,
                };
                if let Some(origin) = origin {
                    log.ahead.entry(layer).or_default().insert(offset, (bytes.end, origin));
                }
                What::Brought { lane, layer, offset, len }
            });
        });
    }

    /// Calls `record` for each start that has the layer, with the layer's number in it.
    fn each(&self, layer: &str, record: impl Fn(&Recording, u32)) {
        if self.active.load(Ordering::Acquire) == 0 {
            return;
        }
        for recording in lock(&self.recordings).iter().filter_map(Weak::upgrade) {
            if let Some(number) = recording.layers.iter().position(|one| one == layer) {
                record(&recording, number as u32);
            }
        }
    }
}

impl Watcher for ReadLog {
    fn brought(&self, layer: &str, lane: Lane, bytes: Range<u64>) {
        self.came(layer, fetch_lane(lane), &bytes);
    }

    fn fetched(&self, fetch: FetchDone<'_>) {
        let (took, lane) = (fetch.began.elapsed(), fetch_lane(fetch.lane));
        self.metrics.fetched(fetch.lane, fetch.whole);
        self.each(fetch.layer, |recording, layer| recording.fetched(lane, Some(layer), &fetch, took));
    }
}

impl Recording {
    /// A step on the way to this start.
    pub(super) fn step(&self, step: Step) {
        self.push(step.began, |_| What::Phase { phase: step.phase, took_ns: step.took.as_nanos() as u64 });
    }

    /// A request that was needed to know what to fetch was answered.
    pub(super) fn looked_up(&self, began: Instant, took: Duration) {
        let lane = Lane::Demand;
        let fetch = FetchDone { layer: "", lane, offset: 0, len: 0, began, first_byte: None, whole: true };
        self.fetched(FetchLane::Lookup, None, &fetch, took);
    }

    /// The request for the start pack ended.
    pub(super) fn pack_fetched(&self, fetch: &FetchDone<'_>) {
        self.fetched(FetchLane::StartPack, None, fetch, fetch.began.elapsed());
    }

    fn fetched(&self, lane: FetchLane, layer: Option<u32>, fetch: &FetchDone<'_>, took: Duration) {
        let first = fetch.first_byte.map_or(took, |at| at.saturating_duration_since(fetch.began));
        self.push(fetch.began, |_| What::Fetch {
            lane,
            layer,
            offset: fetch.offset,
            len: fetch.len,
            first_byte_ns: first.as_nanos() as u64,
            took_ns: took.as_nanos() as u64,
            whole: fetch.whole,
        });
    }

    /// When the start began, `CLOCK_MONOTONIC` in nanoseconds.
    pub(super) fn began_ns(&self) -> u64 {
        self.began_ns
    }

    /// How long it has taken so far.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn push(&self, at: Instant, what: impl FnOnce(&mut Log) -> What) {
        let mut log = lock(&self.log);
        if log.records.len() >= MAX_RECORDS {
            log.lost += 1;
            return;
        }
        let what = what(&mut log);
        let time_ns = self.began_ns + at.saturating_duration_since(self.began).as_nanos() as u64;
        log.records.push(Record { time_ns, process: Process::default(), what });
    }
}

impl Log {
    /// How bytes that are in the layer store came there.
    fn origin(&self, layer: u32, offset: u64) -> Origin {
        let before = self.ahead.get(&layer).and_then(|ahead| ahead.range(..=offset).next_back());
        before.filter(|(_, (end, _))| offset < *end).map_or(Origin::Disk, |(_, (_, origin))| *origin)
    }
}

fn fetch_lane(lane: Lane) -> FetchLane {
    match lane {
        Lane::Demand => FetchLane::Demand,
        Lane::Prefetch => FetchLane::Prefetch,
        Lane::Fill => FetchLane::Fill,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(records: &[Record]) -> Vec<(u32, u64, u64, Origin)> {
        let place = |record: &Record| match record.what {
            What::Served { layer, offset, len, from, .. } => Some((layer, offset, len, from)),
            _ => None,
        };
        records.iter().filter_map(place).collect()
    }

    #[test]
    fn reads_go_to_the_starts_that_have_the_layer() {
        let log = ReadLog::default();
        log.served("a", 0, 1, Instant::now(), Origin::Disk);
        let first = log.begin(vec!["a".to_owned(), "b".to_owned()], Instant::now());
        let second = log.begin(vec!["b".to_owned()], Instant::now());
        let early = Instant::now();
        log.served("b", 4096, 10, Instant::now(), Origin::Disk);
        log.served("a", 0, 20, early, Origin::Registry);
        log.served("c", 0, 30, Instant::now(), Origin::Disk);
        let (records, lost) = log.end(&first);
        let expected = [(0, 0, 20, Origin::Registry), (1, 4096, 10, Origin::Disk)];
        assert_eq!((served(&records), lost), (expected.to_vec(), 0));
        log.served("b", 0, 1, Instant::now(), Origin::Disk);
        assert_eq!(served(&log.end(&second).0).len(), 2);
    }

    #[test]
    fn what_was_fetched_ahead_is_known_when_it_is_read() {
        let log = ReadLog::default();
        let recording = log.begin(vec!["a".to_owned()], Instant::now());
        log.brought("a", Lane::Prefetch, 4096..8192);
        log.brought("a", Lane::Fill, 8192..9000);
        log.packed("a", 12_288..20_000);
        for offset in [0, 4096, 8192, 16_384, 20_480] {
            log.served("a", offset, 10, Instant::now(), Origin::Disk);
        }
        let (records, _) = log.end(&recording);
        let from: Vec<Origin> = served(&records).into_iter().map(|(_, _, _, from)| from).collect();
        use Origin::{Disk, Prefetch, StartPack};
        assert_eq!(from, [Disk, Prefetch, Disk, StartPack, Disk]);
        let brought = records.iter().filter(|record| matches!(record.what, What::Brought { .. })).count();
        assert_eq!(brought, 3);
    }
}
