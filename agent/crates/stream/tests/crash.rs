//! `kill -9` at random points while a layer is filled, removed or pulled: afterwards the store is well, has lost nothing that was
//! recorded, and only what was not verified is fetched again.
//!
//! Without a harness: the binary starts itself as the child that is killed.
#![allow(clippy::print_stdout, reason = "the verdict of a test without a harness")]

mod rig;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use rig::{digest_of, gzip, noise, tar_of};
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_store::Store;
use sluice_stream::{
    BlobSource, Lane, LayerParts, MemorySource, Scheduler, SourceError, StreamedLayer, first_pull,
};

const KILLS: u64 = 200;
/// Spans longer than what a run may bring of the next one for its last chunk.
const OPTIONS: IndexOptions =
    IndexOptions { chunk_size: 65536, span_compressed_bytes: 400_000, span_tar_bytes: 800_000 };

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "--child") {
        Some(at) => child(Path::new(&arguments[at + 1]), arguments[at + 2].parse().expect("a seed")),
        None => parent(),
    }
    ExitCode::SUCCESS
}

/// xorshift.
#[derive(Debug)]
struct Random(AtomicU64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1))
    }

    fn below(&self, limit: u64) -> u64 {
        let next = |mut state: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let before = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| Some(next(state)));
        (next(before.expect("updated")) >> 11) % limit
    }
}

/// The blob on disk, in pieces of random sizes; every range asked for is written down.
#[derive(Debug)]
struct FileSource {
    file: Arc<File>,
    size: u64,
    asked: Mutex<File>,
    random: Arc<Random>,
}

impl BlobSource for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: Range<u64>, _: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        // By one write: a kill may come between two.
        let line = format!("{} {}\n", range.start, range.end);
        self.asked.lock().expect("lock").write_all(line.as_bytes()).expect("written down");
        let (file, random) = (Arc::clone(&self.file), Arc::clone(&self.random));
        futures::stream::unfold(range, move |range| {
            let (file, random) = (Arc::clone(&file), Arc::clone(&random));
            async move {
                if range.is_empty() {
                    return None;
                }
                let len = (1 + random.below(60_000)).min(range.end - range.start);
                if random.below(3) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, range.start).expect("read");
                Some((Ok(Bytes::from(bytes)), range.start + len..range.end))
            }
        })
        .boxed()
    }
}

/// What the child does depends on its seed.
fn removes_first(seed: u64) -> bool {
    seed % 40 == 7
}

fn pulls(seed: u64) -> bool {
    seed % 5 == 3
}

/// Some children are let come to their end, however slow the machine is.
fn is_spared(seed: u64) -> bool {
    seed % 25 == 20 && !reads(seed) && !pulls(seed) && !removes_first(seed)
}

/// Demand keeps the fill waiting: some children have none.
fn reads(seed: u64) -> bool {
    seed.is_multiple_of(3)
}

