//! Layers, and sources with faults, a rate and a record of what was asked of them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use sluice_image::entry::EntryKind;
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_store::Store;
use sluice_stream::{BlobSource, Lane, LayerParts, MemorySource, Scheduler, SourceError, StreamedLayer};

pub(crate) const NO_WAIT: Duration = Duration::from_millis(300);
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A layer, its index, and its files: name, store offset, content.
pub(crate) struct Sample {
    pub(crate) layer: Bytes,
    pub(crate) index: LayerIndex,
    pub(crate) files: Vec<(String, u64, Vec<u8>)>,
}

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes)))
}

pub(crate) const OPTIONS: IndexOptions =
    IndexOptions { chunk_size: 65536, span_compressed_bytes: 100_000, span_tar_bytes: 200_000 };

impl Sample {
    /// From a layer and the contents of its files, by name.
    pub(crate) fn new(layer: Vec<u8>, contents: Vec<(String, Vec<u8>)>) -> Self {
        let mut indexer = LayerIndexer::new(OPTIONS, NoSink).expect("indexer");
        indexer.push(&layer).expect("push");
        let (index, _) = indexer.finish(&digest_of(&layer)).expect("finish");
        let mut files = Vec::new();
        for entry in index.entries().expect("entries") {
            let entry = entry.expect("entry");
            let name = String::from_utf8(entry.path).expect("name");
            if let EntryKind::File { size, store_offset } = entry.kind
                && size > 0
            {
                let content = contents.iter().find(|(one, _)| *one == name).expect("content").1.clone();
                assert_eq!(content.len() as u64, size);
                files.push((name, store_offset, content));
            }
        }
        Self { layer: layer.into(), index, files }
    }

    pub(crate) fn digest(&self) -> String {
        self.index.header().layer_digest_text()
    }

    /// With `source` as its blob.
    pub(crate) fn streamed(
        &self,
        store: &Store,
        source: impl BlobSource + 'static,
        scheduler: &Scheduler,
        outage_timeout: Duration,
    ) -> Arc<StreamedLayer> {
        let index_blob = MemorySource(Bytes::copy_from_slice(self.index.blob()));
        self.streamed_by_index(store, source, index_blob, scheduler, outage_timeout)
    }

    /// With a source of the index blob as well.
    pub(crate) fn streamed_by_index(
        &self,
        store: &Store,
        source: impl BlobSource + 'static,
        index_blob: impl BlobSource + 'static,
        scheduler: &Scheduler,
        outage_timeout: Duration,
    ) -> Arc<StreamedLayer> {
        let toc_len = self.index.header().toc_len() as usize;
        let index = LayerIndex::from_blob(self.index.blob()[..toc_len].to_vec()).expect("toc");
        let parts = LayerParts {
            layer: store.add_layer(&index).expect("layer"),
            store: store.clone(),
            blob: Arc::new(source),
            index_blob: Arc::new(index_blob),
            scheduler: scheduler.clone(),
            outage_timeout,
        };
        StreamedLayer::new(parts, &index)
    }

    /// Reads every file, last first, and compares.
    pub(crate) async fn check(&self, layer: &Arc<StreamedLayer>) {
        for (name, start, content) in self.files.iter().rev() {
            let got = layer.read(*start, content.len()).await.expect("read");
            assert!(got == content.as_slice(), "{name} at {start}");
        }
    }

    /// After a fill: all there, and the same after opening the store again.
    pub(crate) fn check_complete(&self, store: Store, root: &std::path::Path) {
        drop(store);
        let store = Store::open(root, 1 << 20).expect("store");
        let kept = store.layer(&self.digest()).expect("layer").expect("kept");
        assert!(kept.is_complete());
        for (name, start, content) in &self.files {
            let mut got = vec![0; content.len()];
            assert!(kept.try_read(*start, &mut got).expect("read") && got == *content, "{name}");
        }
        assert_eq!(store.fsck().expect("fsck").problems, Vec::<String>::new());
    }
}

/// Bytes that do not repeat, another sequence for each `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// A tar of these files.
pub(crate) fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, content.as_slice()).expect("append");
    }
    builder.into_inner().expect("tar")
}

pub(crate) fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(tar).expect("compress");
    encoder.finish().expect("compress")
}

/// Files that compress a little.
pub(crate) fn some_files() -> Vec<(String, Vec<u8>)> {
    (0_u32..60)
        .map(|number| {
            let len = if number % 7 == 0 { 500_000 } else { number * 531 + 1 };
            let content =
                (0..len).map(|at| ((at ^ number).wrapping_mul(2_654_435_761) >> 25) as u8).collect();
            (format!("dir/file{number}"), content)
        })
        .collect()
}

/// A gzip layer with many spans.
pub(crate) fn gzip_sample() -> Sample {
    let files = some_files();
    let sample = Sample::new(gzip(&tar_of(&files)), files);
    assert!(sample.index.spans().len() > 5, "{} spans", sample.index.spans().len());
    sample
}

/// A layer of `count` files of `len` bytes each, not compressed.
pub(crate) fn plain_sample(seed: u64, count: u64, len: usize) -> Sample {
    let files: Vec<_> =
        (0..count).map(|number| (format!("file{number}"), noise(seed * 1000 + number, len))).collect();
    Sample::new(tar_of(&files), files)
}

/// A source with everything that can be wrong with one.
#[derive(Debug, Clone)]
pub(crate) struct Source(pub(crate) Arc<SourceState>);

