//! `cargo xtask bench probes`: what recording costs a storm of opens, stats and programs started, in a streamed container and outside:
//! recorded, with the probes loaded but nothing recorded, and without probes, taking turns.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

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

/// Prints how long the storm took when all it touches is cached.
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
print(time.monotonic() - begin)
"#;
/// Prints how many files a second it opens when it does nothing else.
const FLOOD: &str = r#"
import os, time
paths = [os.path.join(top, name) for top, _, names in os.walk("/usr/lib") for name in names][:3000]
begin = time.monotonic()
for _ in range(11):
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))
        except OSError:
            pass
print(11 * len(paths) / (time.monotonic() - begin))
"#;
/// More of its time than this recording may not cost.
const TARGET_PERCENT: f64 = 2.0;
/// At so many opens a second nothing may be lost.
const OPENS: f64 = 50_000.0;
const LOADED: &str = "probes are loaded";

/// How a daemon runs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Recording,
    /// Probes are loaded: those for failed calls are attached.
    Loaded,
    None,
}

const MODES: [Mode; 3] = [Mode::Recording, Mode::Loaded, Mode::None];

/// Runs it.
pub(crate) fn probes(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let recipe = image_maker::recipe("medium")?;
    let images = image_maker::make(recipe)?;
    let registry = Registry::start(&binary, &images, "10gbit", "0ms")?;
    let node = Sluice::new(&binary, &target().join("sluice-bench/probes"), &config(Mode::Recording))?;
    let image = registry.image(recipe.name);
    node.run(&["pull", &image])?;
    let inside = |script| number(node.command().args(["run", &image, "python3", "-c", script]));
    let outside = || number(Command::new("/usr/bin/python3").args(["-c", STORM]));
    let mut times = [const { (Vec::new(), Vec::new()) }; MODES.len()];
    let (mut lost, mut rate, mut counted) = (0.0, 0.0_f64, Vec::new());
    for round in 0..args.rounds {
        // Whoever comes first has the colder caches.
        for turn in 0..MODES.len() {
            let which = (round + turn) % MODES.len();
            let mode = MODES[which];
            start(&node, mode)?;
            times[which].0.push(inside(STORM)?);
            times[which].1.push(outside()?);
            if mode == Mode::Recording {
                rate = rate.max(inside(FLOOD)?);
                counted.push(own_percent(&node, || inside(STORM))?);
                lost += records_lost(&node)?;
            }
        }
    }
    let [recording, loaded, none] = times;
    // Of what was measured one after the other, since the machine is not always as fast.
    let more = |one: &[f64], than: &[f64]| {
        (median(one.iter().zip(than).map(|(one, than)| one / than).collect()) - 1.0) * 100.0
    };
    let verdict = |met: bool| if met { "met:" } else { "NOT MET:" };
    let cost = more(&recording.0, &loaded.0);
    println!(
        "in a streamed container, storms of {:.3} s: {cost:+.1} % when recorded  {} <= {TARGET_PERCENT} %",
        median(loaded.0.clone()),
        verdict(cost <= TARGET_PERCENT)
    );
    println!(
        "by the kernel's count the programs take {:.1} % of all of its run, what is touched for the first time included",
        median(counted)
    );
    println!(
        "beside a daemon without probes: {:+.1} % when recorded, {:+.1} % when not",
        more(&recording.0, &none.0),
        more(&loaded.0, &none.0)
    );
    println!(
        "outside, beside no probes: {:+.1} % while a container is recorded, {:+.1} % while none is; two runs without probes differ by {:.1} %",
        more(&recording.1, &none.1),
        more(&loaded.1, &none.1),
        median(none.1.windows(2).map(|two| (two[0] / two[1] - 1.0).abs() * 100.0).collect())
    );
    println!(
        "up to {rate:.0} opens a second; records lost: {lost}  {} none at {OPENS:.0}",
        verdict(lost == 0.0 && rate >= OPENS)
    );
    Ok(())
}

fn config(mode: Mode) -> String {
    let (probes, record) = (mode != Mode::None, mode == Mode::Recording);
    format!("[probes]\nenabled = {probes}\n[prefetch]\nenabled = false\nrecord = {record}\n")
}

/// A daemon, with what it loads loaded.
fn start(node: &Sluice, mode: Mode) -> Result<()> {
    node.run(&["stop"])?;
    fs::write(node.path("config.toml"), config(mode))?;
    let log = node.path("state/daemon.log");
    let loads = || Ok::<_, anyhow::Error>(fs::read_to_string(&log)?.matches(LOADED).count());
    let before = loads()?;
    node.start_daemon()?;
    let began = Instant::now();
    while mode != Mode::None && loads()? == before {
        if began.elapsed() > Duration::from_secs(30) {
            bail!("the probes are not loaded: see {}", log.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn number(command: &mut Command) -> Result<f64> {
    let said = output(command)?;
    said.trim().parse().with_context(|| format!("it said `{said}`"))
}

/// How much of the time of `work` the daemon's programs took, as the kernel counts. Counting takes some more.
fn own_percent(node: &Sluice, work: impl FnOnce() -> Result<f64>) -> Result<f64> {
    let pid =
        node.status()?.get("pid").and_then(Value::as_u64).context("the daemon does not tell its process")?;
    let counts =
        |on: &str| fs::write("/proc/sys/kernel/bpf_stats_enabled", on).context("the kernel does not count");
    counts("1")?;
    let percent = || {
        let (before, began) = (run_ns(pid)?, Instant::now());
        work()?;
        let took = began.elapsed().as_nanos() as f64;
        anyhow::Ok(run_ns(pid)?.saturating_sub(before) as f64 / took * 100.0)
    };
    let percent = percent();
    // Also after a failure: all programs of the machine are counted.
    counts("0")?;
    percent
}

/// Nanoseconds that the programs of a process ran for while the kernel counted.
fn run_ns(pid: u64) -> Result<u64> {
    let mut by_program = HashMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be gone meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        // Links have the number of their program, and no time.
        if let (Some(id), Some(ns)) = (field("prog_id"), field("run_time_ns")) {
            by_program.insert(id, ns);
        }
    }
    Ok(by_program.values().sum())
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