fn child(dir: &Path, seed: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("runtime").block_on(async {
        let random = Arc::new(Random::new(seed));
        let store = Store::open(&dir.join("store"), 1 << 20).expect("store");
        println!("ready");
        let index = LayerIndex::from_blob(fs::read(dir.join("index")).expect("index")).expect("index");
        if removes_first(seed) {
            store.remove_layer(&index.header().layer_digest_text()).expect("remove");
        }
        let source = |blob: &str, asked: &str| -> Arc<dyn BlobSource> {
            let file = File::open(dir.join(blob)).expect("blob");
            let asked = File::options().append(true).create(true).open(dir.join(asked)).expect("log");
            let size = file.metadata().expect("stat").len();
            let random = Arc::clone(&random);
            Arc::new(FileSource { file: Arc::new(file), size, asked: Mutex::new(asked), random })
        };
        if pulls(seed) {
            let blob = fs::read(dir.join("second")).expect("second");
            let diff_id = fs::read_to_string(dir.join("second-diff-id")).expect("diffID");
            let (scheduler, digest) = (Scheduler::new(2), digest_of(&blob));
            let source = source("second", "second-asked");
            let outage = Duration::from_secs(5);
            first_pull(&store, &scheduler, source, (&digest, &diff_id), outage, |_| {}).await.expect("pull");
            store.remove_layer(&digest).expect("remove");
            return;
        }
        let parts = LayerParts {
            layer: store.add_layer(&index).expect("layer"),
            store: store.clone(),
            blob: source("blob", "asked"),
            index_blob: Arc::new(MemorySource(Bytes::copy_from_slice(index.blob()))),
            scheduler: Scheduler::new(2),
            outage_timeout: Duration::from_secs(5),
        };
        let layer = StreamedLayer::new(parts, &index);
        let flushing = async {
            loop {
                tokio::time::sleep(Duration::from_micros(random.below(15_000))).await;
                layer.flush().await.expect("flush");
            }
        };
        let reading = async {
            while reads(seed) {
                let offset = random.below(layer.layer().size());
                layer.read(offset, 1 + random.below(100_000) as usize).await.expect("read");
                tokio::time::sleep(Duration::from_micros(random.below(30_000))).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            filled = layer.fill() => filled.expect("fill"),
            () = flushing => {}
            () = reading => {}
        }
    });
}

/// What the parent knows of the layer.
struct Truth {
    /// In memory: what a kill leaves does not depend on the disk, and flushing one would take most of the time.
    disk: rig::SmallDisk,
    index: LayerIndex,
    /// Store range and tar offset of each chunk, in order.
    chunks: Vec<(Range<u64>, u64)>,
    second: String,
}

/// Files, most of them smaller than a chunk, that compress to a half.
fn files(seed: u64, count: u64) -> Vec<(String, Vec<u8>)> {
    let random = Random::new(seed);
    (0..count)
        .map(|number| {
            let len =
                if number % 9 == 0 { 500_000 + random.below(300_000) } else { 1 + random.below(40_000) };
            let content = noise(seed + number, len as usize).into_iter().map(|byte| byte & 0x55).collect();
            (format!("file{number}"), content)
        })
        .collect()
}

fn index_of(blob: &[u8]) -> LayerIndex {
    let mut indexer = LayerIndexer::new(OPTIONS, NoSink).expect("indexer");
    indexer.push(blob).expect("push");
    indexer.finish(&digest_of(blob)).expect("index").0
}

impl Truth {
    fn new() -> Self {
        let disk = rig::SmallDisk::new(256 << 20);
        let dir = &disk.dir;
        let blob = gzip(&tar_of(&files(1, 100)));
        let index = index_of(&blob);
        fs::write(dir.join("blob"), &blob).expect("write");
        fs::write(dir.join("index"), index.blob()).expect("write");
        let second = gzip(&tar_of(&files(2, 60)));
        fs::write(dir.join("second"), &second).expect("write");
        let second_index = index_of(&second);
        fs::write(dir.join("second-diff-id"), second_index.header().diff_id_text()).expect("write");
        let mut chunks = Vec::new();
        for item in index.toc().expect("toc") {
            let item = item.expect("item");
            let Some(extent) = item.extents.first() else { continue };
            for chunk in item.chunks {
                let store = chunk.store_offset.get();
                let tar = extent.tar_offset.get() + (store - extent.store_offset.get());
                chunks.push((store..store + u64::from(chunk.len.get()), tar));
            }
        }
        println!("{} bytes, {} chunks, {} spans", blob.len(), chunks.len(), index.spans().len());
        Self { disk, index, chunks, second: digest_of(&second) }
    }

    fn store(&self) -> Store {
        Store::open(&self.disk.dir.join("store"), 1 << 20).expect("the store opens")
    }

    /// Numbers of the chunks that are verified; `None` if there is no such layer.
    fn verified(&self, store: &Store) -> Option<BTreeSet<usize>> {
        let layer = store.layer(&self.index.header().layer_digest_text()).expect("layer")?;
        Some((0..self.chunks.len()).filter(|at| layer.has(self.chunks[*at].0.clone())).collect())
    }

    /// What the last child asked for.
    fn take_asked(&self) -> Vec<Range<u64>> {
        let path = self.disk.dir.join("asked");
        let text = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, b"").expect("emptied");
        text.lines()
            .map(|line| {
                let (start, end) = line.split_once(' ').expect("two numbers");
                start.parse().expect("a number")..end.parse().expect("a number")
            })
            .collect()
    }

    /// Chunks that begin in spans wholly within a range of the blob, by span.
    fn chunks_by_span(&self, asked: &Range<u64>) -> Vec<Vec<usize>> {
        let spans = self.index.spans();
        let end = |at: usize| {
            spans.get(at + 1).map_or((u64::MAX, self.index.header().layer_size.get()), |next| {
                (next.tar_offset.get(), next.compressed_offset.get())
            })
        };
        (0..spans.len())
            .filter(|at| asked.start <= spans[*at].compressed_offset.get() && end(*at).1 <= asked.end)
            // The last one is shorter, and may be asked for only for the chunk that reaches into it.
            .filter(|at| at + 1 < spans.len() || asked.start == spans[*at].compressed_offset.get())
            .map(|at| {
                let tar = spans[at].tar_offset.get()..end(at).0;
                (0..self.chunks.len()).filter(|chunk| tar.contains(&self.chunks[*chunk].1)).collect()
            })
            .collect()
    }
}

