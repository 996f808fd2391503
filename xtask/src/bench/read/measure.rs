//! Kinds of access, each timed untouched and in the page cache.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::places::Place;
use super::tree::{Noise, Tree};
use crate::measure::median;
use crate::run::output;

const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;
/// One random read for so many pages.
const PAGES_PER_READ: u64 = 16;
/// Passes through what is in the page cache; the middle one counts.
const WARM_PASSES: usize = 3;
/// Touches a byte of each page of mapped files, and says how long that took.
const MAP: &str = "
import mmap, sys, time
start = time.monotonic()
for path in sys.argv[1:]:
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapped[::4096]
print(time.monotonic() - start)
";

/// Drops the cached pages of the files whose paths come in.
const FORGET: &str = "
import os, sys
for path in sys.stdin:
    descriptor = os.open(path[:-1], os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
";

/// What is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Nothing of the place.
    Untouched,
    /// All that is read.
    Warm,
}

impl State {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Warm => "in the page cache",
        }
    }
}

/// A kind of access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// 1 MiB at a time, one file after the other.
    Sequential,
    /// The same, a thread for each of 16 files.
    Parallel,
    /// 4 KiB at random, one thread.
    Random,
    /// The same, eight threads.
    Random8,
    /// A byte of each page of mapped files.
    Map,
    /// Open, read and close small files in directory order.
    Small,
    /// `lstat` of them.
    Stat,
    /// `find` over all entries.
    Find,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::Sequential,
        Self::Parallel,
        Self::Random,
        Self::Random8,
        Self::Map,
        Self::Small,
        Self::Stat,
        Self::Find,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Parallel => "16 readers",
            Self::Random => "random",
            Self::Random8 => "random x8",
            Self::Map => "mmap",
            Self::Small => "small files",
            Self::Stat => "stat",
            Self::Find => "find",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Sequential | Self::Parallel | Self::Map => "MB/s",
            Self::Random | Self::Random8 => "4K/s",
            Self::Small | Self::Stat => "us each",
            Self::Find => "ms",
        }
    }

    pub(crate) fn more_is_better(self) -> bool {
        !matches!(self, Self::Small | Self::Stat | Self::Find)
    }
}

/// One measurement.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) place: usize,
    pub(crate) state: State,
    pub(crate) kind: Kind,
    pub(crate) value: f64,
    pub(crate) cpu_s_per_gib: Option<f64>,
}

/// Both states of one kind at place number `number`.
pub(crate) fn measure(number: usize, place: &Place, tree: &Tree, kind: Kind) -> Result<[Sample; 2]> {
    cool(place, tree)?;
    let used = cpu_time(&place.processes)?;
    let first = pass(place, tree, kind)?;
    // Of threads that are there now: one that ended meanwhile took with it what it had used before, too.
    let used = |(thread, time): (&PathBuf, &u64)| time.saturating_sub(*used.get(thread).unwrap_or(&0));
    let cpu = cpu_time(&place.processes)?.iter().map(used).sum::<u64>() as f64 / 1e9;
    let gib = first.bytes as f64 / f64::from(1 << 30);
    let counts = !place.processes.is_empty() && first.bytes > 0;
    let warm = (0..WARM_PASSES).map(|_| Ok(pass(place, tree, kind)?.value)).collect::<Result<_>>()?;
    let sample = |state, value| Sample { place: number, state, kind, value, cpu_s_per_gib: None };
    Ok([
        Sample { cpu_s_per_gib: counts.then(|| cpu / gib), ..sample(State::Untouched, first.value) },
        sample(State::Warm, median(warm)),
    ])
}

struct Pass {
    value: f64,
    bytes: u64,
}

