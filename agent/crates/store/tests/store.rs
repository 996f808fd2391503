//! The store as its users see it: layers replaced while held, damage found, contents copied, room made, holders kept.

mod rig;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rig::{Disk, Sample, noise, sample};
use sluice_image::records::DigestAlgorithm;
use sluice_store::{ImageRecord, InUse, Store, StoreError, StoreLimits};

fn image(number: u8, layers: &[&Sample], last_used: u64) -> ImageRecord {
    ImageRecord {
        manifest_digest: format!("sha256:{}", hex::encode([number; 32])),
        references: vec![format!("registry.example/image:{number}")],
        manifest: "{}".to_owned(),
        config: "{}".to_owned(),
        layers: layers.iter().map(|layer| layer.digest()).collect(),
        layer_blocks: layers.iter().map(|layer| layer.data.len() as u64 / 4096).collect(),
        last_used,
    }
}

fn complete(store: &Store, sample: &Sample) {
    let layer = store.add_layer(&sample.index).expect("layer");
    assert_eq!(sample.insert(&layer, &sample.chunks, false), sample.chunks.len());
    store.mark_complete(&layer).expect("complete");
}

#[test]
fn an_old_handle_records_nothing_for_its_successor() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&[noise(1, 300_000), noise(2, 5000)]));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let old = store.add_layer(&sample.index).expect("layer");
    sample.insert(&old, &sample.chunks, false);
    store.remove_layer(&sample.digest()).expect("remove");
    let new = store.add_layer(&sample.index).expect("layer again");
    assert!(matches!(store.flush(&old), Err(StoreError::Superseded(_))));
    assert!(matches!(store.mark_complete(&old), Err(StoreError::Superseded(_))));
    assert!(!new.is_complete() && new.local_bytes() == 0);
    assert!(old.open_data().is_err() && new.open_data().is_ok(), "the path is the successor's");
    // The old handle still reads its own file.
    assert!(sample.check(&old, &sample.chunks[0]) && !sample.check(&new, &sample.chunks[0]));
    drop((old, new, store));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let kept = store.layer(&sample.digest()).expect("layer").expect("kept");
    assert!(
        !kept.is_complete() && kept.local_bytes() == 0,
        "{} bytes came out of nothing",
        kept.local_bytes()
    );
}

#[test]
fn an_ingest_takes_the_place_of_a_partial_layer() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&[noise(1, 300_000)]));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let partial = store.add_layer(&sample.index).expect("layer");
    sample.insert(&partial, &sample.chunks[..1], false);
    store.flush(&partial).expect("flush");
    let mut ingest = store.begin_ingest().expect("ingest");
    sluice_image::index::ContentSink::write(&mut ingest, 0, &sample.data).expect("write");
    let whole = store.commit_ingest(ingest, &sample.index).expect("commit");
    assert!(whole.is_complete() && !partial.is_complete());
    assert!(matches!(store.mark_complete(&partial), Err(StoreError::NotFull(_) | StoreError::Superseded(_))));
    assert_eq!(fs::read_dir(store.temporary()).expect("tmp").count(), 0, "something is left behind");
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

#[test]
fn a_layer_that_is_not_all_there_is_never_complete() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&[noise(1, 300_000)]));
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(0), reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    sample.insert(&layer, &sample.chunks[1..], false);
    assert!(matches!(store.mark_complete(&layer), Err(StoreError::NotFull(_))));
    sample.insert(&layer, &sample.chunks[..1], false);
    // All verified, but only in memory.
    assert!(layer.is_full() && layer.memory_bytes() == 300_000);
    assert!(matches!(store.mark_complete(&layer), Err(StoreError::OnlyInMemory(_))));
    drop((layer, store));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    assert!(!layer.is_complete() && layer.local_bytes() == 0);
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