#[derive(Debug)]
pub(crate) struct SourceState {
    pub(crate) blob: Bytes,
    /// So many reads break off in their middle.
    pub(crate) breaks: AtomicU32,
    /// So many reads give nothing at all.
    pub(crate) refusals: AtomicU32,
    /// So many reads of this byte give another.
    pub(crate) damage: (u64, AtomicU32),
    /// Bytes per second over all reads; 0: no limit.
    pub(crate) rate: u64,
    /// Before the first byte of each read.
    pub(crate) delay: Duration,
    pub(crate) piece: usize,
    /// When the link is free again.
    pub(crate) free_at: Mutex<Instant>,
    /// What was asked for.
    pub(crate) asked: Mutex<Vec<(Range<u64>, Lane)>>,
    pub(crate) asked_elsewhere: AtomicU32,
    /// Bytes given out.
    pub(crate) sent: AtomicU64,
    /// Bytes given out and not dropped yet, and the most there ever were.
    pub(crate) held: AtomicU64,
    pub(crate) held_most: AtomicU64,
    /// Reads under way, and the most there ever were.
    pub(crate) open: AtomicU64,
    pub(crate) open_most: AtomicU64,
}

impl Source {
    pub(crate) fn new(blob: &Bytes) -> Self {
        Self(Arc::new(SourceState {
            blob: blob.clone(),
            breaks: AtomicU32::new(0),
            refusals: AtomicU32::new(0),
            damage: (0, AtomicU32::new(0)),
            rate: 0,
            delay: Duration::ZERO,
            piece: 10_000,
            free_at: Mutex::new(Instant::now()),
            asked: Mutex::default(),
            asked_elsewhere: AtomicU32::new(0),
            sent: AtomicU64::new(0),
            held: AtomicU64::new(0),
            held_most: AtomicU64::new(0),
            open: AtomicU64::new(0),
            open_most: AtomicU64::new(0),
        }))
    }

    pub(crate) fn with(blob: &Bytes, change: impl FnOnce(&mut SourceState)) -> Self {
        let mut source = Self::new(blob);
        change(Arc::get_mut(&mut source.0).expect("not shared yet"));
        source
    }

    pub(crate) fn asked(&self) -> Vec<(Range<u64>, Lane)> {
        self.0.asked.lock().expect("lock").clone()
    }
}

/// A piece that says when it is dropped.
struct Counted(Vec<u8>, Arc<SourceState>);

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.held.fetch_sub(self.0.len() as u64, Ordering::SeqCst);
    }
}

struct Open(Arc<SourceState>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

fn one_less(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

impl BlobSource for Source {
    fn size(&self) -> u64 {
        self.0.blob.len() as u64
    }

    fn read(&self, range: Range<u64>, lane: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let state = Arc::clone(&self.0);
        state.asked.lock().expect("lock").push((range.clone(), lane));
        let refused = one_less(&state.refusals);
        let end = if refused {
            range.start
        } else if one_less(&state.breaks) {
            range.start + (range.end - range.start) / 2
        } else {
            range.end
        };
        let damaged = range.contains(&state.damage.0) && one_less(&state.damage.1);
        let now = state.open.fetch_add(1, Ordering::SeqCst) + 1;
        state.open_most.fetch_max(now, Ordering::SeqCst);
        let open = Open(state);
        futures::stream::unfold(Some((range, open)), move |left| async move {
            let (range, open) = left?;
            let state = &open.0;
            if range.start >= end {
                let broke = end < range.end;
                let away = || SourceError { message: "connection refused".to_owned(), transient: true };
                return broke.then(|| (Err(away()), None));
            }
            let stop = (range.start + state.piece as u64).min(end);
            state.transmit(stop - range.start).await;
            let mut bytes = state.blob.slice(range.start as usize..stop as usize).to_vec();
            if damaged && (range.start..stop).contains(&state.damage.0) {
                bytes[(state.damage.0 - range.start) as usize] ^= 0x10;
            }
            state.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            let held = state.held.fetch_add(bytes.len() as u64, Ordering::SeqCst) + bytes.len() as u64;
            state.held_most.fetch_max(held, Ordering::SeqCst);
            let piece = Bytes::from_owner(Counted(bytes, Arc::clone(state)));
            Some((Ok(piece), Some((stop..range.end, open))))
        })
        .boxed()
    }

    fn read_elsewhere(
        &self,
        range: Range<u64>,
        lane: Lane,
    ) -> BoxStream<'static, Result<Bytes, SourceError>> {
        self.0.asked_elsewhere.fetch_add(1, Ordering::SeqCst);
        self.read(range, lane)
    }
}

impl SourceState {
    /// Takes the time that the link takes.
    async fn transmit(&self, len: u64) {
        if self.rate == 0 {
            return tokio::task::yield_now().await;
        }
        let until = {
            let mut free_at = self.free_at.lock().expect("lock");
            *free_at =
                (*free_at).max(Instant::now()) + Duration::from_secs_f64(len as f64 / self.rate as f64);
            *free_at
        };
        tokio::time::sleep_until((until + self.delay).into()).await;
    }
}

/// A tmpfs of its own, unmounted when dropped.
pub(crate) struct SmallDisk {
    pub(crate) dir: PathBuf,
    _files: tempfile::TempDir,
}

impl SmallDisk {
    pub(crate) fn new(bytes: u64) -> Self {
        let files = tempfile::tempdir().expect("dir");
        let dir = files.path().join("mnt");
        std::fs::create_dir(&dir).expect("dir");
        let size = format!("size={bytes}");
        run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&dir));
        Self { dir, _files: files }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(std::process::Command::new("umount").arg(&self.dir));
    }
}

pub(crate) fn run(command: &mut std::process::Command) {
    let output = command.output().expect("started");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
