//! Which endpoints are worth asking now: dead ones are left alone for a while, busy ones for as long as they want.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};

/// An endpoint that fails again and again is asked at least this often.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// How long one request may take to find out whether an endpoint is back before another may try.
const PROBE: Duration = Duration::from_secs(10);

/// By an endpoint's base address.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// How long an endpoint is left alone after its first failure.
    backoff: Duration,
    known: Mutex<HashMap<String, State>>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    avoid_until: Option<Instant>,
    /// One request finds out whether it is back.
    probed: bool,
    busy_until: Option<Instant>,
}

impl Health {
    pub(crate) fn new(backoff: Duration) -> Self {
        Self { backoff, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, State>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn worked(&self, base: &str) {
        self.known().remove(base);
    }

    /// The endpoint failed: it is asked last until a time has passed that doubles with each failure in a row.
    pub(crate) fn failed(&self, base: &str) {
        let mut known = self.known();
        let state = known.entry(base.to_owned()).or_default();
        let now = Instant::now();
        // Requests under way together fail together: that is one failure.
        if state.probed || state.avoid_until.is_none_or(|until| until <= now) {
            state.probed = false;
            let backoff = self.backoff.saturating_mul(1 << state.failures.min(16)).min(LONGEST_BACKOFF);
            state.failures += 1;
            state.avoid_until = Some(now + backoff);
        }
    }

    /// The endpoint asked to be left alone for a time.
    pub(crate) fn busy(&self, base: &str, wait: Duration) {
        let until = Instant::now().checked_add(wait);
        self.known().entry(base.to_owned()).or_default().busy_until = until;
    }

    /// Whether to ask others first: it failed lately. When its time is over one caller is sent to it, to find out; the
    /// others go on avoiding it, for it may cost each of them a time-out.
    pub(crate) fn avoid(&self, base: &str) -> bool {
        let now = Instant::now();
        let mut known = self.known();
        let Some(state) = known.get_mut(base) else { return false };
        match state.avoid_until {
            None => false,
            Some(until) if until > now => true,
            Some(_) => {
                state.probed = true;
                state.avoid_until = Some(now + PROBE);
                false
            }
        }
    }

    /// For how long it still wants to be left alone.
    pub(crate) fn busy_for(&self, base: &str) -> Option<Duration> {
        let until = self.known().get(base)?.busy_until?;
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// What `Retry-After` asks for: seconds or a date (RFC 9110, section 10.2.3). A date that has passed is no wait.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim(); // Not text: as if it were not there.
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?; // Neither: as if it were not there.
    Some(date.duration_since(now).unwrap_or_default())
}

/// A time between half and one and a half of `pause`, so that clients that failed together do not come back together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    let mut bytes = [0; 4];
    let random = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes);
    // Without randomness the pause is what it is.
    let share = random.map_or(0.5, |()| f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX));
    pause.mul_f64(0.5 + share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_in_seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date");
        let table = [
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sunday, 06-Nov-94 08:50:07 GMT", Some(30)),
            ("Sun Nov  6 08:50:07 1994", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
        ];
        for (text, seconds) in table {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().expect("a value"));
            assert_eq!(retry_after(&headers, now), seconds.map(Duration::from_secs), "{text}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn jitter_is_spread() {
        let pauses: Vec<Duration> = (0..200).map(|_| jittered(Duration::from_secs(100))).collect();
        let (low, high) = (pauses.iter().min().expect("some"), pauses.iter().max().expect("some"));
        assert!(*low >= Duration::from_secs(50) && *high <= Duration::from_secs(150));
        // 200 draws miss a fifth of the range with a chance of 0.8^200.
        assert!(*low < Duration::from_secs(70) && *high > Duration::from_secs(130), "{low:?} {high:?}");
        let distinct: std::collections::HashSet<_> = pauses.iter().collect();
        assert!(distinct.len() > 190, "{}", distinct.len());
    }

    #[test]
    fn a_failure_is_remembered_for_a_while() {
        let health = Health::new(Duration::from_millis(40));
        assert!(!health.avoid("a"));
        health.failed("a");
        health.failed("a");
        assert!(health.avoid("a") && !health.avoid("b"));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!health.avoid("a"), "two failures at once are one");
        assert!(health.avoid("a"), "one finds out for all");
        health.failed("a");
        std::thread::sleep(Duration::from_millis(50));
        assert!(health.avoid("a"), "the second one lasts twice as long");
        std::thread::sleep(Duration::from_millis(50));
        assert!(!health.avoid("a"));
        health.worked("a");
        assert!(!health.avoid("a") && !health.avoid("a"));
    }
}
