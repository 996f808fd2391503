//! The one order of urgency on a node: demand, prefetch, fill.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::claims::RunState;
use crate::watch::Watcher;

/// Background work starts again this long after the last demand, so that a start in progress has the link to itself.
const QUIET: Duration = Duration::from_millis(500);
/// Background work gets a turn at least this often, however much demand there is.
const STARVED: Duration = Duration::from_secs(2);

/// So long at most the fill leaves the link to a container's start, which demand and prefetch take as they need it; and so long at
/// most one fetch of it waits if starts follow each other.
const START: Duration = Duration::from_secs(5);

/// A prefetch waits so long at most while other bytes are demanded: what it brings is what will be asked for next.
const PREFETCH_PAUSE: Duration = Duration::from_millis(50);

/// Memory of a fetch under way: body waiting, decoder, chunk, a thread. zstd takes its window besides.
pub const FETCH_BYTES: u64 = 3 << 19;
/// Demand fetches under way on a node at once, if nothing else is said.
const DEMAND_RUNS: usize = 16;

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
    /// Bytes of content copied from other layers of the store.
    pub copied_bytes: AtomicU64,
    /// Compressed bytes that came, by lane.
    bytes: [AtomicU64; 3],
}

impl Counters {
    /// Compressed bytes that came in a lane.
    pub fn bytes(&self, lane: Lane) -> u64 {
        self.bytes.get(lane as usize).map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }

    /// Counts compressed bytes that came in a lane.
    pub fn add_bytes(&self, lane: Lane, count: u64) {
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
    prefetch: AtomicU64,
    /// When the starts that are under way have had their time, by number.
    starts: Mutex<BTreeMap<u64, Instant>>,
    /// Milliseconds since `start` when the last demand ended.
    last_demand_ms: AtomicU64,
    start: Instant,
    changed: Notify,
    background: Arc<Semaphore>,
    demand_runs: Arc<Semaphore>,
    most_demand_runs: usize,
    watcher: OnceLock<Arc<dyn Watcher>>,
}

/// Held while a process is blocked.
#[derive(Debug)]
pub(crate) struct Demand {
    inner: Arc<Inner>,
}

/// Held while a container starts: the fill waits meanwhile, 5 s at most.
#[derive(Debug)]
pub struct Starting {
    inner: Arc<Inner>,
    number: u64,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.inner.starts().remove(&self.number);
        self.inner.changed.notify_waiters();
    }
}

/// Held while something is prefetched, or about to be: the fill waits meanwhile.
#[derive(Debug)]
pub struct Prefetching {
    inner: Arc<Inner>,
}

impl Drop for Prefetching {
    fn drop(&mut self) {
        self.inner.prefetch.fetch_sub(1, Ordering::AcqRel);
        self.inner.changed.notify_waiters();
    }
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
        Self::with_demand(background, DEMAND_RUNS)
    }

    /// As `new`, with so many fetches at once for processes that are blocked.
    pub fn with_demand(background: usize, demand_runs: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                counters: Counters::default(),
                demand: AtomicU64::new(0),
                prefetch: AtomicU64::new(0),
                starts: Mutex::default(),
                last_demand_ms: AtomicU64::new(0),
                start: Instant::now(),
                changed: Notify::new(),
                background: Arc::new(Semaphore::new(background.max(1))),
                demand_runs: Arc::new(Semaphore::new(demand_runs)),
                most_demand_runs: demand_runs,
                watcher: OnceLock::new(),
            }),
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Tells `watcher` of all fetches from now on. There is one; a second is not told.
    pub fn watch(&self, watcher: Arc<dyn Watcher>) {
        self.inner.watcher.get_or_init(|| watcher);
    }

    pub(crate) fn watcher(&self) -> Option<&Arc<dyn Watcher>> {
        self.inner.watcher.get()
    }

    pub(crate) fn demand(&self) -> Demand {
        self.inner.demand.fetch_add(1, Ordering::AcqRel);
        Demand { inner: Arc::clone(&self.inner) }
    }

    /// The fill waits until what this gives is dropped.
    pub fn prefetching(&self) -> Prefetching {
        self.inner.prefetch.fetch_add(1, Ordering::AcqRel);
        Prefetching { inner: Arc::clone(&self.inner) }
    }

    /// A container starts: the fill waits until what this gives is dropped, or the start took too long.
    pub fn starting(&self) -> Starting {
        let mut starts = self.inner.starts();
        let number = starts.last_key_value().map_or(0, |(last, _)| last + 1);
        starts.insert(number, Instant::now() + START);
        Starting { inner: Arc::clone(&self.inner), number }
    }

    /// Somebody waits for a background run now.
    pub(crate) fn wake(&self) {
        self.inner.changed.notify_waiters();
    }

    /// A turn for the fill: waits while processes are blocked, and while something is prefetched.
    pub(crate) async fn background_turn(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.inner.background).acquire_owned().await.ok();
        self.pausing(Lane::Fill).wait(|| false).await;
        permit
    }

    /// A turn for something that is prefetched another way than by a run: waits, not for long, while fetches that processes are
    /// blocked by are under way.
    pub async fn prefetch_turn(&self) {
        let deadline = tokio::time::Instant::now() + PREFETCH_PAUSE;
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change in between is missed.
            changed.as_mut().enable();
            if self.inner.demand_runs.available_permits() == self.inner.most_demand_runs
                || tokio::time::timeout_at(deadline, changed).await.is_err()
            {
                return;
            }
        }
    }

    /// A place for a demand run: as many wait as there are blocked processes, so they bound memory and threads.
    pub(crate) async fn demand_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.inner.demand_runs).acquire_owned().await.ok()
    }

    /// For one background run.
    pub(crate) fn pausing(&self, lane: Lane) -> Pausing<'_> {
        Pausing { inner: &self.inner, lane, paused: Duration::ZERO }
    }
}

impl Inner {
    fn starts(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the last of the starts under way may still take.
    fn starts_left(&self) -> Option<Duration> {
        let latest = self.starts().values().max().copied();
        latest.map(|end| end.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }
}

/// Keeps a background run waiting while something more urgent is under way; each run so long at most.
#[derive(Debug)]
pub(crate) struct Pausing<'a> {
    inner: &'a Inner,
    lane: Lane,
    paused: Duration,
}

impl Pausing<'_> {
    /// Waits while processes are blocked by other bytes than this run's.
    pub(crate) async fn while_others_are_blocked(&mut self, run: &RunState) {
        self.wait(|| run.urgent()).await;
    }

    async fn wait(&mut self, urgent: impl Fn() -> bool) {
        let began = Instant::now();
        let fill = self.lane == Lane::Fill;
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change in between is missed.
            changed.as_mut().enable();
            let start = if fill { self.inner.starts_left() } else { None };
            let most = match start {
                Some(_) => START,
                None if fill => STARVED,
                None => PREFETCH_PAUSE,
            };
            let left = most.saturating_sub(self.paused);
            if began.elapsed() >= left {
                break;
            }
            let pause = if urgent() {
                break;
            } else if let Some(start) = start {
                start.min(left.saturating_sub(began.elapsed()))
            } else if self.inner.demand.load(Ordering::Acquire) > 0
                || fill && self.inner.prefetch.load(Ordering::Acquire) > 0
            {
                left.saturating_sub(began.elapsed())
            } else if !fill {
                break;
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
        self.paused += began.elapsed();
    }
}