#[derive(Debug, Default)]
struct Counts {
    kills: u64,
    ended: u64,
    completed: u64,
    spans_asked: u64,
    chunks_wanted: u64,
    chunks_beside: u64,
    chunks_checked: u64,
}

fn parent() {
    let (truth, random, began) = (Truth::new(), Random::new(42), Instant::now());
    let mut before = BTreeSet::new();
    let mut counts = Counts::default();
    let me = std::env::current_exe().expect("this binary");
    for seed in 0.. {
        if counts.kills == KILLS {
            break;
        }
        let killed = kill_one(&me, &truth.disk.dir, seed, Duration::from_micros(random.below(120_000)));
        counts.kills += u64::from(killed);
        counts.ended += u64::from(!killed);
        let store = truth.store();
        let report = store.fsck().expect("fsck");
        assert_eq!(report.problems, Vec::<String>::new(), "after child {seed}");
        counts.chunks_checked += report.chunks_checked;
        if let Some(second) = store.layer(&truth.second).expect("layer") {
            assert!(second.is_complete(), "a pull left half a layer");
            drop(second);
            store.remove_layer(&truth.second).expect("remove");
        }
        check_asked(&truth, &before, removes_first(seed), &mut counts);
        let now = truth.verified(&store).unwrap_or_default();
        assert!(removes_first(seed) || now.is_superset(&before), "child {seed} lost what was recorded");
        before = now;
        let layer = store.layer(&truth.index.header().layer_digest_text()).expect("layer");
        if layer.is_some_and(|layer| layer.is_complete()) {
            counts.completed += 1;
            store.remove_layer(&truth.index.header().layer_digest_text()).expect("remove");
            before.clear();
        }
    }
    println!("{counts:?} in {:.1} s", began.elapsed().as_secs_f64());
    assert!(counts.completed > 0 && counts.spans_asked > 0);
}

/// Starts a child and kills it after a while, mostly counted from when its store is open; whether it was still there.
fn kill_one(me: &Path, dir: &Path, seed: u64, after: Duration) -> bool {
    let mut command = Command::new(me);
    command.arg("--child").arg(dir).arg(seed.to_string()).stdout(Stdio::piped());
    let mut child: Child = command.spawn().expect("child");
    let mut ready = [0];
    if !seed.is_multiple_of(8) {
        let count = child.stdout.as_mut().expect("a pipe").read(&mut ready).expect("read");
        assert_eq!(count, 1, "child {seed} ended before its store was open");
    }
    let ended = if is_spared(seed) {
        Some(child.wait().expect("wait"))
    } else {
        std::thread::sleep(after);
        child.try_wait().expect("wait")
    };
    if let Some(status) = ended {
        assert!(status.success(), "child {seed}: {status}");
        return false;
    }
    child.kill().expect("kill");
    let status = child.wait().expect("wait");
    assert!(status.code().is_none() || status.success(), "child {seed} failed by itself: {status}");
    true
}

/// Every span that was asked for had a chunk that was not verified before.
fn check_asked(truth: &Truth, before: &BTreeSet<usize>, removed: bool, counts: &mut Counts) {
    for asked in truth.take_asked() {
        for chunks in truth.chunks_by_span(&asked) {
            counts.spans_asked += 1;
            let beside = chunks.iter().filter(|chunk| before.contains(chunk)).count();
            counts.chunks_wanted += (chunks.len() - beside) as u64;
            counts.chunks_beside += beside as u64;
            assert!(
                removed || beside < chunks.len(),
                "{asked:?}: all chunks of a span were verified, and it was fetched again"
            );
        }
    }
}
