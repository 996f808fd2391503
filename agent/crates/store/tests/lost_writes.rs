//! Disks that fail: writes that are lost after they were made, flushes that fail once, blocks that cannot be read. No reader may get
//! anything but the bytes that were verified, and nothing may be recorded that is not there.
//!
//! Without a harness: the binary starts itself as the server of the disk.
#![allow(clippy::print_stdout, reason = "what the child says to its parent")]

mod rig;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rig::served::{ServedDisk, marked, serve_if_asked};
use rig::{Sample, sample};
use sluice_image::index::ContentSink;
use sluice_store::{Layer, Store, StoreError, StoreLimits};

const DIE: &str = "--die-while-writing";
const ANY: &str = "SLUICE-";

fn main() -> ExitCode {
    serve_if_asked();
    if std::env::args().any(|argument| argument == DIE) {
        die_while_writing();
    }
    rig::run_cases(&[
        ("a_write_that_is_lost_behind_our_back_is_no_hole", a_write_that_is_lost_behind_our_back_is_no_hole),
        ("a_failed_flush_is_not_made_good_by_the_next", a_failed_flush_is_not_made_good_by_the_next),
        ("bits_set_while_a_flush_fails_are_not_recorded", bits_set_while_a_flush_fails_are_not_recorded),
        ("readers_never_see_what_the_disk_lost", readers_never_see_what_the_disk_lost),
        ("what_waits_in_memory_outlives_a_failed_flush", what_waits_in_memory_outlives_a_failed_flush),
        ("a_bad_block_keeps_nothing_else_from_the_disk", a_bad_block_keeps_nothing_else_from_the_disk),
        (
            "what_was_flushed_singly_outlives_a_neighbours_failure",
            what_was_flushed_singly_outlives_a_neighbours_failure,
        ),
        ("what_cannot_be_read_any_more_is_missing", what_cannot_be_read_any_more_is_missing),
        ("an_ingest_whose_writes_are_lost_is_no_layer", an_ingest_whose_writes_are_lost_is_no_layer),
        ("a_disk_that_goes_read_only_shows_no_holes", a_disk_that_goes_read_only_shows_no_holes),
        ("a_test_that_is_killed_leaves_nothing", a_test_that_is_killed_leaves_nothing),
    ])
}

/// 16 files of 192 KiB, three chunks each.
fn files() -> Sample {
    sample(&(0..16).map(|number| marked(number, 3 << 16)).collect::<Vec<_>>())
}

fn disk() -> ServedDisk {
    ServedDisk::new(64 << 20)
}

fn open(disk: &ServedDisk) -> Store {
    Store::open(&disk.path().join("store"), 1 << 20).expect("store")
}

/// Nothing of the file stays in the page cache but what is still to be written.
fn drop_cache(path: &Path) {
    let file = File::open(path).expect("open");
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("dropped");
}

/// Where the run of durable bytes ends that begins at `offset`.
fn durable_until(layer: &Layer, offset: u64) -> u64 {
    let run = layer.durable_in(offset..layer.size().max(offset));
    if run.start == offset { run.end } else { offset }
}

fn here(sample: &Sample, layer: &Layer) -> usize {
    sample.chunks.iter().filter(|chunk| sample.check(layer, chunk)).count()
}

/// Brings what is missing.
fn bring(sample: &Sample, layer: &Layer) {
    let missing = layer.missing_chunks(0..u64::MAX).expect("missing");
    assert_eq!(sample.insert(layer, &missing, true), missing.len());
}

/// Brings what is missing until the layer is complete, and looks whether the disk has it.
fn complete(disk: &ServedDisk, store: Store, sample: &Sample) {
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    for round in 0.. {
        bring(sample, &layer);
        match store.mark_complete(&layer) {
            Ok(()) => break,
            Err(error @ (StoreError::Lost { .. } | StoreError::NotFull(_))) => {
                assert!(round < 100, "{error}")
            }
            Err(error) => assert!(error.is_full() && round < 100, "{error:?}"),
        }
    }
    let path = layer.data_path();
    drop((layer, store));
    drop_cache(&path);
    let store = open(disk);
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    assert!(layer.is_complete() && fs::read(path).expect("read") == sample.data);
}

