//! `cargo xtask bench probes`: what recording costs a storm of opens, stats and programs started, in a streamed container and outside:
//! recorded, with the probes loaded but nothing recorded, and without probes, taking turns.

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

/// Prints how long the storm took when all it touches is cached, and how many files a second it opens when it does nothing else.
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
took = time.monotonic() - begin
begin = time.monotonic()
for _ in range(10):
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))
        except OSError:
            pass
print(took, 10 * len(paths) / (time.monotonic() - begin))
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
    let inside = || storm(node.command().args(["run", &image, "python3", "-c", STORM]));
    let outside = || storm(Command::new("/usr/bin/python3").args(["-c", STORM]));
    let mut times = [const { (Vec::new(), Vec::new()) }; MODES.len()];
    let (mut lost, mut rate) = (0.0, 0.0_f64);
    for round in 0..args.rounds {
        // Whoever comes first has the colder caches.
        for turn in 0..MODES.len() {
            let which = (round + turn) % MODES.len();
            let mode = MODES[which];
            start(&node, mode)?;
            let (of_container, opens) = inside()?;
            let (of_system, _) = outside()?;
            times[which].0.push(of_container);
            times[which].1.push(of_system);
            if mode == Mode::Recording {
                lost += records_lost(&node)?;
                rate = rate.max(opens);
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
