//! A streamed layer against its own content: demand reads, fill, outages, damage, a lying index, the first pull.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use sluice_image::index::embedded::EmbeddedToc;
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_store::Store;
use sluice_stream::{
    BlobSource, Lane, LayerParts, MemorySource, Scheduler, SourceError, StreamError, StreamedLayer,
    first_pull,
};

/// A blob whose first reads fail, and whose bytes are damaged while `damage` is set.
#[derive(Debug)]
struct Faulty {
    blob: Bytes,
    failures: AtomicU32,
    damage: bool,
}

impl BlobSource for Faulty {
    fn size(&self) -> u64 {
        self.blob.len() as u64
    }

    fn read(&self, range: Range<u64>, lane: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let away = || Err(SourceError { message: "connection refused".to_owned(), transient: true });
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            let half = range.start..range.start + (range.end - range.start) / 2;
            let start = MemorySource(self.blob.clone()).read(half, lane);
            return start.chain(futures::stream::iter([away()])).boxed();
        }
        let mut bytes = self.blob.slice(range.start as usize..range.end as usize).to_vec();
        if self.damage {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        }
        futures::stream::iter(
            bytes.chunks(10_000).map(|part| Ok(Bytes::copy_from_slice(part))).collect::<Vec<_>>(),
        )
        .boxed()
    }
}

struct Sample {
    layer: Bytes,
    index: LayerIndex,
    content: Vec<(u64, Vec<u8>)>,
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes)))
}

/// A gzip layer of files that compress a little, with many spans.
fn sample() -> Sample {
    let mut builder = tar::Builder::new(Vec::new());
    let mut contents = Vec::new();
    for number in 0_u32..60 {
        let len = if number % 7 == 0 { 500_000 } else { number * 531 + 1 };
        let content: Vec<u8> =
            (0..len).map(|at| ((at ^ number).wrapping_mul(2_654_435_761) >> 25) as u8).collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::from(len));
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("dir/file{number}"), content.as_slice()).expect("append");
        contents.push(content);
    }
    let tar = builder.into_inner().expect("tar");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar).expect("compress");
    let layer = encoder.finish().expect("compress");
    let options = IndexOptions { chunk_size: 65536, span_compressed_bytes: 100_000, span_tar_bytes: 200_000 };
    let mut indexer = LayerIndexer::new(options, NoSink).expect("indexer");
    indexer.push(&layer).expect("push");
    let (index, _) = indexer.finish(&digest_of(&layer)).expect("finish");
    assert!(index.spans().len() > 5, "{} spans", index.spans().len());
    let mut content = Vec::new();
    for (item, bytes) in index.toc().expect("toc").zip(contents) {
        let start = item.expect("item").chunks[0].store_offset.get();
        content.push((start, bytes));
    }
    Sample { layer: layer.into(), index, content }
}

fn streamed(
    store: &Store,
    sample: &Sample,
    source: impl BlobSource + 'static,
    outage: Duration,
) -> Arc<StreamedLayer> {
    let toc_len = sample.index.header().toc_len() as usize;
    let index = LayerIndex::from_blob(sample.index.blob()[..toc_len].to_vec()).expect("toc");
    let parts = LayerParts {
        layer: store.add_layer(&index).expect("layer"),
        store: store.clone(),
        blob: Arc::new(source),
        index_blob: Arc::new(MemorySource(Bytes::copy_from_slice(sample.index.blob()))),
        scheduler: Scheduler::new(2),
        outage_timeout: outage,
    };
    StreamedLayer::new(parts, &index)
}

