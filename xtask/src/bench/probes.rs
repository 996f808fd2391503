//! `cargo xtask bench probes`: what recording costs a storm of opens, stats and programs started, in a streamed container and outside,
//! with the probes loaded and without, taking turns.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::measure::median;
use crate::run::{output, target};
use crate::sluice::{Registry, Sluice};
use crate::{image_maker, packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Storms of each kind
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// An existing binary of sluice instead of a release build of this tree
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Prints how long the storm took, and how many files it opened, when all it touches is cached.
const STORM: &str = r#"
import os, subprocess, sys, time
paths = [os.path.join(top, name) for top, _, names in os.walk("/usr/lib") for name in names][:3000]
def storm():
    for path in paths:
        try:
            os.stat(path)
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            os.read(file, 100)
            os.close(file)
        except OSError:
            pass
    for _ in range(20):
        subprocess.run([sys.executable, "-S", "-c", ""])
storm()
begin = time.monotonic()
for _ in range(5):
    storm()
print(time.monotonic() - begin, 5 * len(paths))
"#;
/// More of its time than this recording may not cost.
const TARGET: f64 = 0.02;
const LOADED: &str = "probes are loaded";

/// Runs it.
pub(crate) fn probes(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let recipe = image_maker::recipe("medium")?;
    let images = image_maker::make(recipe)?;
    let registry = Registry::start(&binary, &images, "10gbit", "0ms")?;
    let node = Sluice::new(&binary, &target().join("sluice-bench/probes"), &config(true))?;
    let image = registry.image(recipe.name);
    node.run(&["pull", &image])?;
    let inside = || storm(node.command().args(["run", &image, "python3", "-c", STORM]));
    let outside = || storm(Command::new("/usr/bin/python3").args(["-c", STORM]));
    let mut times = [const { Vec::new() }; 4];
    let (mut lost, mut rate) = (0.0, 0.0_f64);
    for round in 0..args.rounds {
        // Whoever comes first has the colder caches.
        for on in [round % 2 == 0, round % 2 != 0] {
            start(&node, on)?;
            let (of_container, opens) = inside()?;
            let (of_system, _) = outside()?;
            let [on_inside, off_inside, on_outside, off_outside] = &mut times;
            let (inside, outside) = if on { (on_inside, on_outside) } else { (off_inside, off_outside) };
            inside.push(of_container);
            outside.push(of_system);
            if on {
                lost += records_lost(&node)?;
                rate = rate.max(opens / of_container);
            }
        }
    }
    let [on_inside, off_inside, on_outside, off_outside] = times.map(median);
    let cost = on_inside / off_inside - 1.0;
    let verdict = if cost <= TARGET { "met:" } else { "NOT MET:" };
    println!(
        "in a streamed container: {on_inside:.3} s recorded, {off_inside:.3} s without probes: {:+.1} %  {verdict} <= 2 %",
        cost * 100.0
    );
    println!(
        "outside:                 {on_outside:.3} s with probes, {off_outside:.3} s without: {:+.1} %",
        (on_outside / off_outside - 1.0) * 100.0
    );
    println!("up to {rate:.0} opens a second beside the programs started; records lost: {lost}");
    Ok(())
}

fn config(probes: bool) -> String {
    format!("[probes]\nenabled = {probes}\n[prefetch]\nenabled = false\n")
}

/// A daemon with the probes loaded, or without.
fn start(node: &Sluice, probes: bool) -> Result<()> {
    node.run(&["stop"])?;
    fs::write(node.path("config.toml"), config(probes))?;
    let log = node.path("state/daemon.log");
    let loads = || Ok::<_, anyhow::Error>(fs::read_to_string(&log)?.matches(LOADED).count());
    let before = loads()?;
    node.start_daemon()?;
    let began = Instant::now();
    while probes && loads()? == before {
        if began.elapsed() > Duration::from_secs(30) {
            bail!("the probes are not loaded: see {}", log.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn storm(command: &mut Command) -> Result<(f64, f64)> {
    let said = output(command)?;
    let mut numbers = said.split_whitespace().map(str::parse::<f64>);
    let mut next = || numbers.next().and_then(Result::ok).with_context(|| format!("it said `{said}`"));
    Ok((next()?, next()?))
}

/// As the daemon's metrics tell, once the trace is written.
fn records_lost(node: &Sluice) -> Result<f64> {
    std::thread::sleep(Duration::from_secs(1));
    let mut socket = UnixStream::connect(node.path("state/sluice.sock"))?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut said = String::new();
    socket.read_to_string(&mut said)?;
    let line = said.lines().find_map(|line| line.strip_prefix("sluice_trace_records_lost_total "));
    Ok(line.context("the daemon does not tell how many records were lost")?.trim().parse()?)
}
