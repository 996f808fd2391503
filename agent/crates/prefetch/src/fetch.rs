//! Brings wanted ranges in their order, several at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use sluice_stream::{StreamError, StreamedLayer};
use tokio::time::Instant;

use crate::WantedRange;

/// Wanted ranges of a layer that follow each other in the order, with no more than this between them, are asked for together.
const JOIN_GAP: u64 = 256 * 1024;
/// Errors after which a prefetch is given up: the fill, which has patience, brings the rest.
const MAX_ERRORS: u64 = 3;

/// What a prefetch may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Fetches under way at once.
    pub in_flight: usize,
    /// Compressed bytes per second; none is as fast as they come.
    pub bytes_per_second: Option<u64>,
}

/// What a prefetch did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Ranges that were asked for, joined ones counted once.
    pub ranges: u64,
    /// Compressed bytes that were asked for.
    pub bytes: u64,
    /// Ranges that could not be had.
    pub errors: u64,
}

/// Keeps a transfer to a rate.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Pace {
    /// None: no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            free_at: Mutex::new(Instant::now()),
        }
    }

    /// Waits until what was spent before is paid for.
    pub async fn wait(&self) {
        let until = *self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        tokio::time::sleep_until(until).await;
    }

    /// So many bytes were fetched.
    pub fn spend(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = (*free_at).max(Instant::now()) + takes;
    }
}

/// Fetches what is missing of `ranges`, in their order. Ranges of layers that are not in `layers` are taken for local.
pub async fn fetch(
    ranges: Vec<WantedRange>,
    layers: &HashMap<String, Arc<StreamedLayer>>,
    limits: Limits,
    pace: &Pace,
) -> Fetched {
    let mut fetched = Fetched::default();
    // What stands between two ranges that a start pack brought is not asked for.
    let missing =
        |range: &WantedRange| layers.get(&range.layer).is_some_and(|one| !one.layer().has(range.bytes()));
    let joined = join(ranges.into_iter().filter(missing).collect());
    let fetches = joined.into_iter().filter_map(|range| {
        let layer = Arc::clone(layers.get(&range.layer)?);
        Some(async move {
            pace.wait().await;
            let asked = layer.prefetch(range.bytes()).await;
            pace.spend(asked.as_ref().map_or(0, |bytes| *bytes));
            (range, asked)
        })
    });
    let mut done = futures::stream::iter(fetches).buffered(limits.in_flight.max(1));
    while let Some((range, asked)) = done.next().await {
        fetched.ranges += 1;
        match asked {
            Ok(bytes) => fetched.bytes += bytes,
            Err(error) => {
                fetched.errors += 1;
                log(&range, &error);
                if fetched.errors >= MAX_ERRORS {
                    break;
                }
            }
        }
    }
    fetched
}

fn log(range: &WantedRange, error: &StreamError) {
    tracing::info!(layer = range.layer, offset = range.offset, size = range.len, %error, "cannot prefetch");
}

/// Joins neighbours in the order that are close to each other in a layer.
fn join(ranges: Vec<WantedRange>) -> Vec<WantedRange> {
    let mut joined: Vec<WantedRange> = Vec::new();
    for next in ranges {
        match joined.last_mut() {
            Some(last)
                if last.layer == next.layer
                    && next.offset >= last.offset
                    && next.offset <= last.bytes().end.saturating_add(JOIN_GAP) =>
            {
                last.len = last.bytes().end.max(next.bytes().end) - last.offset;
            }
            _ => joined.push(next),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_order_and_place_are_joined() {
        let range =
            |layer: &str, offset, len| WantedRange { layer: layer.to_owned(), offset, len, weight: 1.0 };
        let joined = join(vec![
            range("a", 0, 4096),
            range("a", 4096, 4096),
            range("a", 8192 + JOIN_GAP, 10),
            range("b", 0, 5),
            range("a", 0, 5),
            range("a", 1 << 30, 5),
        ]);
        let places: Vec<_> = joined.iter().map(|one| (one.layer.as_str(), one.offset, one.len)).collect();
        assert_eq!(places, [("a", 0, 8202 + JOIN_GAP), ("b", 0, 5), ("a", 0, 5), ("a", 1 << 30, 5)]);
    }

    #[tokio::test]
    async fn a_pace_is_kept() {
        let pace = Pace::new(Some(10_000));
        let start = Instant::now();
        for _ in 0..4 {
            pace.wait().await;
            pace.spend(500);
        }
        assert!(start.elapsed() >= Duration::from_millis(150));
        let (free, start) = (Pace::new(None), Instant::now());
        free.spend(u64::MAX);
        free.wait().await;
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}
