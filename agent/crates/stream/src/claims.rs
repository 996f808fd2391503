//! Who fetches which spans: one fetch at a time for each, demand before background.
//!
//! A background run covers many spans. Something more urgent for a span that such a run has not begun takes it, and all behind it,
//! away from the run; demand for the span it is in makes the run urgent instead, so that nothing is fetched twice.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use sluice_image::records::ChunkRecord;
use tokio::sync::Notify;

use crate::cutter::DIGEST_MISMATCH;
use crate::watch::Watcher;
use crate::{Lane, Scheduler, StreamError};

/// The spans of one layer that are being fetched.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_span: Mutex<HashMap<usize, Arc<RunState>>>,
    /// Told whenever something arrived, and whenever a claim ends.
    pub(crate) arrived: Arc<Notify>,
}

/// A run under way.
#[derive(Debug)]
pub(crate) struct RunState {
    lane: Lane,
    /// First span not yet decoded, and the span after the last; changed under the lock of `Claims`.
    left: Mutex<Range<usize>>,
    urgent: AtomicBool,
    /// Why it ended, if it failed: told to everybody who waited, so that not each of them tries again.
    failed: OnceLock<StreamError>,
    watcher: Option<Arc<dyn Watcher>>,
}

impl RunState {
    /// Whether somebody waits for it.
    pub(crate) fn urgent(&self) -> bool {
        self.lane == Lane::Demand || self.urgent.load(Ordering::Acquire)
    }

    pub(crate) fn fail(&self, error: &StreamError) {
        // Only its one fetch sets it.
        self.failed.get_or_init(|| error.clone());
    }

    /// Why the run will not bring a chunk, nor another one.
    pub(crate) fn failed_for_good(&self, chunk: &ChunkRecord) -> Option<&StreamError> {
        let at = chunk.store_offset.get();
        self.failed.get().filter(|error| match error {
            // Its neighbours are not concerned.
            StreamError::Corrupt { offset, what, .. } if what == DIGEST_MISMATCH => *offset == at,
            // Nothing decodes from there on.
            StreamError::Corrupt { offset, .. } => *offset <= at,
            error => !error.is_transient(),
        })
    }

    fn left(&self) -> MutexGuard<'_, Range<usize>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Spans that one fetch brings. Dropped, it wakes those who waited for them, whatever came.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Arc<Claims>,
    pub(crate) spans: Range<usize>,
    pub(crate) run: Arc<RunState>,
}

impl Claims {
    /// Claims spans; `None` if any of them is being fetched and cannot be taken away.
    pub(crate) fn claim(
        self: &Arc<Self>,
        spans: Range<usize>,
        lane: Lane,
        divisible: bool,
        scheduler: &Scheduler,
    ) -> Result<Claim, Arc<RunState>> {
        let mut by_span = self.lock();
        let mut busy = None;
        for span in spans.clone() {
            let Some(run) = by_span.get(&span).map(Arc::clone) else { continue };
            let mut left = run.left();
            if lane < run.lane && !run.urgent() && divisible && span > left.start {
                for taken in span..left.end {
                    by_span.remove(&taken);
                }
                left.end = span;
                continue;
            }
            drop(left);
            if lane == Lane::Demand && !run.urgent.swap(true, Ordering::AcqRel) {
                scheduler.wake();
            }
            busy = Some(run);
        }
        if let Some(run) = busy {
            return Err(run);
        }
        let run = Arc::new(RunState {
            lane,
            left: Mutex::new(spans.clone()),
            urgent: AtomicBool::new(false),
            failed: OnceLock::new(),
            watcher: scheduler.watcher().cloned(),
        });
        by_span.extend(spans.clone().map(|span| (span, Arc::clone(&run))));
        Ok(Claim { claims: Arc::clone(self), spans, run })
    }

    /// Whether a span is being fetched.
    pub(crate) fn is_claimed(&self, span: usize) -> bool {
        self.lock().contains_key(&span)
    }

