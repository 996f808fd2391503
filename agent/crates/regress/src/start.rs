//! A start, reduced to what is compared.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sluice_trace::{Failure, Summary};

/// Files kept of a start.
const MAX_FILES: usize = 5_000;

/// One start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Digest of the image's manifest.
    pub image: String,
    /// The image as it was asked for.
    pub reference: String,
    /// Class of the entry point.
    pub entry: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Seconds since 1970.
    pub began_at: u64,
    /// Nanoseconds to ready, if somebody said so.
    pub ready_ns: Option<u64>,
    /// Bytes fetched before ready, but for the background fill.
    pub bytes: u64,
    /// Requests before ready, but for the background fill's.
    pub round_trips: u64,
    /// Nanoseconds that processes were blocked.
    pub blocked_ns: u64,
    /// How much of what was fetched ahead was read, 0 to 1; none: nothing was.
    pub accuracy: Option<f64>,
    /// Files that were touched.
    pub files: BTreeSet<String>,
    /// Kinds of calls that failed.
    pub failures: BTreeSet<Failure>,
}

impl From<&Summary> for Start {
    fn from(summary: &Summary) -> Self {
        let header = &summary.header;
        Self {
            image: header.image.clone(),
            reference: header.reference.clone(),
            entry: header.entry.clone(),
            kernel: header.kernel.clone(),
            began_at: header.began_at,
            ready_ns: summary.ready_ns,
            bytes: summary.bytes_before_ready(),
            round_trips: summary.round_trips(),
            blocked_ns: summary.blocked_ns,
            accuracy: summary.accuracy(),
            files: summary.files.keys().take(MAX_FILES).cloned().collect(),
            failures: summary.failures.keys().cloned().collect(),
        }
    }
}

/// What is measured of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Time to ready.
    Ready,
    /// Bytes fetched before ready.
    Bytes,
    /// Requests before ready.
    RoundTrips,
    /// Time blocked.
    Blocked,
    /// Accuracy of what is fetched ahead.
    Accuracy,
}

impl Measure {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ready, Self::Bytes, Self::RoundTrips, Self::Blocked, Self::Accuracy];

    /// Its value in a start: seconds, bytes, requests, seconds, 0 to 1.
    pub fn of(self, start: &Start) -> Option<f64> {
        match self {
            Self::Ready => start.ready_ns.map(|ns| ns as f64 / 1e9),
            Self::Bytes => Some(start.bytes as f64),
            Self::RoundTrips => Some(start.round_trips as f64),
            Self::Blocked => Some(start.blocked_ns as f64 / 1e9),
            Self::Accuracy => start.accuracy,
        }
    }

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "time to ready",
            Self::Bytes => "bytes before ready",
            Self::RoundTrips => "round trips before ready",
            Self::Blocked => "time blocked",
            Self::Accuracy => "prefetch accuracy",
        }
    }

    /// Less of it is worse.
    pub fn falls(self) -> bool {
        self == Self::Accuracy
    }

    /// A value for people.
    pub fn text(self, value: f64) -> String {
        match self {
            Self::Ready | Self::Blocked if value.abs() < 1.0 => format!("{:.0} ms", value * 1e3),
            Self::Ready | Self::Blocked => format!("{value:.2} s"),
            Self::Bytes => format!("{:.2} MiB", value / f64::from(1 << 20)),
            Self::RoundTrips => format!("{value:.0}"),
            Self::Accuracy => format!("{:.0} %", value * 100.0),
        }
    }
}
