//! How fast a fill is, from memory to a complete layer, beside plain decompression and SHA-256 of the same layer.
//!
//! `cargo run --release -p sluice-stream --example fill_speed -- LAYER.tar.gz [ROUNDS]`; the store is made beside the layer.
#![allow(clippy::print_stdout, reason = "it prints what it measured")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_store::Store;
use sluice_stream::{BlobSource, Lane, LayerParts, MemorySource, Scheduler, SourceError, StreamedLayer};

/// A blob in memory, in pieces like those of a connection.
#[derive(Debug)]
struct Pieces(Bytes);

impl BlobSource for Pieces {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: std::ops::Range<u64>, _: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let blob = self.0.slice(range.start as usize..range.end as usize);
        futures::stream::iter(
            (0..blob.len().div_ceil(65536))
                .map(move |at| Ok(blob.slice(at * 65536..((at + 1) * 65536).min(blob.len())))),
        )
        .boxed()
    }
}

fn hex(digest: &ring::digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Processor time of this process so far (fields 14 and 15 of proc_pid_stat(5), in hundredths of a second).
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    let fields: Vec<&str> = stat.rsplit_once(") ").expect("a name").1.split(' ').collect();
    let ticks: u64 = [11, 12].map(|at| fields[at].parse::<u64>().expect("a number")).iter().sum();
    Duration::from_millis(ticks * 10)
}

/// Decompression and SHA-256, one after the other in one thread; bytes of tar.
fn plain(layer: &[u8]) -> (u64, Duration) {
    let began = Instant::now();
    let mut reader = flate2::read::MultiGzDecoder::new(layer);
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        let count = reader.read(&mut buffer).expect("a gzip layer");
        if count == 0 {
            break;
        }
        context.update(&buffer[..count]);
        total += count as u64;
    }
    std::hint::black_box(context.finish());
    (total, began.elapsed())
}

async fn fill(layer: &Bytes, index: &LayerIndex, root: &Path) -> Duration {
    let store = Store::open(root, 24 << 20).expect("store");
    let parts = LayerParts {
        layer: store.add_layer(index).expect("layer"),
        store: store.clone(),
        blob: Arc::new(Pieces(layer.clone())),
        index_blob: Arc::new(MemorySource(Bytes::copy_from_slice(index.blob()))),
        scheduler: Scheduler::new(3),
        outage_timeout: Duration::from_secs(5),
    };
    let streamed = StreamedLayer::new(parts, index);
    let began = Instant::now();
    streamed.fill().await.expect("fill");
    let took = began.elapsed();
    assert!(streamed.layer().is_complete());
    took
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().expect("a layer"));
    let rounds: usize = arguments.next().map_or(5, |text| text.parse().expect("a number"));
    let layer = Bytes::from(std::fs::read(&path).expect("read"));
    let digest = format!("sha256:{}", hex(&ring::digest::digest(&ring::digest::SHA256, &layer)));
    let mut indexer = LayerIndexer::new(IndexOptions::default(), NoSink).expect("indexer");
    indexer.push(&layer).expect("index");
    let (index, _) = indexer.finish(&digest).expect("index");
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let start = processor_time();
        let (tar, plain) = plain(&layer);
        let plain_cpu = processor_time() - start;
        let dir = tempfile::tempdir_in(path.parent().expect("a directory")).expect("a directory");
        let start = processor_time();
        let filled = fill(&layer, &index, dir.path()).await;
        let fill_cpu = processor_time() - start;
        let speed = |took: Duration| tar as f64 / took.as_secs_f64() / 1e6;
        let ratio = plain.as_secs_f64() / filled.as_secs_f64();
        println!(
            "round {round}: {} MB of tar: fill {:.0} MB/s, plain {:.0} MB/s, ratio {ratio:.2}; processor time {:.2} s and {:.2} s",
            tar / 1_000_000,
            speed(filled),
            speed(plain),
            fill_cpu.as_secs_f64(),
            plain_cpu.as_secs_f64()
        );
        ratios.push(ratio);
    }
    ratios.sort_unstable_by(f64::total_cmp);
    println!("median ratio {:.2}", ratios[ratios.len() / 2]);
}
