//! `cargo xtask demo`: the product's main job beside a full pull, on a real image.

use anyhow::Result;
use indicatif::ProgressBar;

use crate::containerd::Containerd;
use crate::measure::{Bench, Way, median};
use crate::run::target;
use crate::{image_maker, packages, sluice};

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Image to make and run: small, medium or large
    #[arg(long, default_value = "medium")]
    size: String,
    /// Rate of the link to the registry
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// Round-trip time of the link
    #[arg(long, default_value = "2ms")]
    delay: String,
    /// Starts of each kind
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// An image of any registry instead: it is copied by skopeo and served through the same link
    #[arg(long, value_name = "REF", requires = "command")]
    image: Option<String>,
    /// Command for `--image`, which ends by itself
    #[arg(last = true)]
    command: Vec<String>,
}

/// Makes, serves, runs, compares.
pub(crate) fn demo(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    if args.image.is_some() {
        packages::install(&packages::TESTS)?;
    }
    println!("building sluice (release)");
    let binary = sluice::build()?;
    let (images, name, command) = match &args.image {
        Some(reference) => {
            let (images, name) = image_maker::copy(reference)?;
            (images, name, args.command.iter().map(String::as_str).collect::<Vec<_>>())
        }
        None => {
            let recipe = image_maker::recipe(&args.size)?;
            (image_maker::make(recipe)?, recipe.name.to_owned(), recipe.command.to_vec())
        }
    };
    let work = target().join("sluice-demo");
    let containerd = Containerd::start(&work.join("containerd"))?;
    let bench = Bench::new(
        (&binary, work, &containerd),
        (&images, &name),
        (&args.rate, &args.delay),
        (&command, args.image.is_none().then_some("ready")),
    )?;
    let (image, rate, delay) = (bench.image("plain"), &args.rate, &args.delay);
    println!("registry behind a link of {rate} with {delay} round trip; image {image}");
    print!("{}", bench.index()?);
    println!("another node starts it once, and publishes what it learned");
    bench.learn()?;
    let progress = ProgressBar::new((args.rounds * Way::ALL.len()) as u64);
    let mut rows = Vec::new();
    for way in Way::ALL {
        let mut starts = Vec::new();
        for _ in 0..args.rounds {
            progress.set_message(way.label());
            starts.push(bench.start(way)?);
            progress.inc(1);
        }
        rows.push((way, starts));
    }
    progress.finish_and_clear();
    let size = image_maker::compressed_bytes(&images.join(&name))?;
    let ready = |starts: &[crate::measure::Start]| median(starts.iter().map(|start| start.ready_s).collect());
    let full = rows.first().map_or(f64::NAN, |(_, starts)| ready(starts));
    println!("\n{:<36} {:>10} {:>12} {:>9} {:>8}", "", "ready", "fetched", "of image", "ratio");
    for (way, starts) in &rows {
        let bytes = median(starts.iter().map(|start| start.bytes as f64).collect());
        println!(
            "{:<36} {:>8.2} s {:>9.1} MB {:>8.1} % {:>6.1} x",
            way.label(),
            ready(starts),
            bytes / 1e6,
            bytes * 100.0 / size as f64,
            full / ready(starts)
        );
    }
    println!("command: {}", command.join(" "));
    Ok(())
}
