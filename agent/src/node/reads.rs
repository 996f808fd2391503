//! Level 0 of recording: the agent's own log of the reads that it answered, kept only while a start is recorded.
//!
//! It sees what reaches the agent: no read of bytes that are in the page cache, or that the kernel reads by itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sluice_trace::{Origin, Process, Record, What};

/// Reads kept of one start; more are no start's working set.
const MAX_READS: usize = 100_000;

/// The starts that are recorded now.
#[derive(Debug, Default)]
pub(super) struct ReadLog {
    active: AtomicUsize,
    recordings: Mutex<Vec<Arc<Recording>>>,
}

/// The reads of one start's layers.
#[derive(Debug)]
pub(super) struct Recording {
    /// Digests, in the order in which layers are applied.
    layers: Vec<String>,
    began: Instant,
    /// The same on the clock of the records.
    began_ns: u64,
    reads: Mutex<Reads>,
}

#[derive(Debug, Default)]
struct Reads {
    records: Vec<Record>,
    lost: u64,
}

impl Recording {
    /// When it began, `CLOCK_MONOTONIC` in nanoseconds.
    pub(super) fn began_ns(&self) -> u64 {
        self.began_ns
    }
}

impl ReadLog {
    /// Records reads of these layers from now on.
    pub(super) fn begin(&self, layers: Vec<String>) -> Arc<Recording> {
        let recording = Arc::new(Recording {
            layers,
            began: Instant::now(),
            began_ns: sluice_kernel::process::monotonic_ns(),
            reads: Mutex::default(),
        });
        let mut recordings = lock(&self.recordings);
        recordings.push(Arc::clone(&recording));
        self.active.store(recordings.len(), Ordering::Release);
        recording
    }

    /// Ends a recording: its reads by time, and how many were lost.
    pub(super) fn end(&self, recording: &Arc<Recording>) -> (Vec<Record>, u64) {
        let mut recordings = lock(&self.recordings);
        recordings.retain(|one| !Arc::ptr_eq(one, recording));
        self.active.store(recordings.len(), Ordering::Release);
        drop(recordings);
        let Reads { mut records, lost } = std::mem::take(&mut *lock(&recording.reads));
        records.sort_by_key(|record| record.time_ns);
        (records, lost)
    }

    /// A read that came at `asked` was answered with bytes that were there.
    pub(super) fn served(&self, layer: &str, offset: u64, len: usize, asked: Instant, from: Origin) {
        if self.active.load(Ordering::Acquire) == 0 {
            return;
        }
        for recording in lock(&self.recordings).iter() {
            let Some(number) = recording.layers.iter().position(|one| one == layer) else { continue };
            let mut reads = lock(&recording.reads);
            if reads.records.len() >= MAX_READS {
                reads.lost += 1;
                continue;
            }
            reads.records.push(Record {
                time_ns: recording.began_ns
                    + asked.saturating_duration_since(recording.began).as_nanos() as u64,
                process: Process::default(),
                what: What::Served {
                    layer: number as u32,
                    offset,
                    len: len as u64,
                    service_ns: asked.elapsed().as_nanos() as u64,
                    from,
                },
            });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_go_to_the_starts_that_have_the_layer() {
        let log = ReadLog::default();
        log.served("a", 0, 1, Instant::now(), Origin::Disk);
        let first = log.begin(vec!["a".to_owned(), "b".to_owned()]);
        let second = log.begin(vec!["b".to_owned()]);
        let early = Instant::now();
        log.served("b", 4096, 10, Instant::now(), Origin::Disk);
        log.served("a", 0, 20, early, Origin::Registry);
        log.served("c", 0, 30, Instant::now(), Origin::Disk);
        let places = |records: Vec<Record>| -> Vec<(u32, u64, u64)> {
            let place = |record: &Record| match record.what {
                What::Served { layer, offset, len, .. } => (layer, offset, len),
                _ => panic!("something else"),
            };
            records.iter().map(place).collect()
        };
        let (records, lost) = log.end(&first);
        assert_eq!((places(records), lost), (vec![(0, 0, 20), (1, 4096, 10)], 0));
        log.served("b", 0, 1, Instant::now(), Origin::Disk);
        assert_eq!(places(log.end(&second).0).len(), 2);
    }
}
