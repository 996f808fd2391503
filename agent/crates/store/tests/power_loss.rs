//! Loss of power: the disk under the store is a file of ours, so that every write and flush that reaches it is known, and any state
//! that a loss of power could leave can be made. The store must be well on each of them and have everything that it had said
//! was recorded.
//!
//! What was written before the last flush of the disk is there; of what was written after it any part may be, in any order.
//!
//! Without a harness: the binary starts itself as the server of the disk.
#![allow(clippy::print_stdout, reason = "what was tried")]

mod rig;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rig::served::{Operation, ServedDisk};
use rig::{Sample, noise, run, sample};
use sluice_store::{Layer, Store};

const DISK_BYTES: u64 = 64 << 20;
/// What the disk writes whole or not at all: ext4 needs as much for its own structures.
const SECTOR: u64 = 4096;

fn main() -> ExitCode {
    rig::served::serve_if_asked();
    rig::run_cases(&[("the_store_is_well_whenever_power_is_lost", the_store_is_well_whenever_power_is_lost)])
}

/// A disk image and where it is mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, dir: &Path) -> Self {
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(dir));
        Self(dir.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// What the store had said was recorded when the log had `after` operations: chunks of a layer that must be there from then on,
/// until `until`.
#[derive(Debug, Clone)]
struct Promise {
    after: usize,
    until: usize,
    digest: String,
    chunks: Vec<u64>,
    complete: bool,
}

/// Runs a store, and writes down what it promises.
struct Promises<'a> {
    disk: &'a ServedDisk,
    kept: Vec<Promise>,
    /// While the damage that the test does itself may be on the disk.
    damaged: Range<usize>,
}

impl Promises<'_> {
    fn now(&self) -> usize {
        self.disk.operations()
    }

    fn recorded(&mut self, layer: &Layer, chunks: Vec<u64>, complete: bool) {
        let (after, digest) = (self.now(), layer.digest().to_owned());
        self.kept.push(Promise { after, until: usize::MAX, digest, chunks, complete });
    }

    /// From now on the layer may be gone.
    fn going(&mut self, digest: &str) {
        let now = self.now();
        for promise in self.kept.iter_mut().filter(|one| one.digest == digest && one.until == usize::MAX) {
            promise.until = now;
        }
    }

    fn fill(&mut self, store: &Store, sample: &Sample, step: usize) {
        let layer = store.add_layer(&sample.index).expect("layer");
        let mut done = Vec::new();
        for chunks in sample.chunks.chunks(step) {
            sample.insert(&layer, chunks, false);
            store.flush(&layer).expect("flush");
            done.extend(chunks.iter().map(|chunk| chunk.store_offset.get()));
            self.recorded(&layer, done.clone(), false);
        }
        store.mark_complete(&layer).expect("complete");
        self.recorded(&layer, done, true);
    }

    fn ingest(&mut self, store: &Store, sample: &Sample) {
        let mut ingest = store.begin_ingest().expect("ingest");
        for (at, piece) in sample.data.chunks(100_000).enumerate() {
            let offset = at as u64 * 100_000;
            sluice_image::index::ContentSink::write(&mut ingest, offset, piece).expect("write");
        }
        let layer = store.commit_ingest(ingest, &sample.index).expect("commit");
        let all = sample.chunks.iter().map(|chunk| chunk.store_offset.get()).collect();
        self.recorded(&layer, all, true);
    }
}