#[test]
fn fsck_goes_on_past_what_it_cannot_read() {
    let dir = tempfile::tempdir().expect("dir");
    let samples: Vec<Sample> =
        (1..5).map(|seed| sample(&[noise(seed, 200_000), noise(seed + 100, 9000)])).collect();
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    for sample in &samples {
        complete(&store, sample);
    }
    let place = |sample: &Sample, name: &str| {
        dir.path().join("layers").join(sample.digest().trim_start_matches("sha256:")).join(name)
    };
    // A directory in the index's place cannot be read, nor can a file that is gone; one layer is damaged, one is well.
    fs::remove_file(place(&samples[0], "index")).expect("remove");
    fs::create_dir(place(&samples[0], "index")).expect("create");
    fs::remove_file(place(&samples[1], "data")).expect("remove");
    let damaged = fs::File::options().write(true).open(place(&samples[2], "data")).expect("open");
    damaged.write_all_at(b"damage", 70_000).expect("write");
    let report = store.fsck().expect("fsck");
    assert_eq!(report.layers, 4);
    assert_eq!(report.problems.len(), 3, "{:?}", report.problems);
    assert!(report.problems.iter().any(|line| line.contains("bytes 65536..131072 are not what they were")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
    let told =
        async { tokio::time::timeout(std::time::Duration::from_secs(5), store.lost().notified()).await };
    runtime.block_on(told).expect("who reads complete layers' files is told");
    for (sample, complete) in [(&samples[2], false), (&samples[3], true)] {
        let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
        assert_eq!(layer.is_complete(), complete);
    }
    let layer = store.layer(&samples[2].digest()).expect("layer").expect("kept");
    assert_eq!(layer.missing_chunks(0..u64::MAX).expect("missing").len(), 1);
    assert!(
        samples[2].check(&layer, &samples[2].chunks[0]) && !samples[2].check(&layer, &samples[2].chunks[1])
    );
}

#[test]
fn fsck_reads_from_memory_what_is_only_there() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&[noise(1, 300_001), noise(2, 5)]));
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(0), reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    assert_eq!(sample.insert(&layer, &sample.chunks, false), sample.chunks.len());
    assert_eq!(layer.memory_bytes(), 300_006);
    let report = store.fsck().expect("fsck");
    assert_eq!((report.problems, report.chunks_checked), (Vec::new(), sample.chunks.len() as u64));
    assert!(sample.chunks.iter().all(|chunk| sample.check(&layer, chunk)));
    // Padding too, and across chunks.
    let mut all = vec![0xAA; sample.data.len()];
    assert!(layer.try_read(0, &mut all).expect("read") && all == sample.data);
}

#[test]
fn readers_never_see_a_hole_while_memory_is_written_or_evicted() {
    let files: Vec<Vec<u8>> = (0..100).map(|seed| noise(seed, 65536)).collect();
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&files));
    // Room in memory for a part of the layer; the quota comes and goes with `fill`.
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(0), reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (done, layer, sample) = (&done, &layer, &sample);
            scope.spawn(move || {
                let mut seen = 0;
                while !done.load(Ordering::Relaxed) || seen == 0 {
                    for chunk in sample.chunks.iter().skip(seed) {
                        seen += usize::from(sample.check(layer, chunk));
                    }
                }
            });
        }
        for _ in 0..200 {
            assert_eq!(sample.insert(&layer, &sample.chunks, true), sample.chunks.len());
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(layer.memory_bytes() <= 5 << 20, "{} bytes are held", layer.memory_bytes());
}

#[test]
fn what_another_layer_has_is_copied_and_checked() {
    let dir = tempfile::tempdir().expect("dir");
    let shared = [noise(1, 200_000), noise(2, 5000), noise(3, 70_000)];
    let source = sample(&[noise(9, 10_000), shared[0].clone(), shared[1].clone(), shared[2].clone()]);
    let target = sample(&[shared[2].clone(), noise(8, 100_000), shared[0].clone(), shared[1].clone()]);
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    complete(&store, &source);
    // Damage to one of the shared files: found when it is copied.
    let data = dir.path().join("layers").join(source.digest().trim_start_matches("sha256:")).join("data");
    let offset =
        source.chunks.iter().find(|chunk| chunk.len.get() == 5000).expect("chunk").store_offset.get();
    fs::File::options()
        .write(true)
        .open(&data)
        .and_then(|file| file.write_all_at(b"!", offset))
        .expect("damage");
    let layer = store.add_layer(&target.index).expect("layer");
    let copies = store.local_copies(&layer).expect("copies");
    let mut copied = 0;
    for chunk in &target.chunks {
        copied += u32::from(copies.copy(&layer, chunk, DigestAlgorithm::Blake3).expect("copy"));
    }
    // 200,000 bytes are four chunks, 70,000 are two; the damaged one and the target's own are not copied.
    assert_eq!((copies.len(), copied), (7, 6));
    assert_eq!(target.chunks.iter().filter(|chunk| target.check(&layer, chunk)).count(), 6);
    store.flush(&layer).expect("flush");
    drop((layer, copies, store));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = store.layer(&target.digest()).expect("layer").expect("kept");
    assert_eq!(target.chunks.iter().filter(|chunk| target.check(&layer, chunk)).count(), 6);
}

