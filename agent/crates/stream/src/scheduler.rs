//! The one order of urgency on a node: demand, prefetch, fill.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Background work starts again this long after the last demand, so that a start in progress has the link to itself.
const QUIET: Duration = Duration::from_millis(150);
/// Background work gets a turn at least this often, however much demand there is.
const STARVED: Duration = Duration::from_secs(2);

/// How urgent a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// A process is blocked.
    Demand,
    /// A process will be.
    Prefetch,
    /// The rest of the image.
    Fill,
}

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads answered from the layer store.
    pub from_disk: AtomicU64,
    /// Reads that had to wait for the registry.
    pub from_registry: AtomicU64,
    /// Reads that wait now.
    pub waiting: AtomicU64,
    /// Compressed bytes that came, by lane.
    bytes: [AtomicU64; 3],
}

impl Counters {
    /// Compressed bytes that came in a lane.
    pub fn bytes(&self, lane: Lane) -> u64 {
        self.bytes.get(lane as usize).map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }

    pub(crate) fn add_bytes(&self, lane: Lane, count: u64) {
        if let Some(bytes) = self.bytes.get(lane as usize) {
            bytes.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// See the module text. Cheap to clone; one per node.
#[derive(Debug, Clone)]
pub struct Scheduler {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    counters: Counters,
    demand: AtomicU64,
    /// Milliseconds since `start` when the last demand ended.
    last_demand_ms: AtomicU64,
    start: Instant,
    changed: Notify,
    background: Arc<Semaphore>,
    decoding: Arc<Semaphore>,
}

/// Held while a process is blocked.
#[derive(Debug)]
pub(crate) struct Demand {
    inner: Arc<Inner>,
}

impl Drop for Demand {
    fn drop(&mut self) {
        let now = self.inner.start.elapsed().as_millis() as u64;
        self.inner.last_demand_ms.store(now.max(1), Ordering::Release);
        self.inner.demand.fetch_sub(1, Ordering::AcqRel);
        self.inner.changed.notify_waiters();
    }
}

impl Scheduler {
    /// `background` is how many background fetches may be under way at once on this node.
    pub fn new(background: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            inner: Arc::new(Inner {
                counters: Counters::default(),
                demand: AtomicU64::new(0),
                last_demand_ms: AtomicU64::new(0),
                start: Instant::now(),
                changed: Notify::new(),
                background: Arc::new(Semaphore::new(background.max(1))),
                decoding: Arc::new(Semaphore::new(cores.max(2) * 2)),
            }),
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    pub(crate) fn demand(&self) -> Demand {
        self.inner.demand.fetch_add(1, Ordering::AcqRel);
        Demand { inner: Arc::clone(&self.inner) }
    }

    /// A turn for background work: waits while processes are blocked.
    pub(crate) async fn background_turn(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.inner.background).acquire_owned().await.ok();
        let waited = Instant::now();
        while waited.elapsed() < STARVED {
            let changed = self.inner.changed.notified();
            let pause = if self.inner.demand.load(Ordering::Acquire) > 0 {
                STARVED
            } else {
                let now = self.inner.start.elapsed().as_millis() as u64;
                let last = self.inner.last_demand_ms.load(Ordering::Acquire);
                let quiet = Duration::from_millis(now.saturating_sub(last));
                if last == 0 || quiet >= QUIET {
                    break;
                }
                QUIET - quiet
            };
            // Either a demand ended, or enough time passed; both are looked at anew.
            drop(tokio::time::timeout(pause, changed).await);
        }
        permit
    }

    /// A place to decode in: bounds the threads and the memory that decoding takes. Demand does not wait.
    pub(crate) async fn decoding_place(&self, lane: Lane) -> Option<OwnedSemaphorePermit> {
        if lane == Lane::Demand {
            return None;
        }
        Arc::clone(&self.inner.decoding).acquire_owned().await.ok()
    }
}
