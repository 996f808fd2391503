//! What is found, and how seldom nothing is taken for something: over many comparisons of starts with noise.

#![allow(clippy::print_stdout, reason = "how often is worth knowing")]

use std::collections::BTreeSet;

use sluice_regress::{Kind, Limits, Report, Start, compare, junit};
use sluice_trace::Failure;

/// The same each time (xorshift*).
struct Chance(u64);

impl Chance {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A factor whose logarithm is normal (the sum of twelve), with this deviation.
    fn noise(&mut self, deviation: f64) -> f64 {
        let normal = (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0;
        (normal * deviation).exp()
    }
}

/// Starts of about a second and ten megabytes; times `slower` times as long.
fn starts(chance: &mut Chance, count: usize, deviation: f64, slower: f64) -> Vec<Start> {
    let one = |chance: &mut Chance| Start {
        ready_ns: Some((1e9 * slower * chance.noise(deviation)) as u64),
        blocked_ns: (0.4e9 * slower * chance.noise(deviation)) as u64,
        bytes: (1e7 * chance.noise(deviation)) as u64,
        round_trips: (40.0 * chance.noise(deviation)) as u64,
        accuracy: Some(0.8 / chance.noise(deviation).max(0.9)),
        files: ["/bin/app".to_owned()].into(),
        ..Start::default()
    };
    (0..count).map(|_| one(chance)).collect()
}

fn found(report: &Report, kind: Kind) -> bool {
    report.findings.iter().any(|finding| finding.kind == kind)
}

#[test]
fn starts_that_are_a_fifth_slower_are_found_and_equal_ones_are_not() {
    let mut chance = Chance(0x5EED);
    let limits = Limits::default();
    for (count, deviation, least) in [(5, 0.03, 0.99), (5, 0.05, 0.85), (10, 0.05, 0.99), (15, 0.08, 0.95)] {
        let (mut hits, mut alarms) = (0, 0);
        const ROUNDS: usize = 200;
        for _ in 0..ROUNDS {
            let base = starts(&mut chance, count, deviation, 1.0);
            let slow = starts(&mut chance, count, deviation, 1.2);
            let same = starts(&mut chance, count, deviation, 1.0);
            hits += usize::from(found(&compare(&base, &slow, &limits), Kind::SlowerReady));
            alarms += usize::from(!compare(&base, &same, &limits).findings.is_empty());
        }
        let (hits, alarms) = (hits as f64 / ROUNDS as f64, alarms as f64 / ROUNDS as f64);
        println!("{count} starts each, noise {deviation}: {hits} found, {alarms} false alarms");
        assert!(hits >= least, "{count} starts, noise {deviation}: only {hits} found");
        assert!(alarms < 0.01, "{count} starts, noise {deviation}: {alarms} false alarms");
    }
}

#[test]
fn every_kind_is_found_and_said_in_words() {
    let start = |number: u64| Start {
        ready_ns: Some(1_000_000_000 + number * 1_000_000),
        bytes: 10 << 20,
        round_trips: 10,
        blocked_ns: 300_000_000 + number * 1_000_000,
        accuracy: Some(0.9),
        files: ["/bin/sh".to_owned()].into(),
        ..Start::default()
    };
    let base: Vec<Start> = (0..6).map(start).collect();
    let failure = Failure { call: "renameat2".to_owned(), errno: 6, file_type: "symlink".to_owned() };
    let new: Vec<Start> = (0..6)
        .map(|number| Start {
            ready_ns: Some(1_500_000_000 + number * 1_000_000),
            bytes: 20 << 20,
            round_trips: 30,
            blocked_ns: 900_000_000,
            accuracy: Some(0.4),
            files: (0..20).map(|file| format!("/new/{file}")).collect(),
            failures: BTreeSet::from([failure.clone()]),
            ..start(number)
        })
        .collect();
    let report = compare(&base, &new, &Limits::default());
    let kinds: Vec<Kind> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, Kind::ALL);
    let said = &report.findings[0].what;
    assert!(
        said.starts_with("time to ready went from 1.00 s to 1.50 s (+50 %, with 95 % confidence"),
        "{said}"
    );
    assert!(report.findings[5].what.contains("20 files") && report.findings[5].new.len() == 20);
    assert_eq!(report.findings[6].new, ["renameat2 of a symlink with errno 6"]);
    let xml = junit(&report, "a <set> & \"another\"");
    assert!(
        xml.contains("failures=\"7\"") && xml.contains("a &lt;set&gt; &amp; &quot;another&quot;"),
        "{xml}"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["findings"][0]["kind"], "slower_ready");
    // The other way round everything became better, but for what is new.
    let better = compare(&new, &base, &Limits::default());
    let kinds: Vec<Kind> = better.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [Kind::NewFiles]);
}

#[test]
fn single_starts_prove_nothing() {
    let mut chance = Chance(7);
    let (base, slow) = (starts(&mut chance, 4, 0.01, 1.0), starts(&mut chance, 9, 0.01, 3.0));
    let report = compare(&base, &slow, &Limits::default());
    assert!(report.findings.is_empty(), "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("4 and 9 starts have it; 5 of each")), "{report:?}");
    // Who wants can ask for less.
    let limits = Limits { starts: 3, chance: 0.03, ..Limits::default() };
    assert!(found(&compare(&base, &slow, &limits), Kind::SlowerReady));
}
