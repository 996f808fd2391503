//! The comparison.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sluice_trace::Failure;

use crate::stats::{median, p_larger, shift};
use crate::{Measure, Start};

/// Files named in a finding.
const NAMED: usize = 10;

/// From when on a difference is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Starts that each set must have.
    pub starts: usize,
    /// How likely a finding may be chance, per measure.
    pub chance: f64,
    /// Part of the base's median by which a measure must be worse.
    pub worse_by: f64,
    /// Least change of times, in seconds.
    pub seconds: f64,
    /// Least change of bytes.
    pub bytes: f64,
    /// Least change of requests.
    pub round_trips: f64,
    /// Least change of the accuracy, 0 to 1.
    pub accuracy: f64,
    /// Part of the new starts in which something new must be.
    pub share: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            starts: 5,
            chance: 0.005,
            worse_by: 0.1,
            seconds: 0.02,
            bytes: f64::from(256 << 10),
            round_trips: 2.0,
            accuracy: 0.05,
            share: 0.8,
        }
    }
}

impl Limits {
    fn least(&self, measure: Measure) -> f64 {
        match measure {
            Measure::Ready | Measure::Blocked => self.seconds,
            Measure::Bytes => self.bytes,
            Measure::RoundTrips => self.round_trips,
            Measure::Accuracy => self.accuracy,
        }
    }
}

/// A measure, compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Which.
    pub measure: Measure,
    /// Median of the base, in the measure's unit ([`Measure::of`]).
    pub base: f64,
    /// Median of the new ones.
    pub new: f64,
    /// By how much the new ones are more; and what holds the true shift in about 95 of 100 cases.
    pub shift: (f64, f64, f64),
    /// How likely that is chance, if nothing became worse.
    pub chance: f64,
    /// Starts on both sides that have it.
    pub starts: (usize, usize),
}

/// What kind of thing became worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Ready later.
    SlowerReady,
    /// More bytes.
    MoreBytes,
    /// More requests.
    MoreRoundTrips,
    /// Blocked for longer.
    MoreBlocked,
    /// Less of what is fetched ahead is read.
    LessAccurate,
    /// Files that no start touched before.
    NewFiles,
    /// Calls that did not fail before.
    NewFailures,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::SlowerReady,
        Self::MoreBytes,
        Self::MoreRoundTrips,
        Self::MoreBlocked,
        Self::LessAccurate,
        Self::NewFiles,
        Self::NewFailures,
    ];

    /// Its name in metrics and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::SlowerReady => "slower_ready",
            Self::MoreBytes => "more_bytes",
            Self::MoreRoundTrips => "more_round_trips",
            Self::MoreBlocked => "more_blocked",
            Self::LessAccurate => "less_accurate",
            Self::NewFiles => "new_files",
            Self::NewFailures => "new_failures",
        }
    }

    fn of(measure: Measure) -> Self {
        match measure {
            Measure::Ready => Self::SlowerReady,
            Measure::Bytes => Self::MoreBytes,
            Measure::RoundTrips => Self::MoreRoundTrips,
            Measure::Blocked => Self::MoreBlocked,
            Measure::Accuracy => Self::LessAccurate,
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::SlowerReady => {
                "see below what else changed; `sluice trace report --compare` shows the starts side by side"
            }
            Self::MoreBytes => {
                "the start reads more, or fetches what it does not read: look at the new files, and publish a fresh profile with `sluice profile push --pack`"
            }
            Self::MoreRoundTrips => {
                "reads are not fetched ahead any more: publish a fresh profile with `sluice profile push --pack`"
            }
            Self::MoreBlocked => {
                "processes wait for the registry: compare its bandwidth and latency, and publish a fresh start pack"
            }
            Self::LessAccurate => {
                "the profile is of other starts: `sluice profile rm` and record some again, then `sluice profile push --pack`"
            }
            Self::NewFiles => {
                "if the start needs them they belong into the profile; else find out what reads them"
            }
            Self::NewFailures => {
                "look for what changed below the container: kernel, image or mounts; `sluice doctor` checks the kernel for the known faults"
            }
        }
    }
}

/// Something that became worse.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: Kind,
    /// What changed, in words.
    pub what: String,
    /// What to do.
    pub advice: String,
    /// What is new: paths, or calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub new: Vec<String>,
}

/// The outcome.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// Starts on both sides.
    pub starts: (usize, usize),
    /// What became worse.
    pub findings: Vec<Finding>,
    /// All measures that could be compared.
    pub measured: Vec<Measured>,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Compares two sets of starts.
