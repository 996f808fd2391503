//! One start in numbers: what baselines, reports and lists of traces need of it. Made in one pass, a record at a time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::places::Places;
use crate::ranges::Ranges;
use crate::{AccessKind, Capability, FailedCall, FetchLane, Header, Origin, Phase, Record, What};

/// Files and failures kept of one start.
const MAX_KEPT: usize = 100_000;

/// Reads, from one level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reads {
    /// How many.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
    /// Nanoseconds until they were answered, added up.
    pub wait_ns: u64,
}

/// Requests in one lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetches {
    /// How many: each is a round trip.
    pub count: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// How many ended early.
    pub broken: u64,
}

/// What a start did with one file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUse {
    /// Reads of it that reached the agent, and accesses that probes saw.
    pub reads: u64,
    /// Nanoseconds that somebody waited for it.
    pub wait_ns: u64,
    /// Nanoseconds from the start's beginning to the first of them.
    pub first_ns: u64,
}

/// A kind of call that failed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the call.
    pub call: String,
    /// With what.
    pub errno: u32,
    /// Type of the file: `symlink`, `file`, `directory`, `fifo`, `other` or `unknown`.
    pub file_type: String,
}

impl Failure {
    /// The kind of a failed call.
    pub fn of(call: &FailedCall) -> Self {
        let file_type = match call.mode.map(|mode| mode & 0o170_000) {
            Some(0o120_000) => "symlink",
            Some(0o100_000) => "file",
            Some(0o040_000) => "directory",
            Some(0o010_000) => "fifo",
            Some(_) => "other",
            None => "unknown",
        };
        Self { call: call.name().to_owned(), errno: call.errno, file_type: file_type.to_owned() }
    }
}

/// See the module text. Everything counts until the container was ready, if that is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// The trace's own description.
    pub header: Header,
    /// Nanoseconds from the request for the image to ready; `None`: nobody said when it was ready.
    pub ready_ns: Option<u64>,
    /// Nanoseconds to the first byte that the container got.
    pub first_byte_ns: Option<u64>,
    /// Steps: nanoseconds to their beginning, and that they took.
    pub phases: Vec<(Phase, u64, u64)>,
    /// Reads by [`Origin`].
    pub reads: BTreeMap<Origin, Reads>,
    /// Requests by [`FetchLane`].
    pub fetches: BTreeMap<FetchLane, Fetches>,
    /// Round trips that followed each other, look-ups included and the fill's not: requests that were under way at the same time
    /// count once.
    pub round_trips_in_turn: u64,
    /// Nanoseconds that processes were blocked: those that slept, added up, where probes see them; else the time during which at
    /// least one read waited for the registry.
    pub blocked_ns: u64,
    /// Bytes of content that were fetched ahead (profile and start pack).
    pub ahead_bytes: u64,
    /// Those of them that were read.
    pub ahead_used_bytes: u64,
    /// Bytes of content that arrived, but for the fill.
    pub brought_bytes: u64,
    /// Bytes of content that were touched.
    pub touched_bytes: u64,
    /// Files that were touched, by path.
    pub files: BTreeMap<String, FileUse>,
    /// Calls that failed.
    pub failures: BTreeMap<Failure, u64>,
    /// Records before ready, and in all.
    pub records: (u64, u64),
}

impl Summary {
    /// Bytes fetched in all lanes but the fill, which nobody waits for.
    pub fn bytes_before_ready(&self) -> u64 {
        self.wanted_fetches().map(|fetches| fetches.bytes).sum()
    }

    /// Requests in all lanes but the fill, for bytes of the image.
    pub fn round_trips(&self) -> u64 {
        self.wanted_fetches().map(|fetches| fetches.count).sum()
    }

    fn wanted_fetches(&self) -> impl Iterator<Item = &Fetches> {
        let wanted = |lane: &FetchLane| !matches!(lane, FetchLane::Fill | FetchLane::Lookup);
        self.fetches.iter().filter(move |(lane, _)| wanted(lane)).map(|(_, fetches)| fetches)
    }

    /// How much of what was fetched ahead was read, 0 to 1; `None`: nothing was fetched ahead.
    pub fn accuracy(&self) -> Option<f64> {
        (self.ahead_bytes > 0).then(|| self.ahead_used_bytes as f64 / self.ahead_bytes as f64)
    }

    /// How long a step took.
    pub fn phase_ns(&self, wanted: Phase) -> Option<u64> {
        self.phases.iter().find(|(phase, ..)| *phase == wanted).map(|(.., took)| *took)
    }
}