/// What `du` counts, by itself.
fn allocated(path: &Path) -> u64 {
    let output =
        std::process::Command::new("du").args(["-s", "--block-size=1"]).arg(path).output().expect("du");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace().next().expect("a number").parse().expect("a number")
}

#[test]
fn the_quota_evicts_what_was_used_longest_ago_and_nobody_holds() {
    let dir = tempfile::tempdir().expect("dir");
    let samples: Vec<Sample> = (1..6).map(|seed| sample(&[noise(seed, 1_000_000)])).collect();
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    for sample in &samples {
        complete(&store, sample);
    }
    let used: [u64; 4] = [5, 10, 20, 30];
    // The last layer belongs to images 0 and 1; images 2 and 3 are in use, the caller says.
    let images: Vec<ImageRecord> = (0..4)
        .map(|at| {
            let layers = if at < 2 { vec![&samples[at], &samples[4]] } else { vec![&samples[at]] };
            image(at as u8, &layers, used[at])
        })
        .collect();
    for image in &images {
        store.put_image(image).expect("image");
        fs::write(store.erofs_path(&image.manifest_digest).expect("path"), [1; 5000]).expect("metadata");
    }
    // Used since: it is not the oldest any more.
    store.touch_image(&images[0].manifest_digest).expect("touch");
    let before = store.disk_bytes().expect("bytes");
    assert_eq!(before, allocated(dir.path()));
    drop(store);
    let quota = before - 1_500_000;
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(quota), reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let mut in_use = InUse {
        images: [2, 3].map(|at| images[at].manifest_digest.clone()).into(),
        layers: HashSet::from([samples[2].digest()]),
    };
    let freed = store.make_room(0, &in_use).expect("room");
    // Image 1 was used longest ago, but its shared layer stays with image 0, so image 0 goes too.
    assert_eq!((freed.images, freed.layers), (2, 3), "{freed:?}");
    let after = store.disk_bytes().expect("bytes");
    assert_eq!(after, allocated(dir.path()));
    assert!(after <= quota && before - after <= freed.bytes + (1 << 20), "{before} {after} {freed:?}");
    let left: Vec<String> =
        store.images().expect("images").into_iter().map(|one| one.manifest_digest).collect();
    assert_eq!(left, [images[2].manifest_digest.clone(), images[3].manifest_digest.clone()]);
    // Nothing more goes, however much is wanted, until it is let go.
    assert_eq!(store.make_room(1 << 40, &in_use).expect("room").layers, 0);
    in_use.images.remove(&images[3].manifest_digest);
    assert_eq!(store.make_room(1 << 40, &in_use).expect("room").images, 1);
    assert_eq!(store.layers().expect("layers"), [samples[2].digest()]);
}

#[test]
fn the_quota_counts_blocks_and_not_sizes() {
    // A hole of 2 MB, and contents that need two blocks though they are little more than one.
    let small: Vec<Vec<u8>> = (0..40).map(|seed| noise(seed + 1, 4200)).collect();
    let sample = sample(&[vec![vec![0; 2_000_000]], small].concat());
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 0).expect("store");
    drop(store.add_layer(&sample.index).expect("layer"));
    // Several names of one file count once, as for `du`.
    let unpacked = dir.path().join("unpacked").join("ab".repeat(32));
    fs::create_dir_all(&unpacked).expect("dir");
    fs::write(unpacked.join("one"), [1; 500_000]).expect("write");
    (0..5).for_each(|link| {
        fs::hard_link(unpacked.join("one"), unpacked.join(format!("{link}"))).expect("link")
    });
    let used = store.disk_bytes().expect("bytes");
    assert_eq!(used, allocated(dir.path()));
    drop(store);
    // The database may grow a little by being opened.
    let quota_bytes = Some(used + 40 * 8192 + 16 * 8192);
    let limits = StoreLimits { memory_budget_bytes: 0, quota_bytes, reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    let zeros = holes(&sample);
    assert!(zeros > 20, "{zeros} chunks are a hole");
    for chunk in &sample.chunks {
        match chunk.len.get() {
            4200 => assert!(layer.insert_verified(chunk, &sample.bytes(chunk), false), "it has its place"),
            _ => layer.insert_hole(chunk),
        }
    }
    assert!(layer.is_full() && layer.memory_bytes() == 0);
    // Written again they count again, until it is measured.
    let again = sample.chunks.iter().find(|chunk| chunk.len.get() == 4200).expect("a chunk");
    let more = (0..100).take_while(|_| layer.insert_verified(again, &sample.bytes(again), false)).count();
    assert!(more <= 16 && layer.disk_full(), "{more} more");
}

