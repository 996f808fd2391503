//! `cargo xtask bench probes`: what recording costs a storm of opens, stats and programs started, in a streamed container and outside:
//! recorded, with the probes loaded but nothing recorded, and without probes, taking turns.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
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
    /// Times the daemon is started again
    #[arg(long, default_value_t = 40)]
    rounds: usize,
    /// An existing binary of sluice instead of a release build of this tree
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// For each line that it is told, prints how long a storm takes of three, all that it touches being cached.
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
print(flush=True)
for _ in sys.stdin:
    begin = time.monotonic()
    for _ in range(3):
        storm()
    print((time.monotonic() - begin) / 3, flush=True)
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

/// Of so many rounds one looks for losses, too.
const FLOODED: usize = 5;

/// Runs it.
pub(crate) fn probes(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let recipe = image_maker::recipe("medium")?;
    let images = image_maker::make(recipe)?;
    let registry = Registry::start(&binary, &images, "10gbit", "0ms")?;
    let node = Sluice::new(&binary, &target().join("sluice-bench/probes"), &Daemon::Records.config())?;
    let image = registry.image(recipe.name);
    node.run(&["pull", &image])?;
    // The same processes storm all the time, a moment recorded and a moment not: two that do the same differ by more than what is
    // measured here, and so does one of them from second to second. A container does not mind that the daemon is started again.
    start(&node, Daemon::WithoutProbes)?;
    let mut inside = Storms::start(node.command().args(["run", &image, "python3", "-c", STORM]))?;
    let mut outside = Storms::start(Command::new("/usr/bin/python3").args(["-c", STORM]))?;
    let both = |inside: &mut Storms, outside: &mut Storms| anyhow::Ok([inside.turn()?, outside.turn()?]);
    // Recorded beside not recorded, and both beside no probes.
    let (mut recorded, mut recorded_none, mut loaded_none) = <([_; 2], [_; 2], [_; 2])>::default();
    let (mut lost, mut rate, mut counted, mut storms) = (0.0, 0.0_f64, Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let mut took = [[0.0; 2]; 3];
        // Back and forth: the machine's own changes take no side.
        let mut order = Daemon::ALL;
        if round % 2 == 1 {
            order.reverse();
        }
        for daemon in order {
            // Programs stay attached for a while after a recording: only a new daemon has none.
            start(&node, daemon)?;
            // What is recorded is the start of another container of the image: what is seen is what the image's files suffer.
            let other = Storms::start(node.command().args(["run", &image, "sh", "-c", "echo; read end"]))?;
            took[daemon as usize] = both(&mut inside, &mut outside)?;
            if daemon == Daemon::Records && round % FLOODED == 0 {
                counted.push(own_percent(&node, || inside.turn())?);
                rate = rate.max(number(node.command().args(["run", &image, "python3", "-c", FLOOD]))?);
                lost += records_lost(&node)?;
            }
            other.end()?;
        }
        let [none, loaded, during] = took;
        ratios(&mut recorded, during, loaded);
        ratios(&mut recorded_none, during, none);
        ratios(&mut loaded_none, loaded, none);
        storms.push(loaded[0]);
    }
    inside.end()?;
    outside.end()?;
    let [recorded, recorded_outside] = recorded.map(More::of);
    let verdict = |met: bool| if met { "met:" } else { "NOT MET:" };
    println!(
        "in a streamed container, storms of {:.3} s: {recorded} when recorded  {} <= {TARGET_PERCENT} %",
        median(storms),
        verdict(recorded.percent <= TARGET_PERCENT)
    );
    println!("outside meanwhile: {recorded_outside}");
    println!("by the kernel's count the programs take {:.1} % of its time", median(counted));
    let ([inside, outside], [inside_idle, outside_idle]) =
        (recorded_none.map(More::of), loaded_none.map(More::of));
    println!("beside a daemon without probes: {inside} when recorded, {inside_idle} when not");
    println!(
        "outside, beside no probes: {outside} while a container is recorded, {outside_idle} while none is"
    );
    println!(
        "up to {rate:.0} opens a second; records lost: {lost}  {} none at {OPENS:.0}",
        verdict(lost == 0.0 && rate >= OPENS)
    );
    Ok(())
}

/// How much more of something there is.
#[derive(Debug, Clone, Copy)]
struct More {
    percent: f64,
    /// Standard error of that.
    error: f64,
}

impl More {
    /// The median of ratios, whose error is taken from their quartiles as of a normal distribution.
    fn of(ratios: Vec<f64>) -> Self {
        let mut more: Vec<f64> = ratios.iter().map(|ratio| (ratio - 1.0) * 100.0).collect();
        more.sort_by(f64::total_cmp);
        let quartile = |which: usize| more.get(more.len() * which / 4).copied().unwrap_or(f64::NAN);
        let deviation = (quartile(3) - quartile(1)) / 1.349;
        Self { percent: median(more.clone()), error: 1.253 * deviation / (more.len() as f64).sqrt() }
    }
}

/// Adds how long the storms `during` something took, inside and outside, beside those `before` it.
fn ratios(to: &mut [Vec<f64>; 2], during: [f64; 2], before: [f64; 2]) {
    for (to, (during, before)) in to.iter_mut().zip(during.iter().zip(before)) {
        to.push(during / before);
    }
}

impl std::fmt::Display for More {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:+.1} ± {:.1} %", self.percent, self.error)
    }
}

/// A process that does something for each line that it is told and says a line then, and one when it has begun.
#[derive(Debug)]
struct Storms {
    child: Child,
    tell: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Storms {
    fn start(command: &mut Command) -> Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let (tell, said) = child.stdin.take().zip(child.stdout.take()).context("no pipes")?;
        let mut storms = Self { child, tell, said: BufReader::new(said) };
        storms.line().map(|_| storms)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.said.read_line(&mut line)? == 0 {
            bail!("a storm ended before its time: {:?}", self.child.wait()?);
        }
        Ok(line)
    }

    /// Seconds that a storm took.
    fn turn(&mut self) -> Result<f64> {
        self.tell.write_all(b"\n")?;
        let said = self.line()?;
        said.trim().parse().with_context(|| format!("it said `{said}`"))
    }

    fn end(self) -> Result<()> {
        let Self { mut child, tell, .. } = self;
        drop(tell);
        child.wait().map(|_| ()).context("cannot wait for a storm's end")
    }
}

/// What the daemon does while storms are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Daemon {
    WithoutProbes,
    RecordsNothing,
    Records,
}

impl Daemon {
    const ALL: [Self; 3] = [Self::WithoutProbes, Self::RecordsNothing, Self::Records];

    fn config(self) -> String {
        let (probes, record) = (self != Self::WithoutProbes, self == Self::Records);
        format!("[probes]\nenabled = {probes}\n[prefetch]\nenabled = false\nrecord = {record}\n")
    }
}

/// Starts another daemon; its probes are loaded then.
fn start(node: &Sluice, daemon: Daemon) -> Result<()> {
    node.run(&["stop"])?;
    fs::write(node.path("config.toml"), daemon.config())?;
    let log = node.path("state/daemon.log");
    let loads = || Ok::<_, anyhow::Error>(fs::read_to_string(&log)?.matches(LOADED).count());
    let before = loads()?;
    node.start_daemon()?;
    let began = Instant::now();
    while daemon != Daemon::WithoutProbes && loads()? == before {
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
