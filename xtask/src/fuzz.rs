//! `cargo xtask fuzz`: runs the fuzz targets of `agent/fuzz`, built by the pinned compiler.
//!
//! libFuzzer and the compiler's own coverage passes are all it takes. The latter count as unstable, so the compiler is asked for what
//! only nightly ones allow by default, as it is for the eBPF programs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{output, target, top};

/// Options of the fuzzing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long each target runs
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// How many run at once
    #[arg(long, default_value_t = 2)]
    at_once: usize,
    /// Only this target
    target: Option<String>,
}

/// Coverage as cargo-fuzz asks for it; checks that a release leaves out.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";
/// Slowest answer and largest memory of one input.
const LIMITS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=2048"];

/// Builds and runs; an error if anything was found.
pub(crate) fn fuzz(args: &Args) -> Result<()> {
    packages::install(&packages::FUZZ)?;
    let binary = build()?;
    let mut names = targets()?;
    if let Some(only) = &args.target {
        names.retain(|name| name == only);
    }
    if names.is_empty() {
        bail!("there is no such target; there are {}", targets()?.join(", "));
    }
    let mut found = Vec::new();
    for some in names.chunks(args.at_once.max(1)) {
        let running = some
            .iter()
            .map(|name| Run::start(&binary, name, args.minutes).map(|run| (name, run)))
            .collect::<Result<Vec<_>>>()?;
        for (name, run) in running {
            let ended = run.end()?;
            println!("fuzz: {name:<13} {ended}");
            found.extend(ended.finding.map(|path| format!("{name}: {path}")));
        }
    }
    if !found.is_empty() {
        bail!("found what no input may do:\n{}", found.join("\n"));
    }
    Ok(())
}

/// Names of the targets: one module each.
fn targets() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(top().join("agent/fuzz/src/targets"))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
        names.extend(name.filter(|name| name != "mod"));
    }
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let room = target().join("fuzz");
    // For a named target the flags do not reach build scripts and macros.
    output(
        Command::new("cargo")
            .args(["build", "--locked", "--release", "--package", "sluice-fuzz", "--features", "libfuzzer"])
            .args(["--bin", "fuzz", "--target", &triple])
            .current_dir(top())
            .env("CARGO_TARGET_DIR", &room)
            .env("RUSTFLAGS", FLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTC_BOOTSTRAP", "1"),
    )
    .context("cannot build the fuzz targets")?;
    Ok(room.join(triple).join("release/fuzz"))
}

/// A target that runs.
struct Run {
    child: Child,
    log: PathBuf,
    artifacts: PathBuf,
    began: Instant,
}

/// How it ended.
struct Ended {
    executions: String,
    took: Duration,
    finding: Option<String>,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = self.finding.as_deref().unwrap_or("nothing found");
        write!(formatter, "{} executions in {:.0} s: {verdict}", self.executions, self.took.as_secs_f64())
    }
}

impl Run {
    fn start(binary: &Path, name: &str, minutes: f64) -> Result<Self> {
        let room = target().join("fuzz");
        let (corpus, artifacts) = (room.join("corpus").join(name), room.join("artifacts").join(name));
        for dir in [&corpus, &artifacts] {
            std::fs::create_dir_all(dir)?;
        }
        let log = room.join(format!("{name}.log"));
        // As in the product, whose runtime sees to it: a pipe that nobody reads is an error, and no signal.
        let child = Command::new("sh")
            .args(["-c", "trap '' PIPE; exec nice -n 15 \"$@\"", "sh"])
            .arg(binary)
            .env("SLUICE_FUZZ_TARGET", name)
            .args([corpus, top().join("agent/fuzz/seeds").join(name)].iter().filter(|dir| dir.exists()))
            .arg(format!("-max_total_time={:.0}", (minutes * 60.0).max(1.0)))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(LIMITS)
            .arg("-print_final_stats=1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start the target {name}"))?;
        Ok(Self { child, log, artifacts, began: Instant::now() })
    }

    fn end(mut self) -> Result<Ended> {
        let status = self.child.wait()?;
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        let executions = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let finding = (!status.success()).then(|| {
            let last = said.lines().find(|line| line.contains("panicked at") || line.contains("ERROR:"));
            let (log, kept) = (self.log.display(), self.artifacts.display());
            let last = last.map_or_else(|| status.to_string(), str::to_owned);
            format!("FOUND {last} (input in {kept}, log in {log})")
        });
        let executions = executions.unwrap_or("?").trim().to_owned();
        Ok(Ended { executions, took: self.began.elapsed(), finding })
    }
}