/// Makes a [`Summary`].
#[derive(Debug)]
pub struct Summarizer {
    summary: Summary,
    places: Places,
    sees_blocked: bool,
    sees_accesses: bool,
    /// End of the latest wait for the registry.
    waited_until: u64,
    /// When requests were answered, and when they had been sent.
    answered: Vec<(u64, u64)>,
    ahead: BTreeMap<u32, Ranges>,
    brought: BTreeMap<u32, Ranges>,
    touched: BTreeMap<u32, Ranges>,
    is_over: bool,
}

impl Summarizer {
    /// Begins.
    pub fn new(header: &Header) -> Self {
        let sees = |capability| header.levels.of(capability).is_some();
        Self {
            sees_blocked: sees(Capability::Blocked),
            sees_accesses: sees(Capability::Read) && sees(Capability::Fault),
            summary: Summary { header: header.clone(), ..Summary::default() },
            places: Places::default(),
            waited_until: 0,
            answered: Vec::new(),
            ahead: BTreeMap::new(),
            brought: BTreeMap::new(),
            touched: BTreeMap::new(),
            is_over: false,
        }
    }

    /// Takes the next record, in the trace's order.
    pub fn push(&mut self, record: &Record) {
        self.summary.records.1 += 1;
        self.places.see(&record.what);
        if self.is_over {
            return;
        }
        self.summary.records.0 += 1;
        let at = record.time_ns.saturating_sub(self.summary.header.began_ns);
        match &record.what {
            What::Ready => {
                self.is_over = true;
                self.summary.ready_ns = Some(at);
            }
            What::Phase { phase, took_ns } => self.summary.phases.push((*phase, at, *took_ns)),
            What::Fetch { lane, len, first_byte_ns, whole, .. } => {
                if *lane != FetchLane::Fill && self.answered.len() < MAX_KEPT {
                    self.answered.push((at.saturating_add(*first_byte_ns), at));
                }
                let fetches = self.summary.fetches.entry(*lane).or_default();
                fetches.count += 1;
                fetches.bytes += len;
                fetches.broken += u64::from(!whole);
            }
            What::Brought { lane, layer, offset, len } if *lane != FetchLane::Fill => {
                let range = *offset..offset.saturating_add(*len);
                if matches!(lane, FetchLane::Prefetch | FetchLane::StartPack) {
                    self.ahead.entry(*layer).or_default().add(range.clone());
                }
                self.brought.entry(*layer).or_default().add(range);
            }
            What::Served { layer, offset, len, service_ns, from } => {
                self.served(at, (*layer, *offset, *len), *service_ns, *from);
            }
            What::Access { kind, inode, offset, len } if *kind != AccessKind::Fill => {
                self.accessed(at, *inode, *offset, *len);
            }
            What::Blocked { inode, blocked_ns, .. } => {
                self.summary.blocked_ns += blocked_ns;
                let path = self.places.inode(*inode).map(|place| text(&place.path));
                self.used(path, at.saturating_sub(*blocked_ns), *blocked_ns);
            }
            What::Failed(call) => {
                let room = self.summary.failures.len() < MAX_KEPT;
                let failure = Failure::of(call);
                if room || self.summary.failures.contains_key(&failure) {
                    *self.summary.failures.entry(failure).or_default() += 1;
                }
            }
            _ => {}
        }
    }

    fn served(&mut self, at: u64, (layer, offset, len): (u32, u64, u64), wait_ns: u64, from: Origin) {
        let reads = self.summary.reads.entry(from).or_default();
        reads.count += 1;
        reads.bytes += len;
        reads.wait_ns += wait_ns;
        let end = at.saturating_add(wait_ns);
        let first = self.summary.first_byte_ns.get_or_insert(end);
        *first = (*first).min(end);
        if !self.sees_accesses {
            self.touched.entry(layer).or_default().add(offset..offset.saturating_add(len));
        }
        if !self.sees_blocked && from == Origin::Registry {
            self.summary.blocked_ns += end.saturating_sub(at.max(self.waited_until));
            self.waited_until = self.waited_until.max(end);
        }
        let files = self.places.among(layer, offset, len).map(|place| text(&place.path));
        let files: Vec<String> = files.collect();
        // The first one was asked for; the others are what the kernel read ahead.
        let wait_ns = if self.sees_blocked { 0 } else { wait_ns };
        for (number, path) in files.into_iter().enumerate() {
            self.used(Some(path), at, if number == 0 { wait_ns } else { 0 });
        }
    }

    fn accessed(&mut self, at: u64, inode: u64, offset: u64, len: u64) {
        let Some(place) = self.places.inode(inode) else { return };
        let (start, end) = (place.offset.saturating_add(offset), place.end());
        let (layer, path) = (place.layer, text(&place.path));
        if self.sees_accesses {
            self.touched.entry(layer).or_default().add(start..start.saturating_add(len).min(end));
        }
        self.used(Some(path), at, 0);
    }

