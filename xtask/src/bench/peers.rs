//! `cargo xtask bench peers`: lazy loaders of others beside `sluice mount`, from nothing local to the end of a command in the image's
//! root, taking turns. A peer that is no Debian package is given by the paths of its programs; the stargz snapshotter, which needs a
//! containerd, is measured by `bench cri --stargz`.

mod nydus;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use self::nydus::Nydus;
use crate::measure::median;
use crate::run::{output, script, target};
use crate::sluice::{Registry, Sluice};
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

/// One start: seconds until the root was there, and until the command had ended; bytes that the registry sent.
#[derive(Debug, Clone, Copy)]
struct Start {
    mounted: f64,
    ended: f64,
    bytes: u64,
}

/// Runs it all.
pub(crate) fn peers(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let nydus = args.nydusd.as_deref().zip(args.nydus_image.as_deref());
    if nydus.is_none() {
        println!("nydus is LEFT OUT: no --nydusd and --nydus-image");
    }
    let work = target().join("sluice-bench/peers");
    let (layouts, root) = (work.join("layouts"), work.join("root"));
    script("rm -rf \"$1\"; mkdir -p \"$1\" \"$2\"", &[&layouts, &root])?;
    println!("{:<8} {:<10} {:>9} {:>9} {:>11}", "image", "way", "mounted s", "ended s", "fetched MB");
    for name in &args.images {
        let recipe = image_maker::recipe(name)?;
        let image = image_maker::make(recipe)?.join(recipe.name);
        script("cp -al \"$1\" \"$2\"", &[&image, &layouts.join(recipe.name)])?;
        let converted = nydus
            .map(|(daemon, converter)| {
                Nydus::convert((daemon, converter), &image, &layouts, recipe.name, &work)
            })
            .transpose()?;
        let registry = Registry::start(&binary, &layouts, &args.rate, &args.delay)?;
        let reference = registry.image(recipe.name);
        Sluice::new(&binary, &work.join("index"), "")?.run(&["index", &reference])?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let agent = Sluice::new(&binary, &work.join("agent"), "[prefetch]\nenabled = false\n")?;
            agent.start_daemon()?;
            let mounted = work.join("sluice");
            std::fs::create_dir_all(&mounted)?;
            let target = mounted.to_string_lossy().into_owned();
            let mount = || agent.run(&["mount", &reference, &target]).map(|_| ());
            ours.push(measure(&registry, mount, &mounted, &root, recipe.command)?);
            agent.run(&["umount", &target])?;
            if let Some(nydus) = &converted {
                let mut daemon = None;
                let mount = || nydus.mount(&registry.image("")).map(|started| daemon = Some(started));
                theirs.push(measure(&registry, mount, &nydus.mounted(), &root, recipe.command)?);
                drop(daemon);
            }
        }
        for (way, starts) in [("sluice", &ours), ("nydus", &theirs)] {
            if starts.is_empty() {
                continue;
            }
            let middle = |of: fn(&Start) -> f64| median(starts.iter().map(of).collect());
            println!(
                "{name:<8} {way:<10} {:>9.2} {:>9.2} {:>11.1}",
                middle(|start| start.mounted),
                middle(|start| start.ended),
                middle(|start| start.bytes as f64) / 1e6
            );
        }
    }
    Ok(())
}

/// From cold caches: mounts, and runs the command in a writable overlay on that. The overlay is unmounted before this returns.
fn measure(
    registry: &Registry,
    mount: impl FnOnce() -> Result<()>,
    lower: &Path,
    root: &Path,
    command: &[&str],
) -> Result<Start> {
    script("sync; echo 3 > /proc/sys/vm/drop_caches", &[])?;
    registry.reset()?;
    let began = Instant::now();
    mount()?;
    let mounted = began.elapsed().as_secs_f64();
    // As a runtime would, without one: its time is the same for all.
    let run = "mount -t tmpfs none \"$1\"; mkdir \"$1/upper\" \"$1/work\" \"$1/root\"
        mount -t overlay -o \"lowerdir=$2,upperdir=$1/upper,workdir=$1/work\" none \"$1/root\"
        mount -t proc none \"$1/root/proc\"; mount --bind /dev \"$1/root/dev\"
        root=$1; shift 2; exec chroot \"$root/root\" \"$@\"";
    // In a namespace of its own: what it mounts goes with it.
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "sh", "-euc", run, "sh"]).arg(root).arg(lower).args(command);
    let said = output(&mut inside)?;
    let ended = began.elapsed().as_secs_f64();
    if !said.contains("ready") {
        bail!("the command said `{said}`");
    }
    let bytes = registry.bytes_sent().context("the registry does not count")?;
    Ok(Start { mounted, ended, bytes })
}
