//! A full disk, real ones of a few MiB: reads go on from memory, nothing is lost, all comes to the disk when there is space.

mod rig;

use std::fs;
use std::path::Path;

use rig::{Disk, Sample, noise, sample};
use sluice_store::{Layer, Store, StoreError, StoreLimits};

fn limits(reserve_bytes: u64) -> StoreLimits {
    StoreLimits { memory_budget_bytes: 2 << 20, quota_bytes: None, reserve_bytes }
}

/// 24 files of 512 KiB.
fn big() -> Sample {
    sample(&(0..24).map(|seed| noise(seed + 1, 512 * 1024)).collect::<Vec<_>>())
}

fn here(sample: &Sample, layer: &Layer) -> usize {
    sample.chunks.iter().filter(|chunk| sample.check(layer, chunk)).count()
}

/// Takes all space that is left, as another program would.
fn take_the_rest(dir: &Path) {
    let mut len = 1 << 20;
    let path = dir.join("ballast");
    let file = fs::File::create(&path).expect("ballast");
    let mut at = 0;
    while len >= 512 {
        match std::os::unix::fs::FileExt::write_at(&file, &vec![1; len], at) {
            Ok(written) => at += written as u64,
            Err(_) => len /= 2,
        }
    }
}

fn fills_up_and_recovers(disk: &Disk, reserve_bytes: u64) {
    let (root, sample) = (disk.path().join("store"), big());
    let store = Store::open_with(&root, limits(reserve_bytes)).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    let kept = sample.insert(&layer, &sample.chunks, false);
    store.settle();
    assert!(kept < sample.chunks.len() && layer.disk_full(), "{kept} of {} fit", sample.chunks.len());
    let in_memory = layer.memory_bytes() / u64::from(rig::CHUNK);
    assert!(in_memory > 0);
    assert_eq!(here(&sample, &layer), kept);
    // Somebody waits for each of the rest: older ones go for them, and each is readable when it comes.
    for chunk in &sample.chunks[kept..] {
        assert!(layer.insert_verified(chunk, &sample.bytes(chunk), true) && sample.check(&layer, chunk));
    }
    assert!(layer.memory_bytes() <= 4 << 20, "{}", layer.memory_bytes());
    let on_disk = kept - in_memory as usize;
    // What is on the disk is recorded, though there is more in memory.
    let flushed = store.flush(&layer);
    assert!(!matches!(store.mark_complete(&layer), Ok(())));
    if reserve_bytes > 0 {
        flushed.expect("the reserve is there for this");
        drop((layer, store));
        let store = Store::open_with(&root, limits(reserve_bytes)).expect("store");
        let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
        assert_eq!(here(&sample, &layer), on_disk);
        assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
        finish(disk, &store, &layer, &sample);
    } else {
        finish(disk, &store, &layer, &sample);
    }
}

/// Makes space and brings the rest.
fn finish(disk: &Disk, store: &Store, layer: &Layer, sample: &Sample) {
    fs::remove_file(disk.path().join("ballast")).expect("remove");
    let missing = layer.missing_chunks(0..u64::MAX).expect("missing");
    assert_eq!(sample.insert(layer, &missing, false), missing.len());
    assert!(!layer.disk_full());
    store.mark_complete(layer).expect("complete");
    assert_eq!((layer.memory_bytes(), here(sample, layer)), (0, sample.chunks.len()));
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    assert!(fs::read(layer.data_path()).expect("read") == sample.data);
}

fn with_ballast(disk: Disk, ballast: u64) -> Disk {
    fs::write(disk.path().join("ballast"), vec![1; ballast as usize]).expect("ballast");
    disk
}

#[test]
fn a_full_ext4_with_a_reserve() {
    fills_up_and_recovers(&with_ballast(Disk::ext4(48 << 20), 27 << 20), 4 << 20);
}

#[test]
fn a_full_tmpfs_with_a_reserve() {
    fills_up_and_recovers(&with_ballast(Disk::tmpfs(32 << 20), 18 << 20), 4 << 20);
}

/// Writes are refused that had been admitted: also those that were queued.
#[test]
fn a_full_tmpfs_without_a_reserve() {
    fills_up_and_recovers(&with_ballast(Disk::tmpfs(32 << 20), 24 << 20), 0);
}

#[test]
fn a_disk_that_others_fill_to_the_last_byte() {
    for disk in [Disk::ext4(48 << 20), Disk::tmpfs(32 << 20)] {
        let (root, sample) = (disk.path().join("store"), big());
        let store = Store::open_with(&root, limits(1 << 20)).expect("store");
        let layer = store.add_layer(&sample.index).expect("layer");
        assert_eq!(sample.insert(&layer, &sample.chunks[..40], false), 40);
        store.flush(&layer).expect("flush");
        take_the_rest(disk.path());
        assert!(sample.insert(&layer, &sample.chunks[40..60], false) == 20 && layer.disk_full());
        // The database may or may not find room; either way it goes on, and memory is read.
        match store.flush(&layer) {
            Ok(()) => {}
            Err(error) => assert!(error.is_full(), "{error:?}"),
        }
        let added = store.add_layer(&rig::sample(&[noise(99, 2_000_000)]).index);
        assert!(added.as_ref().is_err_and(StoreError::is_full), "{added:?}");
        assert_eq!(here(&sample, &layer), 60);
        assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
        assert_eq!(store.layers().expect("layers"), [sample.digest()]);
        // A removal needs no space first.
        store.remove_layer(&sample.digest()).expect("remove on a full disk");
        drop(layer);
        let layer = store.add_layer(&sample.index).expect("layer");
        finish(&disk, &store, &layer, &sample);
        drop((layer, store));
        let store = Store::open_with(&root, limits(1 << 20)).expect("store");
        assert!(store.layer(&sample.digest()).expect("layer").expect("kept").is_complete());
    }
}
