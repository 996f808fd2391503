//! `cargo xtask bench size`: the same working set in images of different sizes. How large the rest is must not matter.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::containerd::Containerd;
use crate::image_maker;
use crate::measure::{Bench, Way, median};
use crate::run::{script, target};
use crate::{packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Compressed sizes of the images, in MB
    #[arg(long, value_delimiter = ',', default_value = "100,1000,5000")]
    sizes: Vec<u64>,
    /// What the command reads, in MB
    #[arg(long, default_value_t = 20)]
    working_set: u64,
    /// Rate of the link
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// Round-trip time of the link
    #[arg(long, default_value = "2ms")]
    delay: String,
    /// Starts per image
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// An existing binary of sluice instead of a release build of this tree
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Files that nobody reads have this size: large images have many.
const FILE: u64 = 1 << 20;
const COMMAND: [&str; 3] = ["/bin/sh", "-c", "cat /work/* > /dev/null && echo ready"];
/// The slowest may take this much longer than the fastest.
const TARGET: f64 = 1.1;

/// Runs it.
pub(crate) fn size(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    if args.sizes.iter().any(|size| *size <= args.working_set) {
        bail!("an image is larger than the {} MB of its working set", args.working_set);
    }
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let images = target().join("sluice-images/sizes");
    let work = target().join("sluice-bench/size");
    let containerd = Containerd::start(&work.join("containerd"))?;
    let names =
        args.sizes.iter().map(|size| make(&images, args.working_set, *size)).collect::<Result<Vec<_>>>()?;
    let benches = names.iter().map(|name| {
        let bench = Bench::new(
            (&binary, work.join(name), &containerd),
            (&images, name),
            (&args.rate, &args.delay),
            (&COMMAND, Some("ready")),
        )?;
        bench.index()?;
        Ok(bench)
    });
    let benches = benches.collect::<Result<Vec<_>>>()?;
    let mut starts = vec![Vec::new(); benches.len()];
    // In turn, so that what else the machine does meets all alike.
    for _ in 0..args.rounds {
        for (bench, starts) in benches.iter().zip(&mut starts) {
            starts.push(bench.start(Way::Streamed)?);
        }
    }
    println!("{:>8} {:>14} {:>8} {:>11}", "image MB", "working set MB", "ready s", "fetched MB");
    let mut ready = Vec::new();
    for (size, starts) in args.sizes.iter().zip(&starts) {
        let median_ready = median(starts.iter().map(|start| start.ready_s).collect());
        let fetched = median(starts.iter().map(|start| start.bytes as f64).collect()) / 1e6;
        println!("{size:>8} {:>14} {median_ready:>8.2} {fetched:>11.1}", args.working_set);
        ready.push(median_ready);
    }
    let slowest = ready.iter().copied().fold(f64::NAN, f64::max);
    let ratio = slowest / ready.iter().copied().fold(f64::NAN, f64::min);
    let verdict = if ratio <= TARGET { "met" } else { "NOT MET" };
    println!("slowest to fastest {ratio:.2}: {verdict} (target <= {TARGET})");
    Ok(())
}

/// Makes an image that compresses to `size` MB, if it is not there; its name.
fn make(images: &Path, working_set: u64, size: u64) -> Result<String> {
    let name = format!("set{working_set}-of-{size}");
    if images.join(&name).join("index.json").exists() {
        return Ok(name);
    }
    println!("making an image of {size} MB");
    let tree = images.join(format!(".tree-{name}"));
    let bin = tree.join("bin");
    fs::create_dir_all(&bin)?;
    fs::copy("/bin/busybox", bin.join("busybox")).context("busybox-static")?;
    for program in ["sh", "cat"] {
        std::os::unix::fs::symlink("busybox", bin.join(program)).or_else(|error| {
            if error.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
        })?;
    }
    // What does not compress: a MB of it is one of the image's.
    let fill = |dir: &str, mb: u64| {
        let text = format!(
            "mkdir -p \"$1\"; cd \"$1\"; head -c {} /dev/urandom | split -b {FILE} -a 4 -d - file",
            mb * 1_000_000
        );
        script(&text, &[&tree.join(dir)])
    };
    fill("work", working_set)?;
    fill("rest", size - working_set)?;
    // The rest has a layer of its own, of which nothing is read.
    let layers: [&[&str]; 2] = [&["rest"], &["bin", "work"]];
    let made = image_maker::pack_members(images, &name, &tree, &layers);
    fs::remove_dir_all(&tree)?;
    made.map(|()| name)
}