/// How many chunks of a sample are zeros.
fn holes(sample: &Sample) -> usize {
    sample.chunks.iter().filter(|chunk| sample.bytes(chunk).iter().all(|byte| *byte == 0)).count()
}

#[test]
fn what_is_mounted_in_the_store_is_none_of_its_bytes() {
    let mounted = Disk::tmpfs(4 << 20);
    let store = Store::open(mounted.path().parent().expect("a directory"), 1 << 20).expect("store");
    let before = store.disk_bytes().expect("bytes");
    fs::write(mounted.path().join("file"), [1; 1 << 20]).expect("written");
    assert_eq!(store.disk_bytes().expect("bytes"), before);
}

#[test]
fn accounting_and_gc_say_what_they_cannot_read() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    // A file in the place of the directory of unpacked layers.
    fs::write(dir.path().join("unpacked"), b"").expect("write");
    let error = store.gc(&|_| false).expect_err("gc of what is no directory");
    assert!(error.to_string().contains("unpacked"), "{error}");
    assert!(fs::metadata(dir.path()).expect("stat").blocks() > 0);
}

#[test]
fn leftovers_of_a_crash_are_cleared_and_half_removed_layers_forgotten() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, two) = (sample(&[noise(1, 100_000)]), sample(&[noise(2, 100_000)]));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    complete(&store, &one);
    complete(&store, &two);
    drop(store);
    let place =
        |sample: &Sample| dir.path().join("layers").join(sample.digest().trim_start_matches("sha256:"));
    // As after a crash between the rename and the transaction of a removal, and of an addition.
    fs::rename(place(&one), dir.path().join("tmp/removed")).expect("rename");
    fs::create_dir(dir.path().join("layers").join("ab".repeat(32))).expect("create");
    fs::write(dir.path().join("images").join("unrecorded.erofs"), b"").expect("write");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    assert_eq!(store.layers().expect("layers"), [two.digest()]);
    assert!(store.layer(&one.digest()).expect("layer").is_none());
    for (name, count) in [("tmp", 0), ("layers", 1), ("images", 0)] {
        assert_eq!(fs::read_dir(dir.path().join(name)).expect("list").count(), count, "{name}");
    }
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

#[test]
fn files_that_vanish_are_fetched_again_and_never_read_as_holes() {
    let sample = sample(&[noise(1, 300_000), noise(2, 5000)]);
    for gone in ["data", "chunks", "extents", "index"] {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), 0).expect("opened");
        complete(&store, &sample);
        let old = store.layer(&sample.digest()).expect("read").expect("there");
        std::fs::remove_file(old.data_path().with_file_name(gone)).expect("removed");
        let report = store.fsck().expect("checked");
        assert_eq!((report.problems.len(), report.damaged.len()), (1, 1), "{gone}: {:?}", report.problems);
        let new = store.layer(&sample.digest()).expect("opened");
        assert_eq!(new.is_some(), gone != "index", "without its index it is forgotten");
        // What an old handle learns says nothing of the new file.
        sample.insert(&old, &sample.chunks, false);
        assert!(store.flush(&old).is_ok() || new.is_some());
        if let Some(new) = new {
            assert!(!new.is_complete() && !sample.check(&new, &sample.chunks[0]));
            sample.insert(&new, &sample.chunks, false);
            assert!(sample.check(&new, &sample.chunks[0]));
        }
        assert!(store.fsck().expect("checked").damaged.is_empty(), "{gone}");
    }
}