/// What the kernel does by itself after a while: the writes fail, and the flusher's are not the store's.
fn write_back(store: &Store, path: &Path) -> io::Result<()> {
    store.settle();
    File::open(path)?.sync_data()
}

fn a_write_that_is_lost_behind_our_back_is_no_hole() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    sample.insert(&layer, &sample.chunks, false);
    disk.fail("writes", ANY);
    write_back(&store, &layer.data_path()).expect_err("the disk takes nothing");
    disk.heal();
    drop_cache(&layer.data_path());
    // Wrong bytes end the test.
    assert_eq!(here(&sample, &layer), 0);
    assert_eq!(durable_until(&layer, 0), 0);
    // What came meanwhile may be lost as well, for all we know.
    bring(&sample, &layer);
    assert!(matches!(store.flush(&layer), Err(StoreError::Lost { .. })));
    assert!(durable_until(&layer, 0) == 0 && !layer.is_complete());
    drop(layer);
    complete(&disk, store, &sample);
}

fn a_failed_flush_is_not_made_good_by_the_next() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    sample.insert(&layer, &sample.chunks[..12], false);
    store.flush(&layer).expect("flush");
    sample.insert(&layer, &sample.chunks[12..], false);
    disk.fail("writes", ANY);
    let error = store.flush(&layer).expect_err("the disk takes nothing");
    assert!(matches!(error, StoreError::Lost { bytes, .. } if bytes == 36 << 16), "{error:?}");
    disk.heal();
    store.flush(&layer).expect("there is nothing to be lost");
    assert!(matches!(store.mark_complete(&layer), Err(StoreError::NotFull(_))));
    drop_cache(&layer.data_path());
    assert_eq!((here(&sample, &layer), durable_until(&layer, 0)), (12, 12 << 16));
    drop((layer, store));
    let store = open(&disk);
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    assert_eq!(here(&sample, &layer), 12);
    drop(layer);
    complete(&disk, store, &sample);
}

fn bits_set_while_a_flush_fails_are_not_recorded() {
    let (disk, sample) = (disk(), files());
    let mut store = open(&disk);
    for round in 0..20 {
        let layer = store.add_layer(&sample.index).expect("layer");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        match store.flush(&layer) {
                            Ok(()) | Err(StoreError::Lost { .. }) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                });
            }
            disk.fail("writes", ANY);
            for (number, chunk) in sample.chunks.iter().enumerate() {
                sample.insert(&layer, std::slice::from_ref(chunk), true);
                if number % 8 == round % 8 {
                    disk.heal();
                } else if number % 8 == (round + 3) % 8 {
                    disk.fail("writes", ANY);
                }
            }
            disk.heal();
            done.store(true, Ordering::Relaxed);
        });
        match store.flush(&layer) {
            Ok(()) | Err(StoreError::Lost { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        let path = layer.data_path();
        drop((layer, store));
        drop_cache(&path);
        store = open(&disk);
        let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
        here(&sample, &layer);
        assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new(), "round {round}");
        drop(layer);
        store.remove_layer(&sample.digest()).expect("removed");
    }
    store.add_layer(&sample.index).expect("layer");
    complete(&disk, store, &sample);
}

fn readers_never_see_what_the_disk_lost() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = 0;
                while !done.load(Ordering::Relaxed) || seen == 0 {
                    seen += here(&sample, &layer);
                }
            });
        }
        for round in 0..60 {
            if round % 3 < 2 {
                disk.fail("writes", ANY);
            }
            bring(&sample, &layer);
            // The flusher's turn, or the store's.
            let flushed = if round % 2 == 0 {
                write_back(&store, &layer.data_path()).is_ok()
            } else {
                store.flush(&layer).is_ok()
            };
            assert!(
                !flushed || round % 3 == 2 || layer.missing_chunks(0..u64::MAX).expect("missing").is_empty()
            );
            disk.heal();
            drop_cache(&layer.data_path());
        }
        done.store(true, Ordering::Relaxed);
    });
    drop(layer);
    complete(&disk, store, &sample);
}

