//! `cargo xtask bench start`: time to ready, images × links × ways, alternating; medians, ratios and targets.

pub(crate) mod cri;
pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod peers;
pub(crate) mod probes;
pub(crate) mod read;
pub(crate) mod size;

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::containerd::Containerd;
use crate::measure::{Bench, Start, Traced, Way, median};
use crate::run::target;
use crate::{image_maker, packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images: small, medium, large; node, web, database, java, clang
    #[arg(long, value_delimiter = ',', default_value = "small,medium,large")]
    images: Vec<String>,
    /// Links, RATE/ROUND-TRIP
    #[arg(long, value_delimiter = ',', default_value = "1gbit/2ms,200mbit/20ms")]
    links: Vec<String>,
    /// Ways to start, of which each round does one after another; ratios need full-pull, and the physical limit local and pack
    #[arg(long, value_delimiter = ',', default_values_t = Way::ALL)]
    ways: Vec<Way>,
    /// Streamed starts that guess too: a row per item, e.g. `none,elf,file,elf+file`
    #[arg(long, value_delimiter = ',')]
    guess: Vec<String>,
    /// Starts per image, link and way
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Write all measurements here
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Memory a daemon may take at its peak.
const PEAK_TARGET: f64 = 80.0;

/// Runs it all.
pub(crate) fn start(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    let binary = sluice::build()?;
    let work = target().join("sluice-bench");
    let containerd = Containerd::start(&work.join("containerd"))?;
    let mut results = Vec::new();
    println!(
        "{:<8} {:<14} {:<36} {:>8} {:>7} {:>11} {:>9} {:>11} {:>11} {:>6} {:>6}",
        "image",
        "link",
        "way",
        "ready s",
        "ratio",
        "fetched MB",
        "peak MB",
        "touched MB",
        "brought MB",
        "ratio",
        "trips"
    );
    for name in &args.images {
        let recipe = image_maker::recipe(name)?;
        let images = image_maker::make(recipe)?;
        for link in &args.links {
            let (rate, delay) =
                link.split_once('/').with_context(|| format!("`{link}` is not RATE/ROUND-TRIP"))?;
            let bench = Bench::new(
                (&binary, work.clone(), &containerd),
                (&images, recipe.name),
                (rate, delay),
                (recipe.command, Some("ready")),
            )?;
            bench.index()?;
            let learnt = args.ways.iter().any(|way| [Way::Profile, Way::Pack].contains(way));
            let pack_bytes = if learnt { bench.learn()? } else { 0 };
            let mut starts: Vec<Vec<Start>> = vec![Vec::new(); args.ways.len()];
            let mut guesses: Vec<Vec<Start>> = vec![Vec::new(); args.guess.len()];
            for _ in 0..args.rounds {
                for (way, measured) in args.ways.iter().zip(&mut starts) {
                    measured.push(bench.start(*way)?);
                }
                for (switches, measured) in args.guess.iter().zip(&mut guesses) {
                    measured.push(bench.guessing(switches)?);
                }
            }
            let of = |wanted| args.ways.iter().position(|way| *way == wanted).and_then(|at| starts.get(at));
            let full = middle(of(Way::FullPull), |start| start.ready_s);
            let ways = args.ways.iter().map(|way| (*way, way.label().to_owned()));
            let guessed =
                args.guess.iter().map(|said| (Way::Streamed, format!("sluice, streamed, guess {said}")));
            for ((way, label), measured) in ways.chain(guessed).zip(starts.iter().chain(&guesses)) {
                let ready = middle(Some(measured), |start| start.ready_s);
                println!(
                    "{:<8} {:<14} {:<36} {:>8.2} {:>6.2}x {:>11.1} {:>9.1} {}{}",
                    name,
                    link,
                    label,
                    ready,
                    full / ready,
                    middle(Some(measured), |start| start.bytes as f64) / 1e6,
                    middle(Some(measured), |start| start.peak_bytes as f64) / 1e6,
                    traced(measured),
                    verdict(way, name, link, full / ready, measured)
                );
            }
            let local = middle(of(Way::Local), |start| start.ready_s);
            let limit = local + pack_bytes as f64 * 8.0 / bits_per_second(rate)? + seconds(delay)?;
            println!(
                "{name:<8} {link:<14} physical limit {limit:.2} s (all local {local:.2} s, start pack {:.1} MB); with start pack {:.2} x the limit (target 1.3)",
                pack_bytes as f64 / 1e6,
                middle(of(Way::Pack), |start| start.ready_s) / limit
            );
            results.push(json!({ "image": name, "link": link, "rounds": args.rounds, "pack_bytes": pack_bytes, "limit_s": limit,
                "starts": args.ways.iter().zip(&starts).map(|(way, measured)| json!({ "way": way, "starts": measured })).collect::<Vec<_>>(),
                "guesses": args.guess.iter().zip(&guesses).map(|(said, measured)| json!({ "guess": said, "starts": measured })).collect::<Vec<_>>() }));
        }
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&results)?)?;
    }
    Ok(())
}

