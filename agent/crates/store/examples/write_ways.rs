//! How fast a layer's chunks come to the disk: by `pwrite`, by a ring, by a ring with blocks reserved before, by a ring past the page
//! cache. The ways take turns; medians, and their ratios to `pwrite`.
//!
//! `write_ways [DIR] [MIB] [ROUNDS]`; the directory is to be on the disk in question.
//!
//! For each: how long a writer was held up until all was handed over, how long until all was on the disk (fdatasync), and the
//! processor time of both.
#![allow(clippy::print_stdout, reason = "what was measured")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::fcntl::OFlag;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use tokio_uring::buf::BoundedBuf;

const CHUNK: usize = 256 << 10;
/// Writes under way at once: as much as the store's queue holds.
const DEPTH: usize = 32;
const ALIGNED: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Pwrite,
    Ring,
    RingReserved,
    RingDirect,
}

const WAYS: [Way; 4] = [Way::Pwrite, Way::Ring, Way::RingReserved, Way::RingDirect];

#[derive(Debug, Clone, Copy)]
struct Took {
    written: Duration,
    flushed: Duration,
    processor: Duration,
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mut number =
        |otherwise: usize| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (chunks, rounds) = (number(256) * (1 << 20) / CHUNK, number(7));
    let mut took = WAYS.map(|way| (way, Vec::new()));
    for _ in 0..rounds {
        for (way, took) in &mut took {
            took.push(time(*way, &dir, chunks)?);
        }
    }
    let medians = took.map(|(way, took)| (way, median(&took)));
    let mib = (chunks * CHUNK) as f64 / f64::from(1 << 20);
    println!(
        "{mib} MiB in chunks of {} KiB, {rounds} rounds, medians (ratio of the time to pwrite's)",
        CHUNK >> 10
    );
    for (way, took) in medians {
        let against = |of: fn(&Took) -> Duration| {
            let (own, base) = (of(&took), of(&medians[0].1));
            format!("{:>6.0} ms ({:.2})", own.as_secs_f64() * 1e3, own.as_secs_f64() / base.as_secs_f64())
        };
        println!(
            "{:<13} written {}  on the disk {}  processor {}  {:>5.0} MiB/s",
            format!("{way:?}"),
            against(|took| took.written),
            against(|took| took.flushed),
            against(|took| took.processor),
            mib / took.flushed.as_secs_f64(),
        );
    }
    Ok(())
}

fn median(took: &[Took]) -> Took {
    let middle = |of: fn(&Took) -> Duration| {
        let mut all: Vec<Duration> = took.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    Took {
        written: middle(|took| took.written),
        flushed: middle(|took| took.flushed),
        processor: middle(|took| took.processor),
    }
}

fn processor() -> std::io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(microseconds.unsigned_abs()))
}

/// Writes a sparse file of so many chunks, each of other bytes, and flushes it.
fn time(way: Way, dir: &Path, chunks: usize) -> std::io::Result<Took> {
    let named = tempfile::NamedTempFile::new_in(dir)?;
    let flags = if way == Way::RingDirect { OFlag::O_DIRECT.bits() } else { 0 };
    let file = OpenOptions::new().write(true).custom_flags(flags).open(named.path())?;
    file.set_len((chunks * CHUNK) as u64)?;
    file.sync_all()?;
    let content: Vec<u8> = (0..CHUNK + ALIGNED).map(|at| (at * 31 % 251) as u8).collect();
    let (before, since) = (processor()?, Instant::now());
    match way {
        Way::Pwrite => {
            for number in 0..chunks {
                let bytes = Bytes::copy_from_slice(&content[..CHUNK]);
                file.write_all_at(&bytes, (number * CHUNK) as u64)?;
            }
        }
        _ => by_ring(way, &file, chunks, &content)?,
    }
    let written = since.elapsed();
    file.sync_data()?;
    Ok(Took { written, flushed: since.elapsed(), processor: processor()?.saturating_sub(before) })
}

fn by_ring(way: Way, file: &File, chunks: usize, content: &[u8]) -> std::io::Result<()> {
    let to = Rc::new(tokio_uring::fs::File::from_std(file.try_clone()?));
    tokio_uring::start(async move {
        let places = Rc::new(tokio::sync::Semaphore::new(DEPTH));
        let mut writes = Vec::new();
        for number in 0..chunks {
            let place = Rc::clone(&places);
            let held = place.acquire().await.map_err(std::io::Error::other)?;
            held.forget();
            let offset = (number * CHUNK) as u64;
            if way == Way::RingReserved {
                sluice_kernel::file::allocate(file.as_fd(), offset, CHUNK as u64)
                    .map_err(std::io::Error::other)?;
            }
            let to = Rc::clone(&to);
            // The copy that the decoder makes; past the page cache it has to be aligned.
            let bytes = content.to_vec();
            let from = if way == Way::RingDirect { bytes.as_ptr().align_offset(ALIGNED) } else { 0 };
            writes.push(tokio_uring::spawn(async move {
                let (written, _bytes) = to.write_all_at(bytes.slice(from..from + CHUNK), offset).await;
                place.add_permits(1);
                written
            }));
        }
        for write in writes {
            write.await.map_err(std::io::Error::other)??;
        }
        Ok(())
    })
}
