//! First touch of files: from ext4, by EROFS on a local file, and by EROFS on FUSE files in each way (`BLOCKFS_WAYS`), taking turns in one run.
//!
//! `cargo run --release -p sluice-blockfs --example read_speed [MIB] [ROUNDS] [NAME...]`, as root. Prints medians, and the best
//! of all rounds (on a busy machine the better guide): MB/s in sequence, by one
//! and by four readers; 4 KiB reads at random per second, by one, eight and 32 threads (O_DIRECT: eight); µs for a small file in directory
//! order (open, read, close), and requests to its loop device for each; CPU seconds of this process for the first
//! sequence (reader and FUSE threads, not the kernel's workers). "Cold" drops the pages of the local file as well; else it is in the
//! page cache. The numbers behind the constants in `device.rs`, `options.rs` and `server/`.
#![allow(clippy::print_stdout, reason = "it is what it is for")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rig::{Mood, Room, attach_all, forget, mount_image, runtime, ways};
use sluice_blockfs::{BlockFs, Device, ImageMount, Way};

const RANDOM_READS: u64 = 3200;
const SMALL_FILES: usize = 1000;
const SMALL_BYTES: u64 = 2000;

/// Something to read: the files of the room at another place.
struct Subject {
    name: String,
    root: PathBuf,
    /// Whether the local files stay in the page cache.
    warm: bool,
    rows: Vec<Row>,
    mounts: Option<(ImageMount, Option<BlockFs>)>,
}

#[derive(Default)]
struct Row([f64; 9]);

/// As many columns are rates.
const RATES: usize = 6;
const COLUMNS: [&str; 9] =
    ["seq", "seq x4", "4K x1", "4K x8", "4K x32", "4K dio8", "small", "req/file", "cpu s"];

fn main() {
    let number = |at| std::env::args().nth(at).and_then(|text| text.parse::<u64>().ok());
    let (mib, rounds) = (number(1).unwrap_or(256), number(2).unwrap_or(5));
    let room = Room::new(&[vec![mib << 18; 4], vec![SMALL_BYTES; SMALL_FILES]]);
    let runtime = runtime();
    let only: Vec<String> = std::env::args().skip(3).collect();
    let mut subjects = vec![copy_to_ext4(&room), mount_local(&room)];
    subjects.extend(ways().into_iter().map(|way| mount_fuse(&room, &runtime, way)));
    for round in 0..rounds {
        eprintln!("round {round}");
        let wanted = |subject: &&mut Subject| only.is_empty() || only.contains(&subject.name);
        for subject in subjects.iter_mut().filter(wanted) {
            let row = measure(&room, subject);
            subject.rows.push(row);
        }
    }
    let head = COLUMNS.map(|name| format!("{name:>9}")).concat();
    println!("{:28}{head}", format!("{mib} MiB, {rounds} rounds"));
    for subject in subjects.iter().filter(|subject| !subject.rows.is_empty()) {
        println!("{:28}{}", subject.name, line(&subject.rows, |sorted| sorted[sorted.len() / 2]));
        println!("{:28}{}", "  best", line(&subject.rows, |sorted| sorted[sorted.len() - 1]));
    }
    for (image, blockfs) in subjects.into_iter().filter_map(|subject| subject.mounts) {
        image.unmount().expect("unmounts");
        blockfs.map(BlockFs::unmount).transpose().expect("unmounts");
    }
    room.assert_released();
}

