//! A start of which nothing is known: what it will read is guessed from what it reads, and fetched in the prefetch lane.
//!
//! A start never waits for anything here. All ends with the start's window, and is bounded in bytes and in number.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use serde::Deserialize;
use sluice_image::entry::EntryKind;
use sluice_image::index::LayerIndex;
use sluice_prefetch::{Elf, ElfBytes, ElfNeeds, FilePlace, ImageTree, Pace};
use sluice_store::Store;
use sluice_stream::{StreamError, StreamedLayer};
use tokio::sync::{mpsc, oneshot};

use super::Node;
use super::ahead::Streamed;

/// Images with more entries are not guessed about: what is kept of them would take too much memory.
const MAX_ENTRIES: u64 = 100_000;
/// Guesses of one start.
const MAX_GUESSES: usize = 4096;
/// Compressed bytes of one start's guesses.
const MAX_BYTES: u64 = 64 << 20;
/// Reads that wait to be looked at; more are not.
const MISSES: usize = 256;
/// Of an ELF file that something else loads so much is fetched: of most all.
const LOADED: u64 = 8 << 20;

/// What is guessed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Guess {
    /// A file that is read is read to its end.
    File,
    /// What an ELF file says that it needs is loaded.
    Elf,
}

/// Tells reads that have to wait to who guesses.
#[derive(Debug, Default)]
pub(super) struct Misses {
    listeners: AtomicUsize,
    starts: Mutex<Vec<(Vec<String>, mpsc::Sender<Miss>)>>,
}

/// Number of the layer, and bytes of its local file.
type Miss = (usize, Range<u64>);

impl Misses {
    fn listen(&self, layers: Vec<String>) -> mpsc::Receiver<Miss> {
        let (tell, misses) = mpsc::channel(MISSES);
        let mut starts = self.lock();
        starts.push((layers, tell));
        self.listeners.store(starts.len(), Ordering::Release);
        misses
    }

    /// A read of a layer has to wait.
    pub(super) fn tell(&self, layer: &str, bytes: Range<u64>) {
        if self.listeners.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut starts = self.lock();
        starts.retain(|(layers, tell)| {
            if let Some(number) = layers.iter().position(|one| one == layer) {
                // What a full queue does not take is one guess less.
                drop(tell.try_send((number, bytes.clone())));
            }
            !tell.is_closed()
        });
        self.listeners.store(starts.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Vec<String>, mpsc::Sender<Miss>)>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something to do.
#[derive(Debug)]
enum Work {
    Fetch(usize, Range<u64>),
    /// To find out what a file needs.
    Look(FilePlace),
}

/// What came of it.
#[derive(Debug, Default)]
struct Done {
    compressed_bytes: u64,
    needs: Option<(FilePlace, ElfNeeds)>,
}

/// The guesses about one start.
#[derive(Debug)]
struct Guesses {
    switches: Vec<Guess>,
    /// By number; none that are local.
    layers: Vec<Option<Arc<StreamedLayer>>>,
    tree: Arc<ImageTree>,
    work: VecDeque<Work>,
    /// Files of which is found out, or will be, what they need.
    looked: HashSet<FilePlace>,
    /// Where what was asked for of a file ends.
    rests: HashMap<FilePlace, u64>,
    guesses: usize,
    bytes: u64,
}

impl Node {
    /// Fetches what a start will probably read, until its window is `over`. Its first program is one of `programs`.
    pub(super) async fn guess(
        self: &Arc<Self>,
        digests: Vec<String>,
        streamed: Streamed,
        programs: Vec<String>,
        mut over: oneshot::Receiver<()>,
    ) {
        if !self.config.prefetch || self.config.guess.is_empty() {
            return;
        }
        let mut misses = self.misses.listen(digests.clone());
        let layers = digests.iter().map(|digest| streamed.get(digest).cloned()).collect();
        let store = self.store.clone();
        let tree = tokio::task::spawn_blocking(move || tree_of(&store, &digests)).await;
        let tree = match tree.map_err(anyhow::Error::from).flatten() {
            Ok(Some(tree)) => Arc::new(tree),
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "nothing is guessed of a start");
                return;
            }
        };
        let mut guesses = Guesses::new(self.config.guess.clone(), layers, tree);
        guesses.program(&programs);
        let pace = Arc::new(Pace::new(self.config.prefetch_bytes_per_second));
        let mut under_way: FuturesUnordered<BoxFuture<'static, Result<Done, StreamError>>> =
            FuturesUnordered::new();
        let until = tokio::time::sleep(self.config.record_window);
        tokio::pin!(until);
        loop {
            while under_way.len() < self.config.prefetch_in_flight
                && let Some(work) = guesses.next()
            {
                under_way.push(guesses.begin(work, Arc::clone(&pace)));
            }
            tokio::select! {
                _ = &mut over => break,
                () = &mut until => break,
                Some((layer, bytes)) = misses.recv() => guesses.read(layer, bytes),
                Some(done) = under_way.next() => match done {
                    Ok(done) => guesses.done(done),
                    Err(error) => tracing::debug!(%error, "a guess cannot be fetched"),
                },
            }
        }
        tracing::info!(
            guesses = guesses.guesses,
            bytes = guesses.bytes,
            "what a start would read was guessed"
        );
    }
}

impl Guesses {
    fn new(switches: Vec<Guess>, layers: Vec<Option<Arc<StreamedLayer>>>, tree: Arc<ImageTree>) -> Self {
        Self {
            switches,
            layers,
            tree,
            work: VecDeque::new(),
            looked: HashSet::new(),
            rests: HashMap::new(),
            guesses: 0,
            bytes: 0,
        }
    }