    /// A run comes to `span`; `false` if it was taken from it.
    pub(crate) fn advance(&self, run: &RunState, span: usize) -> bool {
        let _by_span = self.lock();
        let mut left = run.left();
        if span >= left.end {
            return false;
        }
        left.start = span;
        true
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Arc<RunState>>> {
        self.by_span.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// See [`Claims::advance`].
    pub(crate) fn ticket(&self) -> Ticket {
        Ticket { claims: Arc::clone(&self.claims), run: Arc::clone(&self.run) }
    }
}

/// What a run's decoder needs of its claim.
#[derive(Debug)]
pub(crate) struct Ticket {
    claims: Arc<Claims>,
    run: Arc<RunState>,
}

impl Ticket {
    pub(crate) fn advance(&self, span: usize) -> bool {
        self.claims.advance(&self.run, span)
    }

    pub(crate) fn urgent(&self) -> bool {
        self.run.urgent()
    }

    /// Bytes of the layer's local file are here.
    pub(crate) fn arrived(&self, layer: &str, bytes: Range<u64>) {
        if let Some(watcher) = &self.run.watcher {
            watcher.brought(layer, self.run.lane, bytes);
        }
        self.claims.arrived.notify_waiters();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut by_span = self.claims.lock();
        for span in self.spans.clone() {
            // It may be another's by now.
            if by_span.get(&span).is_some_and(|run| Arc::ptr_eq(run, &self.run)) {
                by_span.remove(&span);
            }
        }
        drop(by_span);
        self.claims.arrived.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_takes_what_a_background_run_has_not_begun() {
        let (claims, scheduler) = (Arc::new(Claims::default()), Scheduler::new(1));
        let claim = |spans, lane| claims.claim(spans, lane, true, &scheduler);
        let fill = claim(0..10, Lane::Fill).expect("free");
        assert!(claims.advance(&fill.run, 3));
        // The span it is in: wait for it, but it hurries.
        assert!(claim(3..4, Lane::Demand).is_err() && fill.run.urgent());
        drop(fill);
        let fill = claim(0..10, Lane::Fill).expect("free");
        assert!(claim(4..5, Lane::Fill).is_err() && !fill.run.urgent());
        let demand = claim(6..7, Lane::Demand).expect("taken away");
        assert!(claims.advance(&fill.run, 5) && !claims.advance(&fill.run, 6));
        // Demand waits for demand.
        assert!(claim(6..7, Lane::Demand).is_err());
        // What stood behind is free, and the end of the run leaves the other's claim alone.
        let behind = claim(7..10, Lane::Prefetch).expect("free");
        drop(fill);
        assert!(claims.is_claimed(6) && claims.is_claimed(8) && !claims.is_claimed(5));
        drop((demand, behind));
        assert!((0..10).all(|span| !claims.is_claimed(span)));
    }

    #[test]
    fn prefetch_takes_from_the_fill_and_gives_to_demand() {
        let (claims, scheduler) = (Arc::new(Claims::default()), Scheduler::new(1));
        let claim = |spans, lane| claims.claim(spans, lane, true, &scheduler);
        let fill = claim(0..10, Lane::Fill).expect("free");
        let ahead = claim(4..8, Lane::Prefetch).expect("taken from the fill");
        assert!(!claims.advance(&fill.run, 4) && claim(4..5, Lane::Fill).is_err());
        assert!(claim(5..6, Lane::Prefetch).is_err() && !ahead.run.urgent());
        let _demand = claim(6..7, Lane::Demand).expect("taken from the prefetch");
        assert!(claims.advance(&ahead.run, 5) && !claims.advance(&ahead.run, 6));
    }

    #[test]
    fn a_layer_in_one_piece_is_not_divided() {
        let (claims, scheduler) = (Arc::new(Claims::default()), Scheduler::new(1));
        let fill = claims.claim(0..10, Lane::Fill, false, &scheduler).expect("free");
        assert!(claims.claim(0..10, Lane::Demand, false, &scheduler).is_err());
        assert!(fill.run.urgent());
    }
}
