//! What recording costs: a storm of opens, stats, reads and program starts in a streamed file system, as `make` makes it, and
//! the same outside, without probes, with idle probes and while recording.
//!
//! Usage: `overhead STREAMED IMAGE OUTSIDE [ROUNDS]`. STREAMED is an overlay, IMAGE the EROFS mount it stands on, OUTSIDE a directory
//! of the same content: `program`, and files `0` to `99` in `src`. Times are processor times, since wall-clock times of busy machines say little.
#![allow(clippy::print_stdout, reason = "an example speaks to a terminal")]

use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sluice_probes::{Device, Options, Probes};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Per program started: so many files are looked at, opened and read.
const STATS: usize = 100;
const OPENS: usize = 50;
const PROGRAMS: usize = 1000;
/// Processor time is counted in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

fn main() -> Outcome<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [streamed, image, outside, rest @ ..] = arguments.as_slice() else {
        return Err("usage: overhead STREAMED IMAGE OUTSIDE [ROUNDS]".into());
    };
    let rounds: usize = rest.first().and_then(|text| text.to_str()?.parse().ok()).unwrap_or(9);
    let device = Device::from_stat(fs::metadata(image)?.dev());
    for (place, name) in [(streamed, "streamed"), (outside, "outside")] {
        storm(place)?;
        let mut times: [Vec<f64>; 3] = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let [none, idle, recording] = &mut times;
            none.push(storm(place)?);
            let mut probes = Probes::load(&Options::default())?;
            idle.push(storm(place)?);
            probes.watch(device)?;
            let begin = Instant::now();
            let mut records = 0;
            recording.push(std::thread::scope(|scope| -> Outcome<f64> {
                let work = scope.spawn(|| storm(place).map_err(|error| error.to_string()));
                while !work.is_finished() {
                    probes.wait(Duration::from_millis(50))?;
                    records += probes.drain(drop)?;
                }
                Ok(work.join().map_err(|_panic| "the storm failed")??)
            })?);
            let lost = probes.losses()?.total();
            println!("{name}: {records} records in {:?}, {lost} lost", begin.elapsed());
        }
        let [none, idle, recording] = times.map(least);
        println!(
            "{name}: no probes {none:.2} s, idle {idle:.2} s, recording {recording:.2} s of processor time"
        );
        println!("{name}: idle {:+.1} %, recording {:+.1} %", over(idle, none), over(recording, none));
    }
    Ok(())
}

fn over(time: f64, base: f64) -> f64 {
    (time / base - 1.0) * 100.0
}

/// That of the round that was disturbed least.
fn least(times: Vec<f64>) -> f64 {
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// Works like a build; returns the processor time of this process and its children in seconds.
fn storm(place: &Path) -> Outcome<f64> {
    let begin = processor_time()?;
    let files: Vec<PathBuf> = (0..100).map(|number| place.join("src").join(number.to_string())).collect();
    let mut buffer = vec![0; 16 << 10];
    for _ in 0..PROGRAMS {
        for file in files.iter().cycle().take(STATS) {
            fs::metadata(file)?;
        }
        for file in files.iter().cycle().take(OPENS) {
            File::open(file)?.read_exact(&mut buffer)?;
        }
        if !Command::new(place.join("program")).status()?.success() {
            return Err("the program failed".into());
        }
    }
    Ok((processor_time()? - begin).as_secs_f64())
}

fn processor_time() -> Outcome<Duration> {
    let text = fs::read_to_string("/proc/self/stat")?;
    // Fields 14 to 17, counted from behind the name in parentheses.
    let numbers = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u32 = numbers.skip(11).take(4).map(str::parse::<u32>).sum::<Result<u32, _>>()?;
    Ok(TICK * ticks)
}
