//! Prints how fast a gzip layer is indexed, against plain decompression and SHA-256 of the same layer, and how large its index
//! is: `cargo run --release --example index_speed [DIRECTORY [MIB]]`. The layer is a tar of a directory of this system.
#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};

type Failure = Box<dyn std::error::Error>;

/// Timings of each way; the median counts.
const ROUNDS: usize = 5;
/// Bytes handed over at a time, as they come from a registry.
const PIECE: usize = 256 * 1024;

/// A gzip layer of the regular files under `dir`, in order of their paths, up to `limit` bytes of them.
fn layer(dir: PathBuf, limit: u64) -> Result<(Vec<u8>, u64), Failure> {
    let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    let mut builder = tar::Builder::new(encoder);
    let mut left = VecDeque::from([dir]);
    let mut bytes = 0;
    while let Some(dir) = left.pop_front() {
        let mut paths =
            fs::read_dir(&dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Failure>>()?;
        paths.sort();
        for path in paths {
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                left.push_back(path);
            } else if meta.is_file() && bytes + meta.len() <= limit {
                builder.append_path_with_name(&path, path.strip_prefix("/")?)?;
                bytes += meta.len();
            }
        }
    }
    Ok((builder.into_inner()?.finish()?, bytes))
}

fn sha256(bytes: &[u8]) -> ring::digest::Digest {
    ring::digest::digest(&ring::digest::SHA256, bytes)
}

/// Decompresses and computes both digests, one after the other.
fn plain(layer: &[u8]) -> Result<ring::digest::Digest, Failure> {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut decoder = flate2::bufread::MultiGzDecoder::new(layer);
    let mut buffer = vec![0; PIECE];
    loop {
        let read = decoder.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        context.update(buffer.get(..read).unwrap_or(&[]));
    }
    std::hint::black_box(sha256(layer));
    Ok(context.finish())
}

/// The same with the digests on a thread of their own, as the indexer has it.
fn plain_on_two_threads(layer: &[u8]) -> Result<ring::digest::Digest, Failure> {
    let (queue, pieces) = sync_channel::<Vec<u8>>(8);
    std::thread::scope(|scope| {
        let hashing = scope.spawn(move || {
            let mut context = ring::digest::Context::new(&ring::digest::SHA256);
            pieces.iter().for_each(|piece| context.update(&piece));
            std::hint::black_box(sha256(layer));
            context.finish()
        });
        let mut decoder = flate2::bufread::MultiGzDecoder::new(layer);
        loop {
            let mut buffer = Vec::with_capacity(PIECE);
            if decoder.by_ref().take(PIECE as u64).read_to_end(&mut buffer)? == 0 {
                break;
            }
            queue.send(buffer)?;
        }
        drop(queue);
        hashing.join().map_err(|_panic| "the digest thread panicked".into())
    })
}

fn index(layer: &[u8], digest: &str) -> Result<LayerIndex, Failure> {
    let mut indexer = LayerIndexer::new(IndexOptions::default(), NoSink)?;
    for piece in layer.chunks(PIECE) {
        indexer.push(piece)?;
    }
    Ok(indexer.finish(digest)?.0)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args_os().skip(1);
    let dir = arguments.next().map_or_else(|| PathBuf::from("/usr/lib"), PathBuf::from);
    let mib: u64 = arguments.next().map_or(Ok(256), |text| text.to_string_lossy().parse())?;
    print!("packing {} MiB of {} … ", mib, dir.display());
    std::io::stdout().flush()?;
    let (layer, bytes) = layer(dir, mib << 20)?;
    println!("{:.1} MB of files, {:.1} MB of layer", bytes as f64 / 1e6, layer.len() as f64 / 1e6);
    let digest = format!("sha256:{}", hex::encode(sha256(&layer)));
    let mut times = [const { Vec::new() }; 3];
    let mut made = None;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let one = plain(&layer)?;
        let after_one = Instant::now();
        let two = plain_on_two_threads(&layer)?;
        let after_two = Instant::now();
        let index = index(&layer, &digest)?;
        let end = Instant::now();
        if one.as_ref() != two.as_ref() || one.as_ref() != index.header().diff_id {
            return Err("the ways disagree about the diffID".into());
        }
        for (times, time) in times.iter_mut().zip([after_one - start, after_two - after_one, end - after_two])
        {
            times.push(time);
        }
        made = Some(index);
    }
    let [one, two, indexed] = times.map(median);
    let index = made.ok_or("no round")?;
    let tar = index.header().tar_size.get() as f64;
    let speed = |time: Duration| tar / 1e6 / time.as_secs_f64();
    println!("plain, one thread:   {:>7.1} MB/s of tar", speed(one));
    println!("plain, two threads:  {:>7.1} MB/s of tar", speed(two));
    println!("index, two threads:  {:>7.1} MB/s of tar", speed(indexed));
    let ratio = |plain: Duration| plain.as_secs_f64() / indexed.as_secs_f64();
    println!("ratio to one thread {:.2}, to two {:.2} (target 0.80)", ratio(one), ratio(two));
    let (whole, toc) = (index.blob().len() as f64, index.header().toc_len() as f64);
    println!(
        "index {:.0} KB, {:.2} % of the layer (target 1.5); of it table of contents {:.0} KB, {} spans",
        whole / 1e3,
        100.0 * whole / layer.len() as f64,
        toc / 1e3,
        index.spans().len(),
    );
    Ok(())
}
