//! Demand before background: how long a blocked read takes during a fill, how much is under way, and that nothing is fetched twice.
#![allow(clippy::print_stdout, reason = "what was measured")]

mod rig;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rig::{LONG, Source, plain_sample};
use sluice_store::{Store, StoreLimits};
use sluice_stream::{Lane, Scheduler, StreamedLayer};

fn filling(layer: &Arc<StreamedLayer>) -> tokio::task::JoinHandle<Result<(), sluice_stream::StreamError>> {
    let layer = Arc::clone(layer);
    tokio::spawn(async move { layer.fill().await })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_read_does_not_wait_for_the_fill() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    // 4 MB/s: a run of the fill takes a second, a span 50 ms.
    let sample = plain_sample(1, 80, 200_000);
    let source = Source::with(&sample.layer, |source| {
        source.rate = 4_000_000;
        source.piece = 16_384;
        source.delay = Duration::from_millis(2);
    });
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(3), LONG);
    let fill = filling(&layer);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut times = Vec::new();
    for at in (0..20).map(|step| (79 - step * 3) as usize) {
        let (name, start, content) = &sample.files[at];
        let began = Instant::now();
        let got = layer.read(*start, 100_000).await.expect("read");
        times.push(began.elapsed());
        assert!(got == content[..100_000], "{name}");
        tokio::time::sleep(Duration::from_millis(if at % 2 == 0 { 5 } else { 250 })).await;
    }
    times.sort_unstable();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("demand during a fill at 4 MB/s: median {median:?}, longest {longest:?}");
    assert!(median < Duration::from_millis(250) && longest < Duration::from_millis(700), "{times:?}");
    fill.await.expect("joined").expect("fill");
    let twice = sent(&source) as f64 / sample.layer.len() as f64;
    println!("sent: {twice:.3} of the layer");
    assert!(twice < 1.25, "{twice}");
    sample.check(&layer).await;
}