    fn used(&mut self, path: Option<String>, at: u64, wait_ns: u64) {
        let Some(path) = path else { return };
        if self.summary.files.len() >= MAX_KEPT && !self.summary.files.contains_key(&path) {
            return;
        }
        let file = self.summary.files.entry(path).or_insert(FileUse { first_ns: at, ..FileUse::default() });
        file.reads += 1;
        file.wait_ns += wait_ns;
        file.first_ns = file.first_ns.min(at);
    }

    /// Ends.
    pub fn finish(self) -> Summary {
        let mut summary = self.summary;
        for (layer, ahead) in &self.ahead {
            summary.ahead_bytes += ahead.bytes();
            let Some(touched) = self.touched.get(layer) else { continue };
            summary.ahead_used_bytes += ahead.iter().map(|range| touched.bytes_in(&range)).sum::<u64>();
        }
        summary.brought_bytes = self.brought.values().map(Ranges::bytes).sum();
        summary.touched_bytes = self.touched.values().map(Ranges::bytes).sum();
        summary.round_trips_in_turn = in_turn(self.answered);
        summary
    }
}

/// The most requests, given as (answered, sent), of which each was sent when the one before had been answered.
fn in_turn(mut answered: Vec<(u64, u64)>) -> u64 {
    answered.sort_unstable();
    let (mut count, mut last) = (0, 0);
    for (end, begin) in answered {
        if begin >= last {
            (count, last) = (count + 1, end);
        }
    }
    count
}

/// A path as people write it.
pub(crate) fn text(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;

    #[test]
    fn a_start_in_numbers() {
        let mut summarizer = Summarizer::new(&Header::default());
        let file =
            |offset, size, path: &[u8]| What::File { inode: 0, layer: 1, offset, size, path: path.to_vec() };
        let served = |offset, len, service_ns, from| What::Served { layer: 1, offset, len, service_ns, from };
        let fetch = |lane, len| What::Fetch {
            lane,
            layer: Some(1),
            offset: 0,
            len,
            first_byte_ns: 1,
            took_ns: 2,
            whole: true,
        };
        let brought = |lane, offset, len| What::Brought { lane, layer: 1, offset, len };
        let records = [
            (0, file(0, 100, b"a")),
            (0, file(4096, 9000, b"b")),
            (0, What::Phase { phase: Phase::Mount, took_ns: 5 }),
            (2, fetch(FetchLane::Lookup, 0)),
            (10, fetch(FetchLane::Lookup, 0)),
            (10, fetch(FetchLane::StartPack, 700)),
            (11, fetch(FetchLane::Fill, 1 << 30)),
            (12, brought(FetchLane::StartPack, 0, 8192)),
            (13, brought(FetchLane::Demand, 4096, 8192)),
            (14, brought(FetchLane::Fill, 0, 1 << 30)),
            (20, served(0, 4096, 1, Origin::StartPack)),
            // Two waits at the same time, one later.
            (30, served(4096, 8192, 10, Origin::Registry)),
            (35, served(12_288, 4096, 10, Origin::Registry)),
            (60, served(12_288, 4096, 10, Origin::Registry)),
            (70, served(12_288, 4096, 10, Origin::Disk)),
            (80, What::Ready),
            (90, served(0, 4096, 1000, Origin::Registry)),
        ];
        for (time_ns, what) in records {
            summarizer.push(&Record { time_ns, process: Process::default(), what });
        }
        let summary = summarizer.finish();
        assert_eq!((summary.ready_ns, summary.first_byte_ns), (Some(80), Some(21)));
        assert_eq!(summary.phase_ns(Phase::Mount), Some(5));
        // 30 to 45, 60 to 70.
        assert_eq!(summary.blocked_ns, 15 + 10);
        assert_eq!((summary.bytes_before_ready(), summary.round_trips()), (700, 1));
        // Neither the second look-up nor the pack waited for the other.
        assert_eq!(summary.round_trips_in_turn, 2);
        assert_eq!((summary.ahead_bytes, summary.ahead_used_bytes), (8192, 8192));
        assert_eq!((summary.touched_bytes, summary.brought_bytes), (16_384, 12_288));
        let reads = summary.reads.get(&Origin::Registry).copied().unwrap_or_default();
        assert_eq!(reads, Reads { count: 3, bytes: 16_384, wait_ns: 30 });
        let file = |path: &str| summary.files.get(path).copied().unwrap_or_default();
        assert_eq!(file("/a"), FileUse { reads: 1, wait_ns: 1, first_ns: 20 });
        assert_eq!(file("/b"), FileUse { reads: 4, wait_ns: 40, first_ns: 30 });
        assert_eq!(summary.records, (16, 17));
    }
}
