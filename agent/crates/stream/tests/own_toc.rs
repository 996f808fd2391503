//! A layer that brings a table of contents of its own: read, filled, damaged.

mod rig;

use std::sync::atomic::AtomicU32;

use rig::{LONG, Sample, Source, digest_of};
use sluice_image::index::embedded::EmbeddedToc;
use sluice_store::Store;
use sluice_stream::{Scheduler, StreamError};

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
        contents.push((format!("dir/file{number}"), content));
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
    let mut files = Vec::new();
    for (item, (name, bytes)) in index.toc().expect("toc").zip(contents) {
        files.push((name, item.expect("item").chunks[0].store_offset.get(), bytes));
    }
    Sample { layer: layer.into(), index, files }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_streamed_by_its_own_table_of_contents() {
    let sample = chunked_sample();
    let stream = |store: &Store, damage: bool| {
        let source = Source::with(&sample.layer, |source| {
            source.damage = (sample.layer.len() as u64 / 2, AtomicU32::new(if damage { u32::MAX } else { 0 }))
        });
        sample.streamed(store, source, &Scheduler::new(2), LONG)
    };
    for read_first in [true, false] {
        let dir = tempfile::tempdir().expect("dir");
        let store = Store::open(dir.path(), 1 << 20).expect("store");
        let layer = stream(&store, false);
        if read_first {
            futures::future::join_all((0..4).map(|_| sample.check(&layer))).await;
        }
        layer.fill().await.expect("fill");
        assert!(layer.layer().is_complete());
        sample.check(&layer).await;
        assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    }
    let dir = tempfile::tempdir().expect("dir");
    let error = stream(&Store::open(dir.path(), 1 << 20).expect("store"), true).fill().await;
    assert!(matches!(error, Err(StreamError::Corrupt { .. })), "{error:?}");
}