/// Bytes that the source sent.
fn sent(source: &Source) -> u64 {
    source.0.sent.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fill_gets_a_turn_however_much_demand_there_is() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let (busy, quiet) = (plain_sample(1, 100, 100_000), plain_sample(2, 10, 100_000));
    let scheduler = Scheduler::new(2);
    let slow = Source::with(&busy.layer, |source| {
        source.rate = 1_000_000;
        source.piece = 10_000;
    });
    let busy_layer = busy.streamed(&store, slow, &scheduler, LONG);
    let quiet_layer = quiet.streamed(&store, Source::new(&quiet.layer), &scheduler, LONG);
    let reading = tokio::spawn(async move { busy.check(&busy_layer).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let began = Instant::now();
    quiet_layer.fill().await.expect("fill");
    assert!(!reading.is_finished(), "there was no demand");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    reading.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fill_leaves_the_link_to_a_start_but_not_for_ever() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let scheduler = Scheduler::new(2);
    for (seed, ends) in [(1, true), (2, false)] {
        let sample = plain_sample(seed, 5, 100_000);
        let source = Source::new(&sample.layer);
        let layer = sample.streamed(&store, source.clone(), &scheduler, LONG);
        let (starting, began) = (scheduler.starting(), Instant::now());
        let fill = filling(&layer);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = source.asked();
        assert!(asked.is_empty() || began.elapsed() > Duration::from_secs(4), "{asked:?}");
        let held = if ends { None } else { Some(starting) };
        tokio::time::timeout(LONG, fill).await.expect("the fill goes on").expect("joined").expect("fill");
        drop(held);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_fetch_serves_everybody_who_waits() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let sample = plain_sample(1, 10, 200_000);
    let source = Source::with(&sample.layer, |source| source.rate = 2_000_000);
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    let (_, start, content) = &sample.files[4];
    let reads = (0..500).map(|at| layer.read(*start + at % 7 * 1000, 50_000));
    for (at, got) in futures::future::join_all(reads).await.into_iter().enumerate() {
        let from = at % 7 * 1000;
        assert!(got.expect("read") == content[from..from + 50_000]);
    }
    let asked = source.asked();
    assert!(asked.len() <= 2 && asked.iter().all(|(_, lane)| *lane == Lane::Demand), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_bounded() {
    let dir = tempfile::tempdir().expect("dir");
    let sample = plain_sample(1, 100, 200_000);
    // No space: fills stop in their decoders, with as much behind them as may wait.
    let limits = StoreLimits { memory_budget_bytes: 1 << 20, quota_bytes: Some(6 << 20), reserve_bytes: 0 };
    let store = Store::open_with(dir.path(), limits).expect("store");
    let source = Source::with(&sample.layer, |source| source.piece = 60_000);
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(3), LONG);
    let fill = filling(&layer);
    while !layer.layer().disk_full() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let held = source.0.held_most.load(Ordering::SeqCst);
    assert!(held <= 700_000, "{held} bytes wait for one decoder");
    // Many blocked reads of all places at once.
    let reads = (0..2000).map(|at: usize| {
        let (_, start, content) = &sample.files[at % 100];
        let layer = &layer;
        async move { assert!(layer.read(*start, 4096).await.expect("read") == content[..4096]) }
    });
    futures::future::join_all(reads).await;
    let (open, held) = (source.0.open_most.load(Ordering::SeqCst), source.0.held_most.load(Ordering::SeqCst));
    println!("2000 blocked reads: {open} transfers, {held} bytes waiting at most");
    assert!(open <= 16 + 3, "{open} transfers at once");
    assert!(held <= 19 * 700_000, "{held} bytes");
    fill.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_another_way_is_waited_for_and_fetched_only_if_it_does_not_come() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let sample = plain_sample(1, 10, 60_000);
    let source = Source::new(&sample.layer);
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    let read = |at: usize| {
        let (layer, (_, start, content)) = (Arc::clone(&layer), &sample.files[at]);
        let (start, content) = (*start, content.clone());
        tokio::spawn(async move { assert!(layer.read(start, content.len()).await.expect("read") == content) })
    };
    let pause = || tokio::time::sleep(Duration::from_millis(50));
    let (first, second) = (sample.files[1].1, sample.files[8].1);
    assert!(layer.wants(first, 0).expect("known"));
    let expected = layer.expect(vec![(first, 0)]);
    let reading = read(1);
    pause().await;
    assert!(!reading.is_finished() && source.asked().is_empty(), "{:?}", source.asked());
    assert!(layer.offer(first, &sample.files[1].2.clone().into()).expect("as the index says"));
    reading.await.expect("read");
    assert!(source.asked().is_empty() && !layer.wants(first, 0).expect("known"));
    drop(expected);
    let expected = layer.expect(vec![(second, 0)]);
    let reading = read(8);
    pause().await;
    assert!(!reading.is_finished() && source.asked().is_empty());
    drop(expected);
    reading.await.expect("read");
    assert_eq!(source.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_a_chunk_come_another_way_and_the_rest_is_fetched() {
    use sluice_image::parts::{PART_SIZE, parts_of, prove};
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let sample = plain_sample(1, 2, 60_000);
    let source = Source::new(&sample.layer);
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    let (start, content) = (sample.files[1].1, sample.files[1].2.clone());
    let read = |range: std::ops::Range<usize>| {
        let (layer, content) = (Arc::clone(&layer), content.clone());
        tokio::spawn(async move {
            let bytes = layer.read(start + range.start as u64, range.len()).await.expect("read");
            assert!(bytes == content[range]);
        })
    };
    let part = 4 * PART_SIZE as usize;
    let parts = parts_of(60_000, part as u64..3 * part as u64).expect("taken apart");
    let (bytes, proof) = (content[part..3 * part].to_vec().into(), prove(&content, parts));
    let expected = layer.expect(vec![(start, parts)]);
    assert!(layer.wants(start, parts).expect("known"));
    let waiting = read(part..2 * part);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished() && source.asked().is_empty(), "{:?}", source.asked());
    // Nothing that is not proved is taken.
    for proof in [vec![], vec![[0; 32]; proof.len()]] {
        assert!(layer.offer_parts(start, parts, &proof, &bytes).is_err());
    }
    assert!(layer.offer_parts(start, parts + 1, &proof, &bytes).is_err());
    assert!(layer.offer_parts(start, parts, &proof, &content[..2 * part].to_vec().into()).is_err());
    assert!(!waiting.is_finished());
    assert!(layer.offer_parts(start, parts, &proof, &bytes).expect("as the index says"));
    waiting.await.expect("read");
    read(part + 100..3 * part).await.expect("read");
    assert!(source.asked().is_empty() && !layer.wants(start, parts).expect("known"));
    assert!(!layer.offer_parts(start, parts, &proof, &bytes).expect("here"), "twice");
    // What is not expected is not waited for.
    read(2 * part..3 * part + 1).await.expect("read");
    assert_eq!(source.asked().len(), 1);
    drop(expected);
    read(0..60_000).await.expect("read");
    assert_eq!(source.asked().len(), 1);
}

#[test]
fn a_prefetch_passes_over_what_another_fetch_brings() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    // Chunks that end within a block, some of them beyond the span in which they begin.
    let sample = plain_sample(1, 20, 60_001);
    // Nothing comes as long as the test runs.
    let source = Source::with(&sample.layer, |slow| (slow.rate, slow.delay) = (1 << 30, LONG * 10));
    let layer = sample.streamed(&store, source, &Scheduler::new(2), LONG * 10);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("runtime");
    let passed = runtime.block_on(async {
        for (_, start, _) in &sample.files {
            let (layer, start) = (Arc::clone(&layer), *start);
            tokio::spawn(async move { layer.read(start, 4096).await });
        }
        let wanted = || sample.files.iter().any(|(_, start, _)| layer.wants(*start, 0).expect("known"));
        while wanted() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (ahead, end) = (Arc::clone(&layer), layer.layer().size());
        // A task that never waits is not stopped by a time-out of its own.
        tokio::time::timeout(LONG, tokio::spawn(async move { ahead.prefetch(0..end).await })).await
    });
    runtime.shutdown_background();
    let asked = passed.expect("the prefetch ends").expect("joined").expect("prefetch");
    assert_eq!(asked, 0, "it fetched what others bring");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_fetch_brings_is_waited_for_by_who_needs_it_here() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let sample = plain_sample(1, 20, 60_000);
    let source = Source::with(&sample.layer, |slow| slow.delay = Duration::from_millis(200));
    let layer = sample.streamed(&store, source.clone(), &Scheduler::new(2), LONG);
    let start = sample.files[5].1;
    let reading = Arc::clone(&layer);
    let read = tokio::spawn(async move { reading.read(start, 4096).await });
    while layer.wants(start, 0).expect("known") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(layer.bring(start..start + 60_000).await.expect("here"), Some(0));
    assert!(layer.layer().has(start..start + 60_000));
    read.await.expect("joined").expect("read");
    // Nobody brings that: it is fetched.
    let last = sample.files[19].1;
    assert!(layer.bring(last..last + 60_000).await.expect("here").is_some_and(|asked| asked > 0));
}