async fn check(layer: &StreamedLayer, sample: &Sample) {
    for (start, content) in sample.content.iter().rev() {
        let got = layer.read(*start, content.len()).await.expect("read");
        assert!(got == content.as_slice(), "file at {start}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_right_and_a_fill_completes_the_layer() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample());
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = streamed(&store, &sample, MemorySource(sample.layer.clone()), Duration::from_secs(5));
    let (start, content) = &sample.content[30];
    let mut buffer = vec![0; content.len()];
    assert!(!layer.try_read(*start, &mut buffer).expect("read"));
    let readers = (0..8).map(|_| check(&layer, &sample));
    futures::future::join_all(readers).await;
    layer.fill().await.expect("fill");
    assert!(*layer.completion().borrow() && layer.layer().is_complete());
    drop(layer);
    drop(store);
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let kept = store.layer(&digest_of(&sample.layer)).expect("layer").expect("kept");
    assert!(kept.is_complete());
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_a_source_that_is_away() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample());
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let source = Faulty { blob: sample.layer.clone(), failures: AtomicU32::new(4), damage: false };
    let layer = streamed(&store, &sample, source, Duration::from_secs(30));
    check(&layer, &sample).await;
    let source = Faulty { blob: sample.layer.clone(), failures: AtomicU32::new(u32::MAX), damage: false };
    store.remove_layer(&digest_of(&sample.layer)).expect("remove");
    let layer = streamed(&store, &sample, source, Duration::from_millis(200));
    let error = layer.read(sample.content[59].0, 1).await.expect_err("read without a source");
    assert!(
        error.to_string().contains("connection refused") || matches!(error, StreamError::Fetch { .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_caught_and_never_shown() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample());
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let source = Faulty { blob: sample.layer.clone(), failures: AtomicU32::new(0), damage: true };
    let layer = streamed(&store, &sample, source, Duration::from_secs(5));
    let mut caught = 0;
    for (start, content) in &sample.content {
        match layer.read(*start, content.len()).await {
            Ok(bytes) => assert!(bytes == content.as_slice(), "wrong bytes were shown"),
            Err(StreamError::Corrupt { .. }) => caught += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(caught > 0);
    assert!(layer.fill().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_keeps_a_layer_only_if_it_is_the_images() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), sample());
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let digest = digest_of(&sample.layer);
    let scheduler = Scheduler::new(2);
    let source = || -> Arc<dyn BlobSource> {
        Arc::new(Faulty { blob: sample.layer.clone(), failures: AtomicU32::new(2), damage: false })
    };
    let wrong = first_pull(&store, &scheduler, source(), &digest, "sha256:00", |_| {}).await;
    assert!(matches!(wrong, Err(StreamError::DiffId { .. })), "{wrong:?}");
    assert!(store.layers().expect("layers").is_empty());
    let diff_id = sample.index.header().diff_id_text();
    let pulled = first_pull(&store, &scheduler, source(), &digest, &diff_id, |_| {}).await.expect("pull");
    assert!(pulled.layer.is_complete());
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
}

/// A zstd:chunked layer: a frame for each file's content, other frames between them, the table at the end.
fn chunked_sample() -> Sample {
    let (mut layer, mut rows, mut contents) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0_u32..40 {
        let len = if number % 3 == 0 { 800_000 } else { number * 531 + 1 };
        let content: Vec<u8> =
            (0..len).map(|at| ((at ^ number).wrapping_mul(2_654_435_761) >> 25) as u8).collect();
        layer
            .extend(zstd::bulk::compress(&vec![b'h'; 512 * (1 + number as usize % 3)], 3).expect("compress"));
        let (offset, digest) = (layer.len(), digest_of(&content));
        rows.push(format!(
            r#"{{"type":"reg","name":"dir/file{number}","mode":420,"size":{len},"offset":{offset},"chunkDigest":"{digest}"}}"#
        ));
        layer.extend(zstd::bulk::compress(&content, 3).expect("compress"));
        contents.push(content);
    }
    let text = format!(r#"{{"version":1,"entries":[{}]}}"#, rows.join(","));
    let table = zstd::bulk::compress(text.as_bytes(), 3).expect("compress");
    layer.extend([0x50, 0x2a, 0x4d, 0x18]);
    layer.extend((table.len() as u32).to_le_bytes());
    let position = format!("{}:{}:{}:1", layer.len(), table.len(), text.len());
    let checksum = digest_of(&table);
    layer.extend(&table);
    let annotation = |key: &str| match key.strip_prefix("io.github.containers.zstd-chunked.") {
        Some("manifest-position") => Some(position.as_str()),
        Some("manifest-checksum") => Some(checksum.as_str()),
        _ => None,
    };
    let toc = EmbeddedToc::find(annotation, layer.len() as u64, &[]).expect("right").expect("a table");
    let index = toc.index(&table, &digest_of(&layer), &digest_of(b"not known")).expect("index");
    assert!(index.spans().len() > 1, "{} spans", index.spans().len());
    let mut content = Vec::new();
    for (item, bytes) in index.toc().expect("toc").zip(contents) {
        content.push((item.expect("item").chunks[0].store_offset.get(), bytes));
    }
    Sample { layer: layer.into(), index, content }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_streamed_by_its_own_table_of_contents() {
    let (dir, sample) = (tempfile::tempdir().expect("dir"), chunked_sample());
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = streamed(&store, &sample, MemorySource(sample.layer.clone()), Duration::from_secs(5));
    futures::future::join_all((0..4).map(|_| check(&layer, &sample))).await;
    layer.fill().await.expect("fill");
    assert!(layer.layer().is_complete());
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    // The same by the background fill alone, and with damaged bytes.
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let layer = streamed(&store, &sample, MemorySource(sample.layer.clone()), Duration::from_secs(5));
    layer.fill().await.expect("fill");
    check(&layer, &sample).await;
    assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), 1 << 20).expect("store");
    let source = Faulty { blob: sample.layer.clone(), failures: AtomicU32::new(0), damage: true };
    let layer = streamed(&store, &sample, source, Duration::from_secs(5));
    let error = layer.fill().await.expect_err("filled");
    assert!(matches!(error, StreamError::Corrupt { .. }), "{error}");
}