    fn has(&self, switch: Guess) -> bool {
        self.switches.contains(&switch)
    }

    fn next(&mut self) -> Option<Work> {
        if self.guesses >= MAX_GUESSES || self.bytes >= MAX_BYTES {
            return None;
        }
        let work = self.work.pop_front()?;
        self.guesses += 1;
        Some(work)
    }

    fn begin(&self, work: Work, pace: Arc<Pace>) -> BoxFuture<'static, Result<Done, StreamError>> {
        let layer = match &work {
            Work::Fetch(layer, _) => *layer,
            Work::Look(file) => file.layer as usize,
        };
        let Some(layer) = self.layers.get(layer).cloned().flatten() else {
            return std::future::ready(Ok(Done::default())).boxed();
        };
        async move {
            pace.wait().await;
            let done = match work {
                Work::Fetch(_, bytes) => {
                    Done { compressed_bytes: layer.prefetch(bytes).await?, ..Done::default() }
                }
                Work::Look(file) => look(&layer, file).await?,
            };
            pace.spend(done.compressed_bytes);
            Ok(done)
        }
        .boxed()
    }

    /// The first program is known before it is read.
    fn program(&mut self, programs: &[String]) {
        let tree = Arc::clone(&self.tree);
        let found = programs.iter().find_map(|path| tree.find(path.as_bytes()));
        if let Some(file) = found.filter(|_| self.has(Guess::Elf)) {
            self.load(file);
        }
    }

    /// A file will be loaded.
    fn load(&mut self, file: FilePlace) {
        if self.looked.insert(file) {
            // What it needs is found out before the rest of any is fetched.
            let looks = self.work.partition_point(|work| matches!(work, Work::Look(_)));
            self.work.insert(looks, Work::Look(file));
            let end = file.offset.saturating_add(file.size.min(LOADED));
            self.work.push_back(Work::Fetch(file.layer as usize, file.offset..end));
        }
    }

    /// A process waits for bytes of a layer.
    fn read(&mut self, layer: usize, bytes: Range<u64>) {
        let Some(file) = self.tree.file_at(layer as u32, bytes.start) else { return };
        if self.has(Guess::Elf) && self.looked.insert(file) {
            self.work.push_front(Work::Look(file));
        }
        if self.has(Guess::File)
            && let Some(rest) = ImageTree::rest_of(file, bytes.end)
        {
            let asked = self.rests.entry(file).or_insert(0);
            let rest = rest.start.max(*asked)..rest.end;
            if !rest.is_empty() && self.work.len() < MAX_GUESSES {
                *asked = rest.end;
                self.work.push_back(Work::Fetch(layer, rest));
            }
        }
    }

    fn done(&mut self, done: Done) {
        self.bytes += done.compressed_bytes;
        if let Some((file, needs)) = done.needs {
            let tree = Arc::clone(&self.tree);
            tree.needed(file, &needs).into_iter().for_each(|file| self.load(file));
        }
    }
}

/// Finds out what a file needs, from as few bytes as that takes, which are fetched if nobody else does.
async fn look(layer: &Arc<StreamedLayer>, file: FilePlace) -> Result<Done, StreamError> {
    let mut bytes = ElfBytes::new(file.size);
    let mut done = Done::default();
    loop {
        match bytes.look() {
            Elf::Nothing => return Ok(done),
            Elf::Needs(needs) => return Ok(Done { needs: Some((file, needs)), ..done }),
            Elf::Wants(part) => {
                let place = file.offset.saturating_add(part.start)..file.offset.saturating_add(part.end);
                let Some(asked) = layer.bring(place.clone()).await? else { return Ok(done) };
                done.compressed_bytes += asked;
                let source = Arc::clone(layer);
                let read = tokio::task::spawn_blocking(move || {
                    let mut buffer = vec![0; usize::try_from(place.end - place.start).unwrap_or(0)];
                    // What cannot be read ends the guess.
                    source.layer().try_read(place.start, &mut buffer).is_ok_and(|here| here).then_some(buffer)
                });
                match read.await.ok().flatten() {
                    Some(piece) => bytes.add(part.start, piece),
                    None => return Ok(done),
                }
            }
        }
    }
}

/// The files of an image's layers; none if they are too many. Blocks the thread.
fn tree_of(store: &Store, digests: &[String]) -> Result<Option<ImageTree>> {
    let mut tree = ImageTree::default();
    let mut entries = 0;
    for digest in digests {
        let layer = store.layer(digest)?.context("a layer vanished")?;
        let index = LayerIndex::from_blob(std::fs::read(layer.index_path())?)?;
        entries += index.header().entry_count.get();
        if entries > MAX_ENTRIES {
            return Ok(None);
        }
        tree.layer();
        for item in index.toc()? {
            let item = item?;
            let Some(entry) = item.entry else { continue };
            match entry.kind {
                EntryKind::File { size, store_offset } => {
                    let executable = entry.mode & 0o111 != 0;
                    tree.file(entry.path, executable, !item.chunks.is_empty(), store_offset, size);
                }
                EntryKind::Symlink { target } => tree.link(entry.path, target),
                EntryKind::HardLink { target } => tree.link(entry.path, [b"/", &target[..]].concat()),
                _ => {}
            }
        }
    }
    Ok(Some(tree))
}