fn pass(place: &Place, tree: &Tree, kind: Kind) -> Result<Pass> {
    let at = |paths: &[PathBuf]| -> Vec<PathBuf> { paths.iter().map(|path| place.root.join(path)).collect() };
    let (large, small) = (at(&tree.large), at(&tree.small));
    let start = Instant::now();
    let bytes = match kind {
        Kind::Sequential => read_each(&large)?,
        Kind::Parallel => in_threads(&large.chunks(1).collect::<Vec<_>>(), read_each)?,
        Kind::Random => random(&large, tree.large_bytes, 0)?,
        Kind::Random8 => {
            let threads: Vec<u64> = (1..9).collect();
            in_threads(&threads.chunks(1).collect::<Vec<_>>(), |thread| {
                random(&large, tree.large_bytes, thread.first().copied().unwrap_or_default())
            })?
        }
        Kind::Map => {
            let said = output(Command::new("python3").args(["-c", MAP]).args(&large))?;
            let seconds: f64 = said.trim().parse().context("the reader of mapped files is not understood")?;
            let bytes = tree.large_bytes * large.len() as u64;
            return Ok(Pass { value: bytes as f64 / seconds / 1e6, bytes });
        }
        Kind::Small => read_each(&small)?,
        Kind::Stat => small.iter().try_fold(0, |_, path| fs::symlink_metadata(path).map(|_| 0))?,
        Kind::Find => output(Command::new("find").arg(&place.root).args(["-name", "none"])).map(|_| 0)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let value = match kind {
        Kind::Sequential | Kind::Parallel | Kind::Map => bytes as f64 / seconds / 1e6,
        Kind::Random | Kind::Random8 => (bytes / PAGE) as f64 / seconds,
        Kind::Small | Kind::Stat => seconds * 1e6 / small.len() as f64,
        Kind::Find => seconds * 1e3,
    };
    Ok(Pass { value, bytes })
}

/// Takes the files out of the page cache, and the layer store's into it. Names and inodes stay: what is dropped is content.
fn cool(place: &Place, tree: &Tree) -> Result<()> {
    let read = tree.large.iter().chain(&tree.small).map(|path| place.root.join(path));
    let paths: Vec<_> = read.chain(place.cold.iter().cloned()).collect();
    let list: String = paths.iter().map(|path| format!("{}\n", path.display())).collect();
    let mut child = Command::new("python3").args(["-c", FORGET]).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("there is no pipe")?.write_all(list.as_bytes())?;
    ensure!(child.wait()?.success(), "the page cache cannot be emptied");
    read_each(&place.store).map(|_| ())
}

fn read_each(paths: &[PathBuf]) -> Result<u64> {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MIB]));
    BUFFER.with_borrow_mut(|buffer| {
        let mut all = 0;
        for path in paths {
            let mut file = open(path)?;
            loop {
                match file.read(buffer).with_context(|| format!("cannot read {}", path.display()))? {
                    0 => break,
                    got => all += got as u64,
                }
            }
        }
        Ok(all)
    })
}

/// Pages in an order that looks random, another for each `seed`; no page twice.
fn random(paths: &[PathBuf], file_bytes: u64, seed: u64) -> Result<u64> {
    let files: Vec<File> = paths.iter().map(|path| open(path)).collect::<Result<_>>()?;
    let per_file = file_bytes / PAGE;
    let pages = per_file * files.len() as u64;
    let mut noise = Noise(0x9E37_79B9 + seed);
    let (mut page, mut bytes) = ([0; PAGE as usize], 0);
    for stretch in 0..pages / PAGES_PER_READ / 2 {
        // One page out of each stretch, and stretches far apart: nothing looks like a sequence.
        let stretch = stretch * 7919 % (pages / PAGES_PER_READ);
        let place = stretch * PAGES_PER_READ + noise.next() % PAGES_PER_READ;
        if let Some(file) = files.get((place / per_file) as usize) {
            file.read_exact_at(&mut page, place % per_file * PAGE)?;
            bytes += PAGE;
        }
    }
    Ok(bytes)
}

fn in_threads<T: Sync>(work: &[&[T]], run: impl Fn(&[T]) -> Result<u64> + Sync) -> Result<u64> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = work.iter().map(|part| scope.spawn(|| run(part))).collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(_panicked) => anyhow::bail!("a reader panicked"),
        });
        joined.sum()
    })
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// CPU time of each thread of some processes (first field of `schedstat`, nanoseconds).
fn cpu_time(processes: &[u64]) -> Result<HashMap<PathBuf, u64>> {
    let mut all = HashMap::new();
    for pid in processes {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.path();
            // A thread may end meanwhile.
            let text = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
            all.insert(thread, text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0));
        }
    }
    Ok(all)
}