fn copy_to_ext4(room: &Room) -> Subject {
    let root = room.path("copy");
    for sample in &room.samples {
        let path = root.join(&sample.path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(&path, sample.bytes(0, sample.size as usize)).expect("written");
    }
    nix::unistd::sync();
    Subject { name: "the disk's, cold".to_owned(), root, warm: false, rows: Vec::new(), mounts: None }
}

fn mount_local(room: &Room) -> Subject {
    let attach = |path: &PathBuf| std::sync::Arc::new(Device::attach(path).expect("attaches"));
    let image = mount_image(room, room.layers.iter().map(attach).collect(), "local");
    // As the agent does.
    image.metadata().expect("its device is known").read_far_ahead();
    let root = image.dir().to_path_buf();
    Subject {
        name: "handed over, cold".to_owned(),
        root,
        warm: false,
        rows: Vec::new(),
        mounts: Some((image, None)),
    }
}

fn mount_fuse(room: &Room, runtime: &tokio::runtime::Runtime, way: Way) -> Subject {
    let dir = room.path(&format!("served-{way}"));
    fs::create_dir_all(&dir).expect("made");
    let (blockfs, sources) = (rig::mount_blocks(&dir, runtime, rig::options(way)), room.sources());
    sources.iter().for_each(|source| source.set(Mood::OnDisk));
    let image = mount_image(room, attach_all(&blockfs, &sources), &format!("image-{way}"));
    let root = image.dir().to_path_buf();
    let mounts = Some((image, Some(blockfs)));
    Subject { name: way.to_string(), root, warm: true, rows: Vec::new(), mounts }
}

fn measure(room: &Room, subject: &Subject) -> Row {
    let large: Vec<_> = room.samples[..4].iter().map(|sample| subject.root.join(&sample.path)).collect();
    let small: Vec<_> = room.samples[4..].iter().map(|sample| subject.root.join(&sample.path)).collect();
    let prepare = || {
        for path in &room.layers {
            if subject.warm { _ = read_whole(path) } else { forget(path) }
        }
        large.iter().chain(&small).for_each(|path| forget(path));
    };
    prepare();
    let (used, start) = (cpu_time(), Instant::now());
    let bytes: u64 = large.iter().map(|path| read_whole(path)).sum();
    let seq = bytes as f64 / start.elapsed().as_secs_f64() / 1e6;
    let cpu = (cpu_time() - used).as_secs_f64();
    prepare();
    let start = Instant::now();
    std::thread::scope(|scope| large.iter().for_each(|path| _ = scope.spawn(|| read_whole(path))));
    let parallel = bytes as f64 / start.elapsed().as_secs_f64() / 1e6;
    let random = |threads, direct| {
        prepare();
        random_reads_per_second(&large, bytes / 4, threads, direct)
    };
    let (one, eight, many, direct) = (random(1, false), random(8, false), random(32, false), random(8, true));
    prepare();
    let (requests, start) = (loop_requests(room), Instant::now());
    small.iter().for_each(|path| _ = read_whole(path));
    let each_us = start.elapsed().as_secs_f64() * 1e6 / small.len() as f64;
    let requests = (loop_requests(room) - requests) as f64 / small.len() as f64;
    Row([seq, parallel, one, eight, many, direct, each_us, requests, cpu])
}

/// Reads that the room's loop devices have completed.
fn loop_requests(room: &Room) -> u64 {
    let reads = |number: u32| {
        let text = fs::read_to_string(format!("/sys/block/loop{number}/stat")).expect("reads");
        text.split_whitespace().next().and_then(|reads| reads.parse::<u64>().ok()).expect("a number")
    };
    room.devices().iter().map(|device| reads(device.number)).sum()
}

fn read_whole(path: &Path) -> u64 {
    thread_local!(static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; 1 << 20]));
    BUFFER.with_borrow_mut(|buffer| {
        let (mut file, mut all) = (File::open(path).expect("opens"), 0);
        loop {
            match file.read(buffer).expect("reads") {
                0 => return all,
                got => all += got as u64,
            }
        }
    })
}

fn random_reads_per_second(paths: &[PathBuf], size: u64, threads: u64, direct: bool) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let flags = if direct { libc::O_DIRECT } else { 0 };
                let open = |path| File::options().read(true).custom_flags(flags).open(path).expect("opens");
                let files: Vec<_> = paths.iter().map(open).collect();
                let mut buffer = vec![0; 8192];
                let aligned = buffer.as_ptr().align_offset(4096);
                let block = &mut buffer[aligned..aligned + 4096];
                for number in 0..RANDOM_READS / threads {
                    let place = u64::from_le_bytes(rig::word(thread as usize, number * 8)) >> 8;
                    let file = &files[(place % 4) as usize];
                    file.read_exact_at(block, place / 4 % (size / 4096) * 4096).expect("reads");
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

/// One cell for each column, taken from its values in rising order of goodness.
fn line(rows: &[Row], choose: impl Fn(&[f64]) -> f64) -> String {
    let cell = |column: usize| {
        let mut values: Vec<f64> = rows.iter().map(|row| row.0[column]).collect();
        values.sort_by(f64::total_cmp);
        // Of the last three less is better.
        if column >= RATES {
            values.reverse();
        }
        format!("{:9.*}", if column > RATES { 2 } else { 0 }, choose(&values))
    };
    (0..COLUMNS.len()).map(cell).collect()
}
