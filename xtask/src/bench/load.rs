//! `cargo xtask bench load`: many containers, a storm of starts, ten thousand blocked reads, and who suffers from a neighbour
//! that reads everything.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::measure::median;
use crate::run::{script, target};
use crate::sluice::{Registry, Sluice};
use crate::{image_maker, packages, sluice};

/// Options of the load.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images
    #[arg(long, default_value_t = 20)]
    images: usize,
    /// Containers that run together
    #[arg(long, default_value_t = 200)]
    containers: usize,
    /// Containers that are started within a second
    #[arg(long, default_value_t = 50)]
    storm: usize,
    /// Reads that wait at once for a registry that is away
    #[arg(long, default_value_t = 10_000)]
    reads: usize,
    /// Starts beside a neighbour that reads everything, and as many without
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The binary is built as for tests, not as a release
    #[arg(long)]
    debug: bool,
}

/// Memory a daemon may take at its peak.
const PEAK_TARGET: f64 = 80.0;
/// How much longer a start may take beside a neighbour that reads everything.
const FAIR_TARGET: f64 = 1.5;
/// What a container does: reads its data, says so, and stays.
const STAY: &str = "trap 'exit 0' TERM; cat /data/* > /dev/null; echo ready; sleep 1000 & wait";
const LEAVE: &str = "cat /data/* > /dev/null; echo ready";

/// Runs it all.
pub(crate) fn load(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = if args.debug { sluice::build_for_tests()? } else { sluice::build()? };
    let work = target().join("sluice-load");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let images = make_images(&work, args)?;
    let index_store = format!("file://{}", work.join("indexes").display());
    let config = format!("index_store = {index_store:?}\n[prefetch]\nenabled = false\nrecord = false\n");
    let registry = Registry::start(&binary, &work.join("layouts"), "1gbit", "2ms")?;
    let node = Sluice::new(&binary, &work.join("node"), &config)?;
    for name in &images {
        node.run(&["index", &registry.image(name)])?;
    }
    many(args, &node, &registry, &images)?;
    storm(args, &node, &registry, &images)?;
    fairness(args, &node, &registry)?;
    node.forget()?;
    drop(node);
    let config = format!("{config}[stream]\nfill = false\n");
    let node = Sluice::new(&binary, &work.join("node"), &config)?;
    blocked(args, &node, &registry)
}

/// Images of a shared base, each with data of its own; one of many small files, one that is large.
fn make_images(work: &Path, args: &Args) -> Result<Vec<String>> {
    let (trees, layouts) = (work.join("trees"), work.join("layouts"));
    let base = trees.join("base");
    script(
        "mkdir -p \"$1/bin\" \"$1/proc\" \"$1/dev\" \"$1/sys\" \"$1/tmp\" \"$2\"; cp /bin/busybox \"$1/bin/\"
         for name in sh cat echo sleep find; do ln -s busybox \"$1/bin/$name\"; done",
        &[&base, &layouts],
    )?;
    let make = |name: &str, files: usize, len: usize| -> Result<()> {
        let tree = trees.join(name);
        fs::create_dir_all(tree.join("data"))?;
        for file in 0..files {
            let seed = format!("{name}/{file}");
            fs::write(tree.join("data").join(file.to_string()), noise(&seed, len))?;
        }
        image_maker::named(&layouts, name, &[&base, &tree])
    };
    let mut names = Vec::new();
    for number in 0..args.images {
        let name = format!("load{number}");
        make(&name, 8, 256 << 10)?;
        names.push(name);
    }
    make("files", args.reads, 4096)?;
    make("large", 60, 1 << 20)?;
    let all = names.iter().cloned().chain(["files".to_owned(), "large".to_owned()]);
    Ok(all.collect())
}

/// Content that no compressor likes, by its name.
fn noise(name: &str, len: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    }) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A container that was started; it ends when this is dropped.
struct Container {
    child: Child,
}

impl Container {
    fn start(node: &Sluice, image: &str, script: &str) -> Result<Self> {
        let mut command = node.command();
        command.args(["run", image, "sh", "-c", script]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self { child: command.spawn().context("cannot start a container")? })
    }

    /// Waits until it says that it is ready.
    fn ready(&mut self) -> Result<()> {
        let stdout = self.child.stdout.take().context("is asked once")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() == "ready" {
            return Ok(());
        }
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            std::io::Read::read_to_string(&mut stderr, &mut said)?;
        }
        bail!("a container said `{line}`: {said}")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // SIGTERM, so that it takes the container along. One that ended before is what is wanted.
        drop(Command::new("kill").arg(self.child.id().to_string()).stderr(Stdio::null()).status());
        drop(self.child.wait());
    }
}

fn peak_mb(node: &Sluice) -> Result<f64> {
    let peak = node.status()?.get("resident_peak_bytes").and_then(Value::as_u64);
    Ok(peak.context("the daemon does not tell its memory")? as f64 / 1e6)
}

fn verdict(met: bool, what: &str) -> String {
    format!("{} {what}", if met { "met:" } else { "NOT MET:" })
}

