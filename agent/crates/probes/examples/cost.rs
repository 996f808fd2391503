//! Nanoseconds per operation in a streamed file system, without probes, with idle probes and while recording.
//!
//! Usage: `cost STREAMED IMAGE`. STREAMED is an overlay, IMAGE the EROFS mount it stands on; both hold `src/0` and `program`. The
//! best of many short runs is printed, which is what a busy machine leaves undisturbed.
#![allow(clippy::print_stdout, reason = "an example speaks to a terminal")]

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use sluice_probes::{Device, Options, Probes};
use sluice_trace::Capability;

const RUNS: usize = 300;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [streamed, image, ..] = arguments.as_slice() else { return Err("usage: cost STREAMED IMAGE".into()) };
    let device = Device::from_stat(fs::metadata(image)?.dev());
    println!("{:16} {:>8} {:>8} {:>8} {:>8} {:>8}", "ns", "getppid", "stat", "open", "read", "program");
    print("no probes", streamed)?;
    let mut probes = Probes::load(&Options::default())?;
    print("idle", streamed)?;
    probes.watch(device)?;
    print("recording", streamed)?;
    println!("lost: {}", probes.losses()?.total());
    drop(probes);
    for capability in Capability::ALL {
        let mut probes = Probes::load(&Options { capabilities: vec![capability], ..Options::default() })?;
        probes.watch(device)?;
        print(&format!("{capability:?} only"), streamed)?;
    }
    Ok(())
}

fn print(name: &str, streamed: &Path) -> Result<(), Box<dyn Error>> {
    let file = streamed.join("src/0");
    let open = File::open(&file)?;
    let mut buffer = [0; 4096];
    let nothing =
        best(1000, || std::io::Result::Ok(std::hint::black_box(nix::unistd::getppid())).map(|_pid| ()))?;
    let stat = best(1000, || fs::metadata(&file).map(drop))?;
    let opened = best(1000, || File::open(&file).map(drop))?;
    let read = best(1000, || open.read_at(&mut buffer, 0).map(drop))?;
    let program = streamed.join("program");
    let run = best(3, || Command::new(&program).status().map(drop))?;
    println!("{name:16} {nothing:8.0} {stat:8.0} {opened:8.0} {read:8.0} {run:8.0}");
    Ok(())
}

/// Nanoseconds per call, of the best run.
fn best(times: u32, mut call: impl FnMut() -> std::io::Result<()>) -> std::io::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let begin = Instant::now();
        for _ in 0..times {
            call()?;
        }
        best = best.min(begin.elapsed().as_secs_f64() * 1e9 / f64::from(times));
    }
    Ok(best)
}