fn what_waits_in_memory_outlives_a_failed_flush() {
    let (disk, sample) = (disk(), files());
    let root = disk.path().join("store");
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    drop(layer);
    let used = store.disk_bytes().expect("bytes");
    drop(store);
    let limits =
        StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(used + (1 << 20)), reserve_bytes: 0 };
    let store = Store::open_with(&root, limits).expect("store");
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    let kept = sample.insert(&layer, &sample.chunks, false);
    let waiting = layer.memory_bytes();
    assert!(waiting > 0 && kept < sample.chunks.len(), "{waiting} bytes, {kept} chunks");
    disk.fail("writes", ANY);
    assert!(matches!(store.flush(&layer), Err(StoreError::Lost { .. })));
    assert_eq!(layer.memory_bytes(), waiting);
    assert_eq!(here(&sample, &layer), (waiting >> 16) as usize);
    disk.heal();
    drop((layer, store));
    complete(&disk, open(&disk), &sample);
}

fn a_bad_block_keeps_nothing_else_from_the_disk() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    disk.fail("writes", "SLUICE-0003");
    for round in 0.. {
        bring(&sample, &layer);
        assert_eq!(here(&sample, &layer), sample.chunks.len());
        let flushed = store.flush(&layer);
        if flushed.is_ok() && layer.missing_chunks(0..u64::MAX).expect("missing").is_empty() {
            break;
        }
        assert!(round < 50, "{flushed:?}");
    }
    // File 3's chunks are 9, 10 and 11.
    assert_eq!((durable_until(&layer, 0), layer.memory_bytes()), (9 << 16, 3 << 16));
    assert_eq!(durable_until(&layer, 12 << 16), sample.data.len() as u64);
    assert!(matches!(store.mark_complete(&layer), Err(StoreError::OnlyInMemory(_))));
    drop_cache(&layer.data_path());
    assert_eq!(here(&sample, &layer), sample.chunks.len());
    disk.heal();
    store.mark_complete(&layer).expect("complete");
    assert_eq!(layer.memory_bytes(), 0);
    drop(layer);
    complete(&disk, store, &sample);
}

/// Each chunk is written and flushed by itself after it was lost. One that fails then must not take along those before it.
fn what_was_flushed_singly_outlives_a_neighbours_failure() {
    let (disk, sample) = (disk(), files());
    let store = Store::open(&disk.path().join("store"), 64 << 20).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    disk.fail("writes", ANY);
    bring(&sample, &layer);
    assert!(matches!(store.flush(&layer), Err(StoreError::Lost { .. })));
    // File 3's chunks are 9, 10 and 11.
    disk.fail("writes", "SLUICE-0003");
    bring(&sample, &layer);
    store.flush(&layer).expect("what the disk does not take is in memory");
    let recorded = durable_until(&layer, 0) as usize;
    drop_cache(&layer.data_path());
    assert!(fs::read(layer.data_path()).expect("read")[..recorded] == sample.data[..recorded]);
    assert_eq!(here(&sample, &layer), sample.chunks.len());
    disk.heal();
    drop(layer);
    complete(&disk, store, &sample);
}