/// Starts containers of all images and counts who gets ready; seconds until the last one was.
fn run_together(
    node: &Sluice,
    registry: &Registry,
    images: &[String],
    count: usize,
    script: &str,
) -> Result<(f64, f64, usize)> {
    let began = Instant::now();
    let mut containers = Vec::new();
    for number in 0..count {
        let name = images.get(number % (images.len() - 2)).context("no image")?;
        containers.push(Container::start(node, &registry.image(name), script)?);
    }
    let started = began.elapsed().as_secs_f64();
    let mut failed = 0;
    for container in &mut containers {
        if let Err(error) = container.ready() {
            eprintln!("{error:#}");
            failed += 1;
        }
    }
    let ready = began.elapsed().as_secs_f64();
    Ok((started, ready, failed))
}

fn many(args: &Args, node: &Sluice, registry: &Registry, images: &[String]) -> Result<()> {
    let (_, ready, failed) = run_together(node, registry, images, args.containers, STAY)?;
    let peak = peak_mb(node)?;
    println!(
        "{} containers of {} images: all ready after {ready:.1} s, {failed} failed; daemon's peak {peak:.1} MB  {}",
        args.containers,
        args.images,
        verdict(failed == 0 && peak <= PEAK_TARGET, "none failed, peak <= 80 MB")
    );
    Ok(())
}

fn storm(args: &Args, node: &Sluice, registry: &Registry, images: &[String]) -> Result<()> {
    node.forget()?;
    node.start_daemon()?;
    let (started, ready, failed) = run_together(node, registry, images, args.storm, LEAVE)?;
    println!(
        "{} starts within {started:.2} s, nothing local: all ready after {ready:.1} s, {failed} failed; daemon's peak {:.1} MB  {}",
        args.storm,
        peak_mb(node)?,
        verdict(failed == 0, "none failed")
    );
    Ok(())
}

/// Starts of one image, nothing of it local, alone and beside a container that reads all of another.
fn fairness(args: &Args, node: &Sluice, registry: &Registry) -> Result<()> {
    let once = |beside: bool| -> Result<f64> {
        node.forget()?;
        node.start_daemon()?;
        let scanner = if beside {
            let script = "trap 'exit 0' TERM; echo ready; find / -xdev -type f > /dev/null; while true; do cat /data/* > /dev/null; done";
            let mut scanner = Container::start(node, &registry.image("large"), script)?;
            scanner.ready()?;
            Some(scanner)
        } else {
            None
        };
        let began = Instant::now();
        Container::start(node, &registry.image("load0"), LEAVE)?.ready()?;
        let took = began.elapsed().as_secs_f64();
        drop(scanner);
        Ok(took)
    };
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        alone.push(once(false)?);
        beside.push(once(true)?);
    }
    let (alone, beside) = (median(alone), median(beside));
    println!(
        "a start beside a container that reads 60 MB of another image: {beside:.2} s, alone {alone:.2} s: {:.2} x  {}",
        beside / alone,
        verdict(beside / alone <= FAIR_TARGET, "<= 1.5 x")
    );
    Ok(())
}

/// Reads of as many files at once while the registry is away; all of them end well once it is back.
fn blocked(args: &Args, node: &Sluice, registry: &Registry) -> Result<()> {
    let dir: PathBuf = target().join("sluice-load/mount");
    fs::create_dir_all(&dir)?;
    node.run(&["mount", &registry.image("files"), &dir.to_string_lossy()])?;
    let (done, wrong) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut waited = (0, 0.0);
    let took = std::thread::scope(|scope| -> Result<f64> {
        let outage = scope.spawn(|| registry.outage(Duration::from_secs(20)));
        std::thread::sleep(Duration::from_millis(200));
        for file in 0..args.reads {
            let (dir, done, wrong) = (&dir, &done, &wrong);
            let read = move || {
                let read = fs::read(dir.join("data").join(file.to_string()));
                let right = read.is_ok_and(|bytes| bytes == noise(&format!("files/{file}"), 4096));
                if !right {
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
                done.fetch_add(1, Ordering::Relaxed);
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, read)?;
        }
        // All are there, and few can have been answered.
        std::thread::sleep(Duration::from_secs(2));
        waited = (args.reads as u64 - done.load(Ordering::Relaxed), peak_mb(node)?);
        outage.join().map_err(|_panic| anyhow::anyhow!("the outage failed"))??;
        let back = Instant::now();
        while done.load(Ordering::Relaxed) < args.reads as u64 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(back.elapsed().as_secs_f64())
    })?;
    let (waiting, peak_waiting) = waited;
    let wrong = wrong.load(Ordering::Relaxed);
    println!(
        "{waiting} of {} reads blocked while the registry was away (daemon's peak {peak_waiting:.1} MB); all answered {took:.1} s after it came back, {wrong} failed or wrong; daemon's peak {:.1} MB  {}",
        args.reads,
        peak_mb(node)?,
        verdict(wrong == 0, "none failed")
    );
    node.run(&["umount", &dir.to_string_lossy()]).map(|_| ())
}
