//! First touch of a file: directly, by EROFS on a local file, and by EROFS on a FUSE file whose bytes are in the page cache.
//!
//! `cargo run --release -p sluice-blockfs --example read_speed [MIB]`, as root. Prints medians of five: MB/s in sequence by the
//! read-ahead of the image's device, 4 KiB reads at random by one and by eight threads, CPU seconds of this process (reader and
//! FUSE threads, not the kernel's workers). The numbers behind the constants in `device.rs` and `fuse.rs`.
#![allow(clippy::print_stdout, reason = "it is what it is for")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rig::{Room, attach_all, forget, mount_image, runtime};
use sluice_blockfs::{Device, Way};
use sluice_kernel::LoopDevice;

const ROUNDS: usize = 5;
const READ_AHEAD_KIB: [u32; 6] = [128, 256, 512, 1024, 2048, 4096];
const RANDOM_READS: u64 = 2000;

fn main() {
    let mib: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(128);
    let room = Room::new(&[vec![mib << 20]]);
    let file = room.samples[0].path.clone();
    println!("{mib} MiB                                 MB/s  CPU s   4K/s x1   4K/s x8");
    report("file on the disk, cold", &room.layers[0], &[]);
    let local =
        mount_image(&room, vec![Arc::new(Device::attach(&room.layers[0]).expect("attaches"))], "local");
    for kib in READ_AHEAD_KIB {
        set_read_ahead(&room, kib);
        report(&format!("EROFS, local file, cold, {kib} KiB"), &local.dir().join(&file), &[]);
    }
    local.unmount().expect("unmounts");
    rig::wait_until("devices are free", || room.devices().is_empty());

    let runtime = runtime();
    let (blockfs, sources) = (room.blockfs(&runtime, Way::IoUring), room.sources());
    let image = mount_image(&room, attach_all(&blockfs, &sources), "image");
    for kib in READ_AHEAD_KIB {
        set_read_ahead(&room, kib);
        report(&format!("EROFS, FUSE, store cached, {kib} KiB"), &image.dir().join(&file), &room.layers);
    }
    image.unmount().expect("unmounts");
    blockfs.unmount().expect("unmounts");
}

/// EROFS takes the read-ahead of all its files from the device of its metadata, whatever device they are on.
fn set_read_ahead(room: &Room, kib: u32) {
    for device in room.devices().iter().filter(|device| device.backing_file == room.metadata) {
        LoopDevice::open(device.number).expect("opens").set_read_ahead_kib(kib).expect("set");
    }
}

/// `warm` are files to bring into the page cache before each round.
fn report(what: &str, path: &Path, warm: &[std::path::PathBuf]) {
    let prepare = || {
        for path in warm {
            read_whole(path);
        }
        forget(path);
    };
    let (mut speeds, mut cpu, mut one, mut eight) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        prepare();
        let (start, used) = (Instant::now(), cpu_time());
        let bytes = read_whole(path);
        speeds.push(bytes as f64 / start.elapsed().as_secs_f64() / 1e6);
        cpu.push((cpu_time() - used).as_secs_f64());
        prepare();
        one.push(random_reads_per_second(path, bytes, 1));
        prepare();
        eight.push(random_reads_per_second(path, bytes, 8));
    }
    let (mb, cpu, one, eight) = (median(speeds), median(cpu), median(one), median(eight));
    println!("{what:38} {mb:6.0} {cpu:6.2} {one:10.0} {eight:9.0}");
}

fn read_whole(path: &Path) -> u64 {
    let (mut file, mut buffer, mut all) = (File::open(path).expect("opens"), vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer).expect("reads") {
            0 => return all,
            got => all += got as u64,
        }
    }
}

fn random_reads_per_second(path: &Path, size: u64, threads: u64) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let (file, mut block) = (File::open(path).expect("opens"), [0; 4096]);
                for number in 0..RANDOM_READS / threads {
                    let place = u64::from_le_bytes(rig::word(thread as usize, number)) % (size / 4096);
                    file.read_exact_at(&mut block, place * 4096).expect("reads");
                }
            });
        }
    });
    RANDOM_READS as f64 / start.elapsed().as_secs_f64()
}

fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("usage");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.cast_unsigned())
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}