fn what_cannot_be_read_any_more_is_missing() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    bring(&sample, &layer);
    store.mark_complete(&layer).expect("complete");
    disk.fail("reads", "SLUICE-0003");
    drop_cache(&layer.data_path());
    let lost = sample.chunks.len() - here(&sample, &layer);
    // The kernel reads neighbours together, so that these may be lost with them.
    assert!((3..12).contains(&lost) && !layer.has(9 << 16..10 << 16), "{lost} are lost");
    assert!(!layer.is_complete());
    assert!(durable_until(&layer, 0) <= 9 << 16, "nobody is told that it is on the disk");
    store.flush(&layer).expect("flush");
    drop((layer, store));
    let store = open(&disk);
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    let missing = layer.missing_chunks(0..u64::MAX).expect("missing");
    assert_eq!((layer.is_complete(), missing.len()), (false, lost), "it was recorded");
    bring(&sample, &layer);
    store.flush(&layer).expect("flush");
    // Written where it cannot be read: it does not go round in circles, a reader has it from memory until it is on the disk.
    drop_cache(&layer.data_path());
    let lost = sample.chunks.len() - here(&sample, &layer);
    assert!((3..12).contains(&lost), "{lost} are lost");
    bring(&sample, &layer);
    assert_eq!((here(&sample, &layer), layer.memory_bytes()), (sample.chunks.len(), (lost as u64) << 16));
    let report = store.fsck().expect("fsck");
    assert_eq!(report.problems, Vec::<String>::new());
    disk.heal();
    drop(layer);
    complete(&disk, store, &sample);
    // And so it is for fsck, which says so.
    let store = open(&disk);
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    disk.fail("reads", "SLUICE-0005");
    drop_cache(&layer.data_path());
    let report = store.fsck().expect("fsck");
    assert_eq!((report.problems.len() >= 3, report.damaged.len()), (true, 1), "{:?}", report.problems);
    disk.heal();
}

fn an_ingest_whose_writes_are_lost_is_no_layer() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let mut ingest = store.begin_ingest().expect("ingest");
    ingest.write(0, &sample.data).expect("write");
    disk.fail("writes", ANY);
    store.commit_ingest(ingest, &sample.index).expect_err("the disk took nothing");
    disk.heal();
    assert!(store.layer(&sample.digest()).expect("layer").is_none());
    assert_eq!(fs::read_dir(store.temporary()).expect("tmp").count(), 0);
    let mut ingest = store.begin_ingest().expect("ingest");
    ingest.write(0, &sample.data).expect("write");
    assert!(store.commit_ingest(ingest, &sample.index).expect("commit").is_complete());
    complete(&disk, store, &sample);
}

fn a_disk_that_goes_read_only_shows_no_holes() {
    let (disk, sample) = (disk(), files());
    let store = open(&disk);
    let layer = store.add_layer(&sample.index).expect("layer");
    sample.insert(&layer, &sample.chunks[..6], false);
    store.flush(&layer).expect("flush");
    disk.fail("flushes", "");
    for _ in 0..5 {
        bring(&sample, &layer);
        store.flush(&layer).expect_err("a flush that fails");
        assert!(here(&sample, &layer) >= 6);
    }
    bring(&sample, &layer);
    assert_eq!(here(&sample, &layer), sample.chunks.len(), "readers have it from memory");
    let path = layer.data_path();
    drop((layer, store));
    // As after a reboot.
    disk.heal();
    disk.mount_again();
    drop_cache(&path);
    complete(&disk, open(&disk), &sample);
}

/// A file on the disk is being written when this process ends.
fn die_while_writing() -> ! {
    let disk = disk();
    println!("{}", disk.path().parent().expect("a directory").display());
    let file = File::create(disk.path().join("file")).expect("file");
    let bytes = marked(1, 1 << 20);
    let ending = std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(50));
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL)
    });
    for round in 0.. {
        file.write_all_at(&bytes, (round % 8) << 20).and_then(|()| file.sync_data()).expect("written");
        assert!(!ending.is_finished());
    }
    unreachable!("the loop does not end")
}

fn a_test_that_is_killed_leaves_nothing() {
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program).arg(DIE).output().expect("started");
    let dir = PathBuf::from(String::from_utf8(output.stdout).expect("text").trim_end());
    assert!(!output.status.success() && dir.is_absolute(), "{dir:?}");
    let since = Instant::now();
    let left = || {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        mounts.lines().filter(|line| line.contains(&*dir.to_string_lossy())).count()
    };
    while left() > 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "{} mounts are left", left());
        std::thread::sleep(Duration::from_millis(20));
    }
    let synced = Command::new("timeout").args(["120", "sync"]).status().expect("sync");
    assert!(synced.success(), "a sync hangs");
    fs::remove_dir_all(&dir).expect("removed");
}