#[test]
fn parts_are_read_recorded_and_forgotten_when_nothing_proves_them() {
    use sluice_image::parts::{PART_SIZE, Part, part_value};
    // A chunk of 64 KiB, then one of 44,464 bytes: ten parts and a shorter one.
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample(&[noise(1, 110_000)]));
    let part = PART_SIZE as usize;
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = store.add_layer(&sample.index).expect("layer");
    let read = |layer: &sluice_store::Layer, range: std::ops::Range<usize>| {
        let mut bytes = vec![0; range.len()];
        let there = layer.try_read(range.start as u64, &mut bytes).expect("read");
        assert!(!there || bytes == sample.data[range]);
        there
    };
    let insert = |layer: &sluice_store::Layer, chunk: usize, numbers: &[usize]| {
        let (start, len) = (sample.chunks[chunk].store_offset.get() as usize, sample.chunks[chunk].len.get());
        let parts = numbers.iter().map(|number| {
            let (offset, end) = (number * part, ((number + 1) * part).min(len as usize));
            let bytes = &sample.data[start + offset..start + end];
            Part { offset: offset as u32, bytes, value: part_value(offset as u32, bytes) }
        });
        layer.insert_parts(&sample.chunks[chunk], &parts.collect::<Vec<_>>())
    };
    assert!(insert(&layer, 0, &[1, 2, 5]) && insert(&layer, 1, &[10]));
    assert_eq!(layer.missing_parts(&sample.chunks[0]), 0xffff & !0b10_0110);
    let last = 65_536 + 10 * part;
    for durable in [false, true] {
        assert!(read(&layer, part..3 * part) && read(&layer, part + 100..2 * part + 1));
        assert!(read(&layer, last..110_000) && !read(&layer, last - 1..110_000));
        assert!(!read(&layer, part..3 * part + 1) && !read(&layer, 0..1) && read(&layer, 5 * part..6 * part));
        let runs =
            [0, part, 3 * part, last].map(|from| layer.durable_in(from as u64..last as u64 + part as u64));
        let ends = [part..3 * part, part..3 * part, 5 * part..6 * part, last..last + part];
        let ends = ends.map(|run| run.start as u64..run.end as u64);
        assert!(if durable { runs == ends } else { runs.iter().all(std::ops::Range::is_empty) }, "{runs:?}");
        store.flush(&layer).expect("flush");
    }
    let missing = layer.first_missing(part as u64..4 * part as u64).expect("look").expect("missing");
    assert_eq!(missing.store_offset.get(), 0);
    assert!(layer.first_missing(part as u64..3 * part as u64).expect("look").is_none());
    // They are proved as long as this process lives.
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    assert!(read(&layer, part..3 * part));
    drop((layer, store));
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = store.layer(&sample.digest()).expect("layer").expect("kept");
    assert!(read(&layer, part..3 * part), "what was recorded is there");
    let before = layer.local_bytes();
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    assert!(before > 0 && layer.local_bytes() == 0 && !read(&layer, part..2 * part));
    // Not recorded, and changed on the disk: not read, and fetched again, as a whole.
    assert!(insert(&layer, 0, &[0, 1, 3]) && insert(&layer, 1, &[0, 1]));
    let file = fs::File::options().write(true).open(layer.data_path()).expect("open");
    file.write_all_at(b"damage", 3 * part as u64).expect("write");
    assert!(read(&layer, 0..2 * part) && !read(&layer, 3 * part..4 * part));
    assert!(!read(&layer, 0..part) && !insert(&layer, 0, &[0]), "who can tell what else is lost");
    file.write_all_at(b"damage", 65_536 + part as u64).expect("write");
    let problems = store.fsck().expect("fsck").problems;
    assert!(
        matches!(problems.as_slice(), [one, ..] if one.contains("bytes 65536..110000 are not what they were")),
        "{problems:?}"
    );
    assert!(!read(&layer, 65_536..65_537));
    // The whole chunk takes their place.
    assert!(insert(&layer, 1, &[1]));
    assert_eq!(sample.insert(&layer, &sample.chunks, false), 2);
    assert!(read(&layer, 0..110_000));
    store.mark_complete(&layer).expect("complete");
    assert!(read(&layer, 0..110_000));
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}