/// Bits per second of `1gbit` or `200mbit`.
fn bits_per_second(rate: &str) -> Result<f64> {
    let (number, unit) = match (rate.strip_suffix("gbit"), rate.strip_suffix("mbit")) {
        (Some(number), _) => (number, 1e9),
        (_, Some(number)) => (number, 1e6),
        _ => anyhow::bail!("`{rate}` is not a rate like 1gbit or 200mbit"),
    };
    Ok(number.parse::<f64>().with_context(|| format!("`{rate}` is no rate"))? * unit)
}

/// Seconds of `2ms`.
fn seconds(delay: &str) -> Result<f64> {
    let number = delay.strip_suffix("ms").with_context(|| format!("`{delay}` is not a time like 2ms"))?;
    Ok(number.parse::<f64>().with_context(|| format!("`{delay}` is no time"))? / 1e3)
}

fn middle(starts: Option<&Vec<Start>>, of: impl Fn(&Start) -> f64) -> f64 {
    median(starts.into_iter().flatten().map(of).collect())
}

/// Bytes touched, bytes brought and their ratio, round trips; dashes where starts leave no trace.
fn traced(starts: &[Start]) -> String {
    let traced: Vec<Traced> = starts.iter().filter_map(|start| start.traced).collect();
    if traced.is_empty() {
        return format!("{:>11} {:>11} {:>6} {:>6}", "-", "-", "-", "-");
    }
    let middle = |of: fn(&Traced) -> u64| median(traced.iter().map(|one| of(one) as f64).collect());
    let (touched, brought) = (middle(|one| one.touched_bytes), middle(|one| one.brought_bytes));
    format!(
        "{:>11.1} {:>11.1} {:>6.2} {:>6.0}",
        touched / 1e6,
        brought / 1e6,
        brought / touched.max(1.0),
        middle(|one| one.round_trips_in_turn)
    )
}

/// Whether the targets of this row are met, in words.
fn verdict(way: Way, image: &str, link: &str, ratio: f64, starts: &[Start]) -> String {
    let mut said = String::new();
    let mut target =
        |met: bool, what: &str| said += &format!("  {} {what}", if met { "met:" } else { "NOT MET:" });
    if way == Way::FirstPull && !ratio.is_nan() {
        target(1.0 / ratio <= 0.6, "time <= 0.6 x full pull");
    }
    if way == Way::Streamed && image == "large" && link.starts_with("1gbit") && !ratio.is_nan() {
        target(ratio >= 4.0, ">= 4 x faster than full pull");
    }
    if way != Way::FullPull {
        let peak = starts.iter().map(|start| start.peak_bytes as f64 / 1e6).fold(0.0, f64::max);
        target(peak <= PEAK_TARGET, "peak <= 80 MB");
    }
    said
}