pub fn compare(base: &[Start], new: &[Start], limits: &Limits) -> Report {
    let mut report = Report { starts: (base.len(), new.len()), ..Report::default() };
    for measure in Measure::ALL {
        let values =
            |starts: &[Start]| starts.iter().filter_map(|start| measure.of(start)).collect::<Vec<f64>>();
        let (old, now) = (values(base), values(new));
        if old.len().min(now.len()) < limits.starts.max(1) {
            let (name, old, now, needed) = (measure.name(), old.len(), now.len(), limits.starts);
            if old + now > 0 {
                report
                    .notes
                    .push(format!("{name}: {old} and {now} starts have it; {needed} of each are needed"));
            }
            continue;
        }
        let Some(measured) = measured(measure, &old, &now) else { continue };
        report.findings.extend(finding(&measured, limits));
        report.measured.push(measured);
    }
    if base.len().min(new.len()) >= limits.starts.max(1) {
        report.findings.extend(new_files(base, new, limits));
        report.findings.extend(new_failures(base, new, limits));
    }
    report
}

fn measured(measure: Measure, base: &[f64], new: &[f64]) -> Option<Measured> {
    let chance = if measure.falls() { p_larger(new, base) } else { p_larger(base, new) };
    let starts = (base.len(), new.len());
    Some(Measured {
        measure,
        base: median(base)?,
        new: median(new)?,
        shift: shift(base, new)?,
        chance,
        starts,
    })
}

fn finding(measured: &Measured, limits: &Limits) -> Option<Finding> {
    let measure = measured.measure;
    let sign = if measure.falls() { -1.0 } else { 1.0 };
    let worse = measured.shift.0 * sign;
    let enough = worse >= limits.least(measure) && worse >= limits.worse_by * measured.base;
    if !enough || measured.chance > limits.chance {
        return None;
    }
    let part = |value: f64| {
        if measured.base > 0.0 {
            format!("{:+.0} %", value / measured.base * 100.0)
        } else {
            measure.text(value)
        }
    };
    let (middle, low, high) = measured.shift;
    let what = format!(
        "{} went from {} to {} ({}, with 95 % confidence between {} and {}; {} and {} starts, chance {:.1} %)",
        measure.name(),
        measure.text(measured.base),
        measure.text(measured.new),
        part(middle),
        part(low),
        part(high),
        measured.starts.0,
        measured.starts.1,
        measured.chance * 100.0,
    );
    let kind = Kind::of(measure);
    Some(Finding { kind, what, advice: kind.advice().to_owned(), new: Vec::new() })
}

/// What enough of the new starts have and none of the base's.
fn only_new<'a, T: Ord>(
    base: &'a [Start],
    new: &'a [Start],
    limits: &Limits,
    of: impl Fn(&'a Start) -> &'a BTreeSet<T>,
) -> Vec<&'a T> {
    let known: BTreeSet<&T> = base.iter().flat_map(&of).collect();
    let mut counts: BTreeMap<&T, usize> = BTreeMap::new();
    for one in new.iter().flat_map(&of).filter(|one| !known.contains(one)) {
        *counts.entry(one).or_default() += 1;
    }
    let enough = limits.share * new.len() as f64;
    counts.into_iter().filter(|(_, count)| *count as f64 >= enough).map(|(one, _)| one).collect()
}

fn new_files(base: &[Start], new: &[Start], limits: &Limits) -> Option<Finding> {
    // Without files there was nothing to see.
    if base.iter().all(|start| start.files.is_empty()) {
        return None;
    }
    let found = only_new(base, new, limits, |start| &start.files);
    if found.is_empty() {
        return None;
    }
    let named: Vec<&str> = found.iter().take(NAMED).map(|path| path.as_str()).collect();
    let more = if found.len() > NAMED { ", …" } else { "" };
    let kind = Kind::NewFiles;
    Some(Finding {
        kind,
        what: format!(
            "the start touches {} files that it did not before: {}{more}",
            found.len(),
            named.join(", ")
        ),
        advice: kind.advice().to_owned(),
        new: found.into_iter().cloned().collect(),
    })
}

fn new_failures(base: &[Start], new: &[Start], limits: &Limits) -> Option<Finding> {
    let found: Vec<&Failure> = only_new(base, new, limits, |start| &start.failures);
    if found.is_empty() {
        return None;
    }
    let name = |failure: &&Failure| {
        let Failure { call, errno, file_type } = failure;
        format!("{call} of a {file_type} with errno {errno}")
    };
    let names: Vec<String> = found.iter().map(name).collect();
    let kind = Kind::NewFailures;
    let what = format!("calls fail that did not before: {}", names.join(", "));
    Some(Finding { kind, what, advice: kind.advice().to_owned(), new: names })
}
