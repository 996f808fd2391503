//! `cargo xtask bench peers`: lazy loaders of others beside `sluice run`, from nothing local to the end of a command in a container of
//! the image, taking turns. A peer that is no Debian package is given by the paths of its programs; the stargz snapshotter, which needs
//! a containerd, is measured by `bench cri --stargz`.

mod nydus;

use std::path::PathBuf;

use anyhow::Result;

use self::nydus::Nydus;
use crate::containerd::Containerd;
use crate::measure::{Bench, Start, Way, median};
use crate::run::target;
use crate::{image_maker, packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images, as of `bench start`
    #[arg(long, value_delimiter = ',', default_value = "medium")]
    images: Vec<String>,
    /// Rate of the link
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// Round-trip time of the link
    #[arg(long, default_value = "2ms")]
    delay: String,
    /// Starts per image and way
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Our ways to start, of which each round does one after another
    #[arg(long, value_delimiter = ',', default_values_t = STREAMED)]
    ways: Vec<Way>,
    /// The `sluice` to measure [default: built now]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Nydus' daemon
    #[arg(long, value_name = "FILE", requires = "nydus_image")]
    nydusd: Option<PathBuf>,
    /// Nydus' converter
    #[arg(long, value_name = "FILE", requires = "nydusd")]
    nydus_image: Option<PathBuf>,
}

/// Our ways that bring no more than is needed.
const STREAMED: [Way; 3] = [Way::Streamed, Way::Profile, Way::Pack];

/// How much faster we are to be than the best peer that was not told what the command reads, and than the best one that was.
const TARGETS: [(bool, f64, &str); 2] = [(false, 2.0, "without a list"), (true, 1.0, "with a list")];

/// All starts of one way of a peer.
#[derive(Debug)]
struct Peer {
    label: &'static str,
    /// It was told what the command reads.
    told: bool,
    starts: Vec<Start>,
}

/// Runs it all.
pub(crate) fn peers(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    packages::install(&[("curl", "fetches a peer's metadata")])?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let nydus = args.nydusd.as_deref().zip(args.nydus_image.as_deref());
    if nydus.is_none() {
        println!("nydus is LEFT OUT: no --nydusd and --nydus-image");
    }
    let work = target().join("sluice-bench/peers");
    let containerd = Containerd::start(&work.join("containerd"))?;
    println!("{:<8} {:<36} {:>24} {:>11} {:>8}", "image", "way", "ready s", "fetched MB", "peak MB");
    for name in &args.images {
        let recipe = image_maker::recipe(name)?;
        let images = image_maker::make(recipe)?;
        let bench = Bench::new(
            (&binary, work.clone(), &containerd),
            (&images, recipe.name),
            (&args.rate, &args.delay),
            (recipe.command, Some("ready")),
        )?;
        bench.index()?;
        bench.learn()?;
        let nydus = nydus
            .map(|programs| {
                Nydus::convert(programs, &bench, &images.join(recipe.name), &work, recipe.command)
            })
            .transpose()?;
        let mut ours: Vec<Vec<Start>> = vec![Vec::new(); args.ways.len()];
        let mut theirs: Vec<Peer> = Vec::new();
        for way in nydus.iter().flat_map(Nydus::ways) {
            theirs.push(Peer { label: way.label, told: way.told, starts: Vec::new() });
        }
        for _ in 0..args.rounds {
            for (way, starts) in args.ways.iter().zip(&mut ours) {
                starts.push(bench.start(*way)?);
            }
            if let Some(nydus) = &nydus {
                for (way, peer) in nydus.ways().iter().zip(&mut theirs) {
                    peer.starts.push(nydus.start(&bench, way)?);
                }
            }
        }
        for (way, starts) in args.ways.iter().zip(&ours) {
            print(name, way.label(), starts);
        }
        for peer in &theirs {
            print(name, peer.label, &peer.starts);
        }
        verdicts(name, &args.ways, &ours, &theirs);
    }
    Ok(())
}

fn ready(starts: &[Start]) -> f64 {
    median(starts.iter().map(|start| start.ready_s).collect())
}

fn print(image: &str, way: &str, starts: &[Start]) {
    let middle = |of: fn(&Start) -> u64| median(starts.iter().map(|start| of(start) as f64).collect()) / 1e6;
    let times = starts.iter().map(|start| start.ready_s);
    let (least, most) =
        times.fold((f64::INFINITY, 0.0_f64), |(least, most), one| (least.min(one), most.max(one)));
    println!(
        "{image:<8} {way:<36} {:>24} {:>11.1} {:>8.1}",
        format!("{:.2} [{least:.2} to {most:.2}]", ready(starts)),
        middle(|start| start.bytes),
        middle(|start| start.peak_bytes)
    );
}

/// How each of our ways compares with the peers' best, in words.
fn verdicts(image: &str, ways: &[Way], ours: &[Vec<Start>], theirs: &[Peer]) {
    for (told, target, named) in TARGETS {
        let best = theirs.iter().filter(|peer| peer.told == told);
        let Some(best) = best.map(|peer| ready(&peer.starts)).min_by(f64::total_cmp) else { continue };
        for (way, starts) in ways.iter().zip(ours).filter(|(way, _)| STREAMED.contains(way)) {
            let ratio = best / ready(starts);
            let met = if ratio >= target { "met:    " } else { "NOT MET:" };
            println!("{met} {image}, {}, beside the best peer {named}: {ratio:.2} >= {target}", way.label());
        }
    }
}