fn workload(promises: &mut Promises<'_>, root: &Path, samples: &[Sample]) {
    let store = Store::open(root, 1 << 20).expect("store");
    promises.fill(&store, &samples[0], 3);
    promises.ingest(&store, &samples[1]);
    // A partial layer whose place an ingest takes.
    let partial = store.add_layer(&samples[2].index).expect("layer");
    samples[2].insert(&partial, &samples[2].chunks[..5], false);
    store.flush(&partial).expect("flush");
    drop(partial);
    promises.ingest(&store, &samples[2]);
    // Removed, and filled again.
    promises.going(&samples[0].digest());
    store.remove_layer(&samples[0].digest()).expect("remove");
    promises.fill(&store, &samples[0], 7);
    // Damage found and mended.
    let layer = store.layer(&samples[1].digest()).expect("layer").expect("kept");
    promises.going(&samples[1].digest());
    promises.damaged.start = promises.now();
    fs::File::options()
        .write(true)
        .open(layer.data_path())
        .and_then(|file| file.write_all_at(b"damage", 70_000))
        .expect("damage");
    assert_eq!(store.fsck().expect("fsck").problems.len(), 1);
    promises.fill(&store, &samples[1], 2);
    promises.damaged.end = promises.now();
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// The disk as it may be when power is lost after `count` operations.
fn disk_after(base: &[u8], log: &[Operation], count: usize, random: &mut Random) -> Vec<u8> {
    let mut disk = base.to_vec();
    let flushed = log[..count].iter().rposition(|one| matches!(one, Operation::Flush)).unwrap_or(0);
    let mut sectors: BTreeMap<u64, Vec<&[u8]>> = BTreeMap::new();
    for (at, operation) in log[..count].iter().enumerate() {
        let Operation::Write(offset, bytes) = operation else { continue };
        if at < flushed {
            disk[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        } else {
            assert!(offset % SECTOR == 0, "a write at {offset}");
            for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                sectors.entry(offset + number as u64 * SECTOR).or_default().push(sector);
            }
        }
    }
    // A disk keeps the order of writes to one sector, and of nothing else; often it takes none or all.
    let share = [0, 50, 100][random.below(3)];
    for (offset, versions) in sectors {
        let taken = if random.below(100) < share { 1 + random.below(versions.len()) } else { 0 };
        if let Some(bytes) = taken.checked_sub(1).and_then(|at| versions.get(at)) {
            disk[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        }
    }
    disk
}

/// Opens the store on a disk and checks it; how many promises it kept.
fn check(image: &Path, dir: &Path, promises: &[Promise], count: usize, damaged: bool) -> usize {
    let _mounted = Mounted::new(image, dir);
    let root = dir.join("store");
    if !root.exists() {
        assert!(promises.iter().all(|promise| promise.after > count), "the store is gone");
        return 0;
    }
    let store = Store::open(&root, 1 << 20).expect("the store opens");
    let mut problems = store.fsck().expect("fsck").problems;
    problems.retain(|line| !(damaged && line.contains("bytes 65536..131072 are not what they were")));
    assert_eq!(problems, Vec::<String>::new(), "power lost after {count}");
    let mut kept = 0;
    for promise in promises.iter().filter(|promise| promise.after <= count && count <= promise.until) {
        let layer = store.layer(&promise.digest).expect("layer");
        let layer = layer.unwrap_or_else(|| panic!("a layer is lost: {promise:?}, {count}"));
        assert!(!promise.complete || layer.is_complete(), "{promise:?}, {count}");
        let lost = promise.chunks.iter().filter(|start| !layer.has(**start..**start + 1)).count();
        assert_eq!(lost, 0, "chunks are lost: {promise:?}, {count}");
        kept += 1;
    }
    kept
}

fn the_store_is_well_whenever_power_is_lost() {
    let files = tempfile::tempdir().expect("dir");
    let [dir, image] = ["mnt", "image"].map(|name| files.path().join(name));
    fs::create_dir(&dir).expect("dir");
    let samples: Vec<Sample> = (1..4)
        .map(|seed| sample(&[noise(seed, 700_000), noise(seed + 50, 3000), noise(seed + 90, 400_000)]))
        .collect();
    let mut disk = ServedDisk::new(DISK_BYTES);
    let base = fs::read(disk.image()).expect("image");
    let mut promises = Promises { disk: &disk, kept: Vec::new(), damaged: 0..0 };
    workload(&mut promises, &disk.path().join("store"), &samples);
    let Promises { kept: promises, damaged, .. } = promises;
    disk.unmount();
    let log = &disk.log();
    let flushes = log.iter().filter(|one| matches!(one, Operation::Flush)).count();
    assert!(flushes > 20, "{flushes} flushes reached the disk");
    let mut random = Random(0x5DEE_CE66_D1CE_F00D);
    let (mut tried, mut kept) = (0, 0);
    for _ in 0..80 {
        let count = 1 + random.below(log.len());
        fs::write(&image, disk_after(&base, log, count, &mut random)).expect("image");
        kept += check(&image, &dir, &promises, count, damaged.contains(&count));
        tried += 1;
    }
    println!(
        "{} writes, {flushes} flushes; power lost {tried} times, {kept} promises kept",
        log.len() - flushes
    );
    assert!(kept > 50);
}
