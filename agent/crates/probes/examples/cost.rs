//! Nanoseconds that recording adds to each operation: programs are attached and detached again and again beside the same process, which
//! looks at, opens and reads 3,000 files, maps one, and starts a program.
//!
//! Usage: `cost PLACE IMAGE [ROUNDS]`. PLACE has those files: the root of a container, or `/` for what others suffer. IMAGE is the EROFS mount
//! that is recorded. All is read once before.
#![allow(clippy::print_stdout, reason = "an example speaks to a terminal")]

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use sluice_probes::{Device, Options, Probes};

type Outcome<T> = Result<T, Box<dyn Error>>;

const FILES: usize = 3000;
/// The mapped file has so many bytes.
const MAPPED: std::ops::Range<u64> = 1 << 20..64 << 20;
const FAULTS: u64 = 2000;
const STARTS: usize = 20;
const OPERATIONS: [&str; 5] =
    ["stat", "open, close", "open, read, close", "mmap, fault, munmap", "start of `true`"];

type Costs = [f64; OPERATIONS.len()];

fn main() -> Outcome<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    match arguments.as_slice() {
        [work, place] if work.as_os_str() == "work" => operate(place),
        [place, image, rest @ ..] => {
            let rounds = rest.first().and_then(|text| text.to_str()?.parse().ok()).unwrap_or(60);
            compare(place, image, rounds)
        }
        _ => Err("usage: cost PLACE IMAGE [ROUNDS]".into()),
    }
}

fn compare(place: &Path, image: &Path, rounds: usize) -> Outcome<()> {
    let device = Device::from_stat(fs::metadata(image)?.dev());
    // A process of its own, since this one has many descriptors.
    let mut child = Command::new(std::env::current_exe()?);
    let mut child = child.arg("work").arg(place).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut ends = child.stdin.take().zip(child.stdout.take().map(BufReader::new)).ok_or("no pipes")?;
    let mut probes = Probes::load(&Options { linger: Duration::ZERO, ..Options::default() })?;
    turn(&mut ends)?;
    let (mut before, mut more) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let without = turn(&mut ends)?;
        probes.watch(device)?;
        // First touches are no part of it.
        turn(&mut ends)?;
        let with = turn(&mut ends)?;
        probes.unwatch(device)?;
        std::thread::sleep(Duration::from_millis(1));
        probes.drain(drop)?;
        // The kernel takes its time to detach them.
        std::thread::sleep(Duration::from_millis(300));
        let again = turn(&mut ends)?;
        before.push(without);
        more.push(std::array::from_fn(|which| with[which] - f64::midpoint(without[which], again[which])));
    }
    for (which, operation) in OPERATIONS.iter().enumerate() {
        println!("{operation}: {:.0} ns, {:+.0} when recorded", median(&before, which), median(&more, which));
    }
    drop(ends);
    child.wait()?;
    Ok(())
}

fn turn((tell, said): &mut (ChildStdin, BufReader<ChildStdout>)) -> Outcome<Costs> {
    tell.write_all(b"\n")?;
    let mut line = String::new();
    said.read_line(&mut line)?;
    let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    numbers.try_into().map_err(|numbers: Vec<f64>| format!("the worker said {numbers:?}").into())
}

fn median(all: &[Costs], which: usize) -> f64 {
    let mut one: Vec<f64> = all.iter().map(|costs| costs[which]).collect();
    one.sort_by(f64::total_cmp);
    one.get(one.len() / 2).copied().unwrap_or(f64::NAN)
}

/// For each line tells how long each operation takes.
fn operate(place: &Path) -> Outcome<()> {
    let (mut files, mut dirs) = (Vec::new(), vec![place.join("usr/lib")]);
    let mut mapped = None;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                dirs.push(path);
            } else if kind.is_file() && files.len() < FILES {
                if MAPPED.contains(&entry.metadata()?.len()) {
                    mapped = Some(path.clone());
                }
                files.push(path);
            }
        }
    }
    let mapped = File::open(mapped.ok_or("no file of a good size")?)?;
    let size = mapped.metadata()?.len();
    let program = place.join("bin/true");
    let mut bytes = [0; 100];
    for line in std::io::stdin().lines() {
        line?;
        let stat = each(&files, |file| fs::metadata(file).map(drop))?;
        let open = each(&files, |file| File::open(file).map(drop))?;
        let read = each(&files, |file| File::open(file)?.read_at(&mut bytes, 0).map(drop))?;
        let pages: Vec<u64> = (0..FAULTS).map(|number| number * (size / FAULTS)).collect();
        let fault = each(&pages, |at| sluice_kernel::file::read_mapped(mapped.as_fd(), *at, &mut [0]))?;
        let start = each(&[(); STARTS], |()| Command::new(&program).status().map(drop))?;
        println!("{stat} {open} {read} {fault} {start}");
    }
    Ok(())
}

/// Nanoseconds that `work` takes, on average.
fn each<T, E: Error + 'static>(on: &[T], mut work: impl FnMut(&T) -> Result<(), E>) -> Outcome<f64> {
    let begin = Instant::now();
    on.iter().try_for_each(&mut work)?;
    Ok(begin.elapsed().as_nanos() as f64 / on.len() as f64)
}
