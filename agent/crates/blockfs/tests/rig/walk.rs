//! Readers that walk an image at random, by every way in which programs read, and know what they must see.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{BLOCK, Room, Sample, forget, word};

/// How a walker reads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reading {
    Read,
    Mapping,
    Direct,
    Exec,
}

pub(crate) const READINGS: [Reading; 4] = [Reading::Read, Reading::Mapping, Reading::Direct, Reading::Exec];

/// What walkers saw, in all.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) operations: AtomicU64,
    longest_us: [AtomicU64; READINGS.len()],
}

impl Seen {
    /// The longest that one operation of each kind took. (A program reads a whole file, piece by piece.)
    pub(crate) fn longest(&self) -> String {
        let told = |reading: Reading| {
            let longest = self.longest_us[reading as usize].load(Ordering::Relaxed);
            format!("{reading:?} {:?}", Duration::from_micros(longest))
        };
        READINGS.map(told).join(", ")
    }
}

/// Reads the image at `root` until `done`. Any error and any wrong byte panics.
pub(crate) fn walk(room: &Room, root: &Path, reading: Reading, done: &AtomicBool, seen: &Seen) {
    let mut state = 1 + reading as u64;
    let mut random = |limit: u64| {
        state = u64::from_le_bytes(word(reading as usize, state & !7));
        (state >> 8) % limit
    };
    while !done.load(Ordering::Relaxed) {
        let sample = &room.samples[random(room.samples.len() as u64) as usize];
        let at = random(sample.size) / BLOCK * BLOCK;
        let length = (1 + random(64 * BLOCK)).min(sample.size - at);
        let start = Instant::now();
        match reading {
            Reading::Read => read(root, sample, at, length),
            Reading::Mapping => map(root, sample, at, length),
            Reading::Direct => read_direct(root, sample, at, length),
            Reading::Exec => exec(room, root, sample),
        }
        let took = start.elapsed().as_micros() as u64;
        seen.longest_us[reading as usize].fetch_max(took, Ordering::Relaxed);
        seen.operations.fetch_add(1, Ordering::Relaxed);
        // The page cache would answer the next one.
        forget(&root.join(&sample.path));
    }
}

fn read(root: &Path, sample: &Sample, at: u64, length: u64) {
    let mut bytes = vec![0; length as usize];
    let file = File::open(root.join(&sample.path)).expect("opens");
    file.read_exact_at(&mut bytes, at).unwrap_or_else(|error| panic!("read at {at}: {error}"));
    assert!(bytes == sample.bytes(at, bytes.len()), "wrong bytes by read at {at}");
}

fn map(root: &Path, sample: &Sample, at: u64, length: u64) {
    let mut bytes = vec![0; length as usize];
    let file = File::open(root.join(&sample.path)).expect("opens");
    sluice_kernel::file::read_mapped(file.as_fd(), at, &mut bytes).expect("mapped");
    assert!(bytes == sample.bytes(at, bytes.len()), "wrong bytes by mmap at {at}");
}

fn read_direct(root: &Path, sample: &Sample, at: u64, length: u64) {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(root.join(&sample.path));
    let file = file.expect("opens");
    let wanted = length.next_multiple_of(BLOCK) as usize;
    let mut buffer = vec![0; wanted + BLOCK as usize];
    let aligned = buffer.as_ptr().align_offset(BLOCK as usize);
    let bytes = &mut buffer[aligned..aligned + wanted];
    let mut got = 0;
    while got < length as usize {
        let read = file.read_at(&mut bytes[got..], at + got as u64);
        let count = read.unwrap_or_else(|error| panic!("O_DIRECT at {at}: {error}"));
        assert!(count > 0, "the file ends early");
        got += count;
    }
    assert!(
        bytes[..length as usize] == *sample.bytes(at, length as usize),
        "wrong bytes by O_DIRECT at {at}"
    );
}

/// Runs the image's program on one of its files; its output is compared with that of the program outside.
fn exec(room: &Room, root: &Path, sample: &Sample) {
    let program = room.program.as_ref().expect("the image has a program");
    let inside = Command::new(root.join(program)).arg(root.join(&sample.path)).output().expect("runs");
    assert!(inside.status.success(), "{}", String::from_utf8_lossy(&inside.stderr));
    forget(&root.join(program));
    let mut outside = Command::new(super::PROGRAM);
    outside.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut outside = outside.spawn().expect("runs");
    let mut input = outside.stdin.take().expect("is piped");
    std::io::Write::write_all(&mut input, sample.bytes(0, sample.size as usize)).expect("written");
    drop(input);
    let outside = outside.wait_with_output().expect("ends").stdout;
    assert_eq!(inside.stdout[..64], outside[..64], "another digest of {}", sample.path.display());
}
