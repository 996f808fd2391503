//! Waiting for a source that is away, for space, or for a disk that loses what is written.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::StreamError;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// Pauses between attempts, and when to give up.
#[derive(Debug)]
pub(crate) struct Outage {
    since: Option<Instant>,
    pause: Duration,
    timeout: Duration,
}

impl Outage {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { since: None, pause: FIRST_PAUSE, timeout }
    }

    /// Something came.
    pub(crate) fn over(&mut self) {
        self.since = None;
        self.pause = FIRST_PAUSE;
    }

    /// Waits a while if trying again may help and the time-out has not passed; gives the error back otherwise.
    pub(crate) async fn pause(
        &mut self,
        error: &StreamError,
        layer: &str,
        range: Range<u64>,
    ) -> Result<(), StreamError> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let left = self.timeout.saturating_sub(since.elapsed());
        if !error.is_transient() || left.is_zero() {
            return Err(error.clone());
        }
        let size = range.end - range.start;
        tracing::warn!(layer, offset = range.start, size, %error, waited_ms = since.elapsed().as_millis() as u64, "it is tried again after a while");
        let jitter = fraction(range.start ^ since.elapsed().as_nanos() as u64);
        tokio::time::sleep(self.pause.mul_f64(0.5 + jitter).min(left)).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// A number from 0 to 1 that differs between waiters: enough to spread their retries.
fn fraction(seed: u64) -> f64 {
    let mixed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    mixed as f64 / f64::from(1 << 24)
}
