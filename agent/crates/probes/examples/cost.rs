//! Nanoseconds per operation in a streamed file system, without probes, with idle probes and while recording.
//!
//! Usage: `cost STREAMED IMAGE`. STREAMED is an overlay, IMAGE the EROFS mount it stands on; both hold `src/0`. The best of
//! many short runs is printed, which is what a busy machine leaves undisturbed.
#![allow(clippy::print_stdout, reason = "an example speaks to a terminal")]

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use sluice_probes::{Device, Options, Probes};

const RUNS: usize = 300;
const TIMES: u32 = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [streamed, image, ..] = arguments.as_slice() else { return Err("usage: cost STREAMED IMAGE".into()) };
    let file = streamed.join("src/0");
    let device = Device::from_stat(fs::metadata(image)?.dev());
    println!("{:12} {:>9} {:>9} {:>9} {:>9}", "", "getppid", "stat", "open", "read");
    print("no probes", &file)?;
    let mut probes = Probes::load(&Options::default())?;
    print("idle", &file)?;
    probes.watch(device)?;
    print("recording", &file)?;
    println!("lost: {}", probes.losses()?.total());
    Ok(())
}

fn print(name: &str, file: &Path) -> Result<(), Box<dyn Error>> {
    let open = File::open(file)?;
    let mut buffer = [0; 4096];
    let nothing = best(|| Ok(drop(nix::unistd::getppid())))?;
    let stat = best(|| fs::metadata(file).map(drop))?;
    let opened = best(|| File::open(file).map(drop))?;
    let read = best(|| open.read_at(&mut buffer, 0).map(drop))?;
    println!("{name:12} {nothing:9.0} {stat:9.0} {opened:9.0} {read:9.0}");
    Ok(())
}

/// Nanoseconds per call, of the best run.
fn best(mut call: impl FnMut() -> std::io::Result<()>) -> std::io::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let begin = Instant::now();
        for _ in 0..TIMES {
            call()?;
        }
        best = best.min(begin.elapsed().as_secs_f64() * 1e9 / f64::from(TIMES));
    }
    Ok(best)
}
