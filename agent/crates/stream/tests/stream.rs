//! A streamed layer against its own content: demand reads, fill, holes, outages, damage, a lying index, the first pull.

mod rig;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rig::{LONG, NO_WAIT, Sample, Source, gzip, gzip_sample, noise, plain_sample, tar_of};
use sluice_store::{Store, StoreLimits};
use sluice_stream::{BlobSource, Lane, Scheduler, StreamError, first_pull};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    (dir, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_right_and_a_fill_completes_the_layer() {
    let ((dir, store), sample) = (store(), gzip_sample());
    let layer = sample.streamed(&store, Source::new(&sample.layer), &Scheduler::new(2), LONG);
    let (_, start, content) = &sample.files[30];
    let mut buffer = vec![0; content.len()];
    assert!(!layer.try_read(*start, &mut buffer).expect("read"));
    let readers = (0..8).map(|_| sample.check(&layer));
    futures::future::join_all(readers).await;
    layer.fill().await.expect("fill");
    assert!(*layer.completion().borrow() && layer.layer().is_complete());
    drop(layer);
    sample.check_complete(store, dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_come_all_at_once_and_damaged_ones_are_fetched_again() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let index = Source::new(&bytes::Bytes::copy_from_slice(sample.index.blob()));
    let streamed = |index: &Source| {
        let source = Source::new(&sample.layer);
        sample.streamed_by_index(&store, source, index.clone(), &Scheduler::new(2), LONG)
    };
    let layer = streamed(&index);
    let (_, start, content) = sample.files.last().expect("files");
    assert!(layer.read(*start, content.len()).await.expect("read") == content.as_slice());
    let windows = layer.layer().windows_path();
    while !windows.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(index.asked().len() <= 2, "{:?}", index.asked());
    drop(layer);
    let mut damaged = std::fs::read(&windows).expect("windows");
    damaged.iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&windows, damaged).expect("written");
    let again = Source::new(&bytes::Bytes::copy_from_slice(sample.index.blob()));
    sample.check(&streamed(&again)).await;
    assert_eq!(again.asked().len(), again.0.asked_elsewhere.load(Ordering::SeqCst) as usize);
    assert!(!again.asked().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layers_bytes_do_not_wait_for_their_window() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let blob = bytes::Bytes::copy_from_slice(sample.index.blob());
    // No window comes as long as the test runs.
    let index = Source::with(&blob, |slow| (slow.rate, slow.delay) = (1 << 30, LONG * 10));
    let source = Source::new(&sample.layer);
    let layer = sample.streamed_by_index(&store, source.clone(), index, &Scheduler::new(2), LONG);
    let start = sample.files.last().expect("files").1;
    let reading = tokio::spawn(async move { layer.read(start, 1).await });
    let asked = async {
        while source.asked().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, asked).await.expect("the layer is asked for");
    reading.abort();
}

/// Offsets and lengths of a sparse file's data.
type Data<'a> = &'a [(u64, usize)];

/// Files with holes at their front, in the middle, at the end, and everywhere.
fn sparse_tar(format: &str) -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let dir = tempfile::tempdir().expect("dir");
    let mut contents = Vec::new();
    let pieces: [(&str, u64, Data); 5] = [
        ("front", 1 << 20, &[(700_000, 100_000)]),
        ("middle", 1 << 20, &[(0, 5000), (900_000, 148_576)]),
        ("end", 2 << 20, &[(0, 4096), (65536, 70_000)]),
        ("all", 3 << 20, &[]),
        ("last", 300_000, &[(0, 300_000)]),
    ];
    for (name, size, data) in pieces {
        let file = std::fs::File::create(dir.path().join(name)).expect("create");
        file.set_len(size).expect("size");
        let mut content = vec![0; size as usize];
        for (offset, len) in data {
            let bytes = noise(*offset + size, *len);
            file.write_all_at(&bytes, *offset).expect("write");
            content[*offset as usize..*offset as usize + len].copy_from_slice(&bytes);
        }
        contents.push((name.to_owned(), content));
    }
    let names = pieces.map(|(name, _, _)| name);
    let mut command = Command::new("tar");
    command.args(["--sparse", format, "-cf", "-", "-C"]).arg(dir.path()).args(names);
    let tar = command.output().expect("tar");
    assert!(tar.status.success());
    assert!(tar.stdout.len() < 1 << 20, "{format}: {} bytes: the holes were written", tar.stdout.len());
    (tar.stdout, contents)
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_of_sparse_files_are_verified_without_a_fetch() {
    for format in ["--format=gnu", "--format=pax"] {
        let (tar, contents) = sparse_tar(format);
        for blob in [tar.clone(), gzip(&tar)] {
            let ((dir, store), sample) = (store(), Sample::new(blob, contents.clone()));
            let source = Source::new(&sample.layer);
            let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
            let (name, start, content) = &sample.files[3];
            assert_eq!(name, "all");
            let got = layer.read(*start, content.len()).await.expect("read a hole");
            assert!(got.iter().all(|byte| *byte == 0) && source.asked().is_empty());
            tokio::time::timeout(LONG, layer.fill()).await.expect("the fill ends").expect("fill");
            sample.check(&layer).await;
            drop(layer);
            sample.check_complete(store, dir.path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_a_source_that_is_away() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let source = Source::with(&sample.layer, |source| {
        source.breaks = AtomicU32::new(4);
        source.refusals = AtomicU32::new(4);
    });
    let layer = sample.streamed(&store, source, &Scheduler::new(2), LONG);
    sample.check(&layer).await;
    store.remove_layer(&sample.digest()).expect("remove");
    let source = Source::with(&sample.layer, |source| source.refusals = AtomicU32::new(u32::MAX));
    let layer = sample.streamed(&store, source, &Scheduler::new(2), NO_WAIT);
    let began = Instant::now();
    // A fill waits for ever, but those who wait for what it fetches do not.
    let fill = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.fill().await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let reads = sample.files.iter().map(|(_, start, _)| layer.read(*start, 1));
    for error in futures::future::join_all(reads).await {
        let error = error.expect_err("read without a source");
        assert!(error.to_string().contains("connection refused"), "{error}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    fill.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_breaks_goes_on_where_it_broke() {
    let ((dir, store), sample) = (store(), plain_sample(1, 4, 300_000));
    let source = Source::with(&sample.layer, |source| source.breaks = AtomicU32::new(5));
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    layer.fill().await.expect("fill");
    let came = source.0.sent.load(Ordering::SeqCst);
    assert!(came <= sample.layer.len() as u64, "{came} of {} bytes came", sample.layer.len());
    drop(layer);
    sample.check_complete(store, dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_fetched_again_once_and_then_named() {
    let sample = plain_sample(1, 8, 200_000);
    // In the second chunk of file5.
    let extent_start = sample.layer.windows(64).position(|at| at == &sample.files[5].2[..64]).expect("found");
    let byte = extent_start as u64 + 100_000;
    let chunk = sample.files[5].1 + 65536;
    for times in [1, u32::MAX] {
        let (_dir, store) = store();
        let source = Source::with(&sample.layer, |source| source.damage = (byte, AtomicU32::new(times)));
        let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
        let reads = (0..20).map(|_| layer.read(chunk, 5000));
        for got in futures::future::join_all(reads).await {
            match (times, got) {
                (1, Ok(bytes)) => assert!(bytes == sample.files[5].2[65536..70536]),
                (u32::MAX, Err(error @ StreamError::Corrupt { offset, size, .. })) => {
                    assert_eq!((offset, size), (chunk, 65536), "{error}");
                }
                (_, got) => panic!("{got:?}"),
            }
        }
        let fetches = source.asked().iter().filter(|(range, _)| range.contains(&byte)).count();
        assert_eq!((fetches, source.0.asked_elsewhere.load(Ordering::SeqCst)), (2, 1));
        // All else is well, and comes.
        for at in [0, 4, 6, 7] {
            let (_, start, content) = &sample.files[at];
            assert!(layer.read(*start, content.len()).await.expect("read") == content.as_slice());
        }
        if times == u32::MAX {
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let text = layer.fill().await.expect_err("fill").to_string();
            assert!(
                text.contains("/file5") && text.contains(&chunk.to_string()) && text.contains("65536"),
                "{text}"
            );
            assert_eq!(layer.layer().missing_chunks(0..u64::MAX).expect("missing").len(), 1);
        } else {
            layer.fill().await.expect("fill");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_decode_is_named_by_its_place_and_never_shown() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let middle = sample.layer.len() as u64 / 2;
    let source = Source::with(&sample.layer, |source| source.damage = (middle, AtomicU32::new(u32::MAX)));
    let layer = sample.streamed(&store, source, &Scheduler::new(2), LONG);
    let mut caught = Vec::new();
    for (name, start, content) in &sample.files {
        match layer.read(*start, content.len()).await {
            Ok(bytes) => assert!(bytes == content.as_slice(), "wrong bytes were shown"),
            Err(StreamError::Corrupt { offset, size, .. }) => caught.push((name, offset, size)),
            Err(error) => panic!("{error}"),
        }
    }
    let total = layer.layer().size();
    assert!(!caught.is_empty() && caught.len() < sample.files.len(), "{caught:?}");
    for (name, offset, size) in &caught {
        assert!(
            *offset > total / 4 && offset + size < total * 3 / 4,
            "{name}: {size} bytes at {offset} of {total}"
        );
    }
    assert!(matches!(layer.fill().await, Err(StreamError::Corrupt { .. })));
    assert!(layer.layer().local_bytes() > total / 2, "the rest did not come");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_in_one_frame_is_streamed_in_order_and_reads_wait_for_it() {
    // Beyond 64 MiB without a place to begin, a layer has no random access.
    let mut files: Vec<_> =
        (0..14_u64).map(|at| (format!("big{at}"), noise(at, 1 << 20).repeat(5))).collect();
    files.push(("small".to_owned(), noise(99, 5000)));
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("encoder");
    encoder.long_distance_matching(true).and_then(|()| encoder.window_log(23)).expect("parameters");
    encoder.write_all(&tar_of(&files)).expect("compress");
    let ((dir, store), sample) = (store(), Sample::new(encoder.finish().expect("compress"), files));
    assert!(!sample.index.random_access());
    let source = Source::with(&sample.layer, |source| {
        source.rate = 30_000_000;
        source.piece = 100_000;
        source.breaks = AtomicU32::new(3);
    });
    // Shorter than the transfer takes: what counts is that bytes come.
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), NO_WAIT);
    let fill = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.fill().await }
    });
    let reads = sample.files.iter().rev().map(|(_, start, content)| layer.read(*start, content.len()));
    for (got, (name, _, content)) in
        futures::future::join_all(reads).await.into_iter().zip(sample.files.iter().rev())
    {
        assert!(got.expect("read") == content.as_slice(), "{name}");
    }
    fill.await.expect("joined").expect("fill");
    // One transfer, taken up where it broke.
    assert_eq!(
        source.asked().iter().filter(|(range, _)| range.start == 0).count(),
        1,
        "{:?}",
        source.asked()
    );
    drop(layer);
    sample.check_complete(store, dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_layer_has_is_not_fetched() {
    let (dir, store) = store();
    let shared: Vec<_> = (0..20).map(|at| (format!("shared{at}"), noise(at, 100_000))).collect();
    let first = Sample::new(gzip(&tar_of(&shared)), shared.clone());
    let layer = first.streamed(&store, Source::new(&first.layer), &Scheduler::new(2), LONG);
    layer.fill().await.expect("fill");
    drop(layer);
    let mut files = shared;
    files.push(("new".to_owned(), noise(1000, 150_000)));
    let second = Sample::new(gzip(&tar_of(&files)), files);
    let (source, scheduler) = (Source::new(&second.layer), Scheduler::new(2));
    let layer = second.streamed(&store, source.clone(), &scheduler, LONG);
    layer.fill().await.expect("fill");
    let came = scheduler.counters().bytes(Lane::Fill);
    let copied = scheduler.counters().copied_bytes.load(Ordering::Relaxed);
    assert_eq!(copied, 2_000_000);
    assert!(came < 500_000, "{came} of {} bytes came", second.layer.len());
    drop(layer);
    second.check_complete(store, dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_pauses_the_fill_and_not_the_reads() {
    let (disk, sample) = (rig::SmallDisk::new(24 << 20), plain_sample(1, 60, 250_000));
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: None, reserve_bytes: 2 << 20 };
    let (root, ballast) = (disk.dir.join("store"), disk.dir.join("ballast"));
    std::fs::write(&ballast, vec![1; 12 << 20]).expect("ballast");
    let store = Store::open_with(&root, limits).expect("store");
    let source = Source::new(&sample.layer);
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    let fill = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.fill().await }
    });
    while !layer.layer().disk_full() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Everything can be read, several times, though it fits neither the disk nor the memory.
    for _ in 0..2 {
        sample.check(&layer).await;
    }
    let came = source.asked().len();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!fill.is_finished() && source.asked().len() <= came + 1, "the fill goes on against a full disk");
    std::fs::remove_file(&ballast).expect("remove");
    tokio::time::timeout(LONG, fill).await.expect("the fill goes on").expect("joined").expect("fill");
    sample.check(&layer).await;
    drop(layer);
    sample.check_complete(store, &root);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_keeps_a_layer_only_if_it_is_the_images() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let (digest, scheduler) = (sample.digest(), Scheduler::new(2));
    let source = || -> Arc<dyn BlobSource> {
        Arc::new(Source::with(&sample.layer, |source| source.breaks = AtomicU32::new(2)))
    };
    let wrong = first_pull(&store, &scheduler, source(), (&digest, "sha256:00"), LONG, |_| {}).await;
    assert!(matches!(wrong, Err(StreamError::DiffId { .. })), "{wrong:?}");
    assert!(store.layers().expect("layers").is_empty());
    let diff_id = sample.index.header().diff_id_text();
    let pulled =
        first_pull(&store, &scheduler, source(), (&digest, &diff_id), LONG, |_| {}).await.expect("pull");
    assert!(pulled.layer.is_complete());
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_waits_for_a_source_as_long_as_it_may() {
    let ((_dir, store), sample) = (store(), gzip_sample());
    let (digest, diff_id) = (sample.digest(), sample.index.header().diff_id_text());
    let scheduler = Scheduler::new(2);
    let away = |times| -> Arc<dyn BlobSource> {
        Arc::new(Source::with(&sample.layer, |source| source.refusals = AtomicU32::new(times)))
    };
    let began = Instant::now();
    let failed = first_pull(&store, &scheduler, away(u32::MAX), (&digest, &diff_id), NO_WAIT, |_| {}).await;
    assert!(matches!(failed, Err(StreamError::Fetch { .. })), "{failed:?}");
    assert!(began.elapsed() >= NO_WAIT && began.elapsed() < NO_WAIT * 10, "{:?}", began.elapsed());
    // More refusals than any fixed number of attempts would outlast.
    let pulled =
        first_pull(&store, &scheduler, away(9), (&digest, &diff_id), LONG, |_| {}).await.expect("pull");
    assert!(pulled.layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_the_indexer_of_a_first_pull_is_bounded() {
    let (disk, sample) = (rig::SmallDisk::new(24 << 20), plain_sample(1, 60, 250_000));
    std::fs::write(disk.dir.join("ballast"), vec![1; 16 << 20]).expect("ballast");
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: None, reserve_bytes: 2 << 20 };
    let store = Store::open_with(&disk.dir.join("store"), limits).expect("store");
    let (digest, diff_id) = (sample.digest(), sample.index.header().diff_id_text());
    // As large as the pieces that a fast link gives.
    let source = Source::with(&sample.layer, |source| source.piece = 200_000);
    let (blob, scheduler) = (Arc::new(source.clone()), Scheduler::new(2));
    // The indexer stands still: there is no space.
    let failed = first_pull(&store, &scheduler, blob, (&digest, &diff_id), NO_WAIT * 5, |_| {}).await;
    assert!(matches!(failed, Err(StreamError::DiskFull { .. })), "{failed:?}");
    let held = source.0.held_most.load(Ordering::SeqCst);
    assert!(held <= 1_000_000, "{held} bytes waited");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_waits_for_space() {
    let (disk, sample) = (rig::SmallDisk::new(24 << 20), plain_sample(1, 60, 250_000));
    let ballast = disk.dir.join("ballast");
    std::fs::write(&ballast, vec![1; 12 << 20]).expect("ballast");
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: None, reserve_bytes: 2 << 20 };
    let store = Store::open_with(&disk.dir.join("store"), limits).expect("store");
    let (digest, diff_id) = (sample.digest(), sample.index.header().diff_id_text());
    let (scheduler, source) = (Scheduler::new(2), || Arc::new(Source::new(&sample.layer)));
    let failed = first_pull(&store, &scheduler, source(), (&digest, &diff_id), NO_WAIT, |_| {}).await;
    assert!(matches!(failed, Err(StreamError::DiskFull { .. })), "{failed:?}");
    let pull = first_pull(&store, &scheduler, source(), (&digest, &diff_id), LONG, |_| {});
    let free = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        std::fs::remove_file(&ballast).expect("remove");
    };
    let (pulled, ()) = tokio::join!(pull, free);
    assert!(pulled.expect("pull").layer.is_complete());
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}
