//! `cargo xtask bench read`: reading an image's files, ours beside ext4 with the same files, taking turns in one run.
//!
//! Each round goes through all places; a place is read once untouched, then with all of it in the page cache. Untouched is, for
//! ext4 and for layers that the kernel reads by itself, with none of the files' pages in the page cache; for layers that our server
//! reads it is the first touch, with the layer store's own files in the page cache. nydusd, which always reads by itself, has its cache
//! complete too, once on the disk and once in the page cache. `stat` and `find` read no pages: names and inodes are known in either
//! state.

mod measure;
mod places;
mod tree;

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use self::measure::{Kind, Sample, State};
use self::places::{Place, Places};
use crate::measure::median;
use crate::{packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Size of everything: 1 is 512 MiB in 16 files, 10,000 small files, 50,000 entries
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only these kinds of access (see the table's first column)
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<String>,
    /// Only these places (see the table's head); ext4 is always there
    #[arg(long, value_delimiter = ',')]
    places: Vec<String>,
    /// Requests that each CPU's queue can hold, for the way over io_uring
    #[arg(long)]
    queue_depth: Option<u16>,
    /// nydusd to compare with (RAFS v6, same files)
    #[arg(long, requires = "nydus_image")]
    nydusd: Option<PathBuf>,
    /// nydus-image, which makes its image
    #[arg(long, requires = "nydusd")]
    nydus_image: Option<PathBuf>,
    /// An existing binary of sluice instead of a release build of this tree
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Write all measurements here
    #[arg(long)]
    json: Option<PathBuf>,
}

/// All rounds of one kind of access in one state at one place.
#[derive(Debug, Serialize)]
struct Series {
    place: &'static str,
    state: State,
    kind: Kind,
    unit: &'static str,
    values: Vec<f64>,
    /// CPU seconds of agent and server, per GiB read.
    cpu_s_per_gib: Option<f64>,
    median: f64,
    /// How much better than the place it is compared with; below 1 is worse.
    ratio: f64,
}

/// Runs it all.
pub(crate) fn read(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let tree = tree::make(args.scale)?;
    let places = Places::open(&binary, &tree, args)?;
    let kinds: Vec<Kind> = Kind::ALL
        .into_iter()
        .filter(|kind| args.kinds.is_empty() || args.kinds.iter().any(|one| one == kind.name()))
        .collect();
    let mut samples: Vec<Sample> = Vec::new();
    for round in 0..args.rounds {
        for (number, place) in places.all.iter().enumerate() {
            eprintln!("round {} of {}: {}", round + 1, args.rounds, place.name);
            for kind in &kinds {
                samples.extend(measure::measure(number, place, &tree, *kind)?);
            }
        }
    }
    let series = summary(&places.all, &kinds, &samples);
    print_table(&places.all, &kinds, &series);
    verdicts(&series);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&series)?)?;
    }
    places.close()
}

fn summary(places: &[Place], kinds: &[Kind], samples: &[Sample]) -> Vec<Series> {
    let of = |place: usize, state: State, kind: Kind| -> Vec<&Sample> {
        let wanted = |sample: &&Sample| sample.place == place && sample.state == state && sample.kind == kind;
        samples.iter().filter(wanted).collect()
    };
    let middle = |samples: &[&Sample]| median(samples.iter().map(|sample| sample.value).collect());
    let mut all = Vec::new();
    for state in [State::Untouched, State::Warm] {
        for kind in kinds.iter().copied() {
            for (number, place) in places.iter().enumerate() {
                let own = of(number, state, kind);
                let (median_own, base) = (middle(&own), middle(&of(place.base, state, kind)));
                let cpu: Vec<f64> = own.iter().filter_map(|sample| sample.cpu_s_per_gib).collect();
                all.push(Series {
                    place: place.name,
                    state,
                    kind,
                    unit: kind.unit(),
                    values: own.iter().map(|sample| sample.value).collect(),
                    cpu_s_per_gib: (!cpu.is_empty()).then(|| median(cpu)),
                    median: median_own,
                    ratio: if kind.more_is_better() { median_own / base } else { base / median_own },
                });
            }
        }
    }
    all
}

fn print_table(places: &[Place], kinds: &[Kind], series: &[Series]) {
    for state in [State::Untouched, State::Warm] {
        print!("\n{:<26}", state.title());
        places.iter().for_each(|place| print!("{:>20}", place.name));
        println!();
        for kind in kinds {
            print!("{:<26}", format!("{} ({})", kind.name(), kind.unit()));
            for one in series.iter().filter(|one| one.state == state && one.kind == *kind) {
                print!("{:>20}", format!("{} {:>5.2}x", short(one.median), one.ratio));
            }
            println!();
        }
    }
    println!("\nCPU seconds of agent and server per GiB, untouched:");
    for one in series.iter().filter(|one| one.state == State::Untouched) {
        if let Some(cpu) = one.cpu_s_per_gib {
            println!("  {:<20} {:<10} {cpu:.2}", one.place, one.kind.name());
        }
    }
    println!();
}

fn short(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// Whether the targets are met, in words.
fn verdicts(series: &[Series]) {
    let find = |place: &str, state: State, kind: Kind| {
        series.iter().find(|one| one.place == place && one.state == state && one.kind == kind)
    };
    let say = |met: bool, what: String| println!("{} {what}", if met { "met:    " } else { "NOT MET:" });
    for one in series.iter().filter(|one| one.place.contains(places::LOCAL)) {
        let target = match (one.state, one.kind) {
            (State::Warm, Kind::Stat | Kind::Find) => 1.0,
            (State::Warm, _) => 0.95,
            (State::Untouched, Kind::Sequential | Kind::Small) => 0.85,
            _ => continue,
        };
        let (state, kind) = (one.state.title(), one.kind.name());
        say(one.ratio >= target, format!("{}, {state}, {kind}: {:.2} >= {target}", one.place, one.ratio));
    }
    for way in [places::IO_URING, places::CLASSIC] {
        let (ours, ext4) = (
            find(way, State::Untouched, Kind::Sequential),
            find(places::EXT4, State::Untouched, Kind::Sequential),
        );
        if let (Some(ours), Some(ext4)) = (ours, ext4) {
            let target = (ext4.median / 2.0).min(1000.0);
            say(
                ours.median >= target,
                format!("{way}, first touch in sequence: {:.0} >= {target:.0} MB/s", ours.median),
            );
        }
    }
    for kind in Kind::ALL {
        let of = |way| find(way, State::Untouched, kind);
        let (Some(uring), Some(classic)) = (of(places::IO_URING), of(places::CLASSIC)) else { continue };
        let ratio = uring.ratio / classic.ratio;
        let target = if matches!(kind, Kind::Random | Kind::Random8) { 1.3 } else { 1.0 };
        say(
            ratio >= target,
            format!("io_uring beside classic, first touch, {}: {ratio:.2} >= {target}", kind.name()),
        );
    }
    for one in series {
        let nydus = match (one.place, one.state) {
            (places::LOCAL, _) => places::NYDUS,
            (places::IO_URING | places::CLASSIC, State::Untouched) => places::NYDUS_CACHED,
            _ => continue,
        };
        if let Some(nydus) = find(nydus, one.state, one.kind) {
            let (state, kind, ratio) = (one.state.title(), one.kind.name(), one.ratio / nydus.ratio);
            say(
                ratio >= 1.0,
                format!("{} ahead of {}, {state}, {kind}: {ratio:.2} x", one.place, nydus.place),
            );
        }
    }
}
