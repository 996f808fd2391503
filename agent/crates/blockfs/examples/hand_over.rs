//! How long a hand-over takes, and how long a read waits that comes meanwhile: `LOOP_CHANGE_FD` between two local files, which is what
//! the kernel's driver costs by itself. A reader that pauses (as a container does that reads now and then) is given way to.
//!
//! `cargo run --release -p sluice-blockfs --example hand_over [TIMES]`, as root.
#![allow(clippy::print_stdout, reason = "it is what it is for")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sluice_blockfs::Device;

const BLOCKS: u64 = 4096;
const BLOCK: usize = 4096;
const PAUSE: Duration = Duration::from_millis(60);

fn main() {
    let times: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let dir = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
    let files = ["first", "second"].map(|name| dir.path().join(name));
    for file in &files {
        fs::write(file, vec![7; BLOCKS as usize * BLOCK]).expect("written");
        File::open(file).expect("opens").sync_all().expect("synced");
    }
    let device = Device::attach(&files[0]).expect("attaches");
    for (name, pause) in
        [("idle", None), ("with a reader", Some(Duration::ZERO)), ("with a reader that pauses", Some(PAUSE))]
    {
        let (done, longest_us) = (AtomicBool::new(pause.is_none()), AtomicU64::new(0));
        let (mut took, mut waited) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| read_until(&done, &longest_us, &device, pause.unwrap_or_default()));
            for number in 0..times {
                std::thread::sleep(Duration::from_millis(50));
                if pause == Some(PAUSE) {
                    device.wait_for_rest();
                }
                longest_us.store(0, Ordering::Relaxed);
                let start = Instant::now();
                device.hand_over(&files[(number + 1) % 2]).expect("handed over");
                took.push(start.elapsed().as_secs_f64() * 1e3);
                // A read that waited has ended then.
                std::thread::sleep(Duration::from_millis(10));
                waited.push(longest_us.load(Ordering::Relaxed) as f64 / 1e3);
            }
            done.store(true, Ordering::Relaxed);
        });
        println!("{name}: hand-over {}", summary(&mut took));
        if pause.is_some() {
            println!("{name}: longest read around it {}", summary(&mut waited));
        }
    }
}

/// Reads blocks of the device at random, past the page cache; 32 of them, then a pause.
fn read_until(done: &AtomicBool, longest_us: &AtomicU64, device: &Device, pause: Duration) {
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(device.path()).expect("opens");
    let mut buffer = vec![0; 2 * BLOCK];
    let aligned = buffer.as_ptr().align_offset(BLOCK);
    let mut number = 0;
    while !done.load(Ordering::Relaxed) {
        let start = Instant::now();
        let at = number * 7919 % BLOCKS * BLOCK as u64;
        file.read_exact_at(&mut buffer[aligned..aligned + BLOCK], at).expect("reads");
        longest_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        number += 1;
        if number % 32 == 0 && !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

fn summary(ms: &mut [f64]) -> String {
    ms.sort_by(f64::total_cmp);
    format!("min {:.1} ms, median {:.1} ms, max {:.1} ms", ms[0], ms[ms.len() / 2], ms[ms.len() - 1])
}
