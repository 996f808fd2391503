//! What the tests and examples of this crate share: made-up layers, an image of them, and a source with moods.
//!
//! Every eight bytes of a layer follow from its number and their offset, so a byte that comes from the wrong layer, the wrong
//! block or a hole is seen at once.
#![allow(dead_code, reason = "each test and example takes what it needs")]

pub(crate) mod walk;

use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sluice_blockfs::{BlockFs, BlockSource, Choice, Device, ImageMount, Options, ReadError, Way};
use sluice_image::entry::{Entry, EntryKind, Timestamp};
use sluice_image::erofs::{self, Form};
use sluice_image::merge::{MergeError, Tree};
use sluice_kernel::mount::UnmountOptions;
use sluice_kernel::{loop_device, mounts, unmount};
use tokio::sync::watch;

pub(crate) const BLOCK: u64 = 4096;
/// What the tests run over: both ways that most kernels have, or those that `BLOCKFS_WAYS` names.
pub(crate) fn ways() -> Vec<Way> {
    let named = std::env::var("BLOCKFS_WAYS").unwrap_or_default();
    let wanted = if named.is_empty() { "io_uring classic" } else { &named };
    let all = [Way::ZeroCopy, Way::IoUring, Way::Classic];
    let ways: Vec<Way> = all.into_iter().filter(|way| wanted.contains(&way.to_string())).collect();
    assert!(!ways.is_empty(), "BLOCKFS_WAYS is {named}");
    ways
}

/// Whether sources expose a hole, for which tests must fail: proof that they can.
fn hole_exposed() -> bool {
    std::env::var("BLOCKFS_BROKEN").is_ok_and(|what| what == "hole")
}
/// A program that reads its arguments, which an image can hold: tests run it from there.
const PROGRAM: &str = "/usr/bin/sha256sum";
/// How long the kernel may take for what it does in its own time (autoclear, lazy unmount).
const PATIENCE: Duration = Duration::from_secs(20);

/// The eight bytes at `offset` (a multiple of eight) of layer `layer`.
pub(crate) fn word(layer: usize, offset: u64) -> [u8; 8] {
    let mut x =
        (layer as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ offset.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 31)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ (x >> 29)).to_le_bytes()
}

/// `len` bytes from `offset`, a multiple of eight, of layer `layer`.
pub(crate) fn expected(layer: usize, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&word(layer, offset + bytes.len() as u64));
    }
    bytes.truncate(len);
    bytes
}

/// A file of the image and where its content is.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) path: PathBuf,
    pub(crate) layer: usize,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// The whole layer.
    pub(crate) content: Arc<Vec<u8>>,
}

impl Sample {
    /// What `len` bytes from `at` of the file should be.
    pub(crate) fn bytes(&self, at: u64, len: usize) -> &[u8] {
        let start = (self.offset + at) as usize;
        &self.content[start..start + len]
    }
}

/// A directory with an image in it. When it goes, so does all that is mounted below it.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) metadata: PathBuf,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) samples: Vec<Sample>,
    /// Where below an image's root [`PROGRAM`] is, if it was asked for.
    pub(crate) program: Option<PathBuf>,
}

impl Room {
    /// An image whose layer `n` has files of the sizes `layers[n]`, in bytes.
    pub(crate) fn new(layers: &[Vec<u64>]) -> Self {
        Self::build(layers, &[])
    }

    /// One that has a layer more, which holds a program.
    pub(crate) fn with_program(layers: &[Vec<u64>]) -> Self {
        let program = fs::read(PROGRAM).expect("the program is installed");
        let mut layers = layers.to_vec();
        layers.push(vec![program.len() as u64]);
        Self::build(&layers, &program)
    }

    fn build(layers: &[Vec<u64>], program: &[u8]) -> Self {
        // Not /tmp: it may be a tmpfs, which has no direct I/O on older kernels.
        let dir = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
        let mut tree = Tree::new();
        let (mut paths, mut samples, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, sizes) in layers.iter().enumerate() {
            let end: u64 = sizes.iter().map(|size| size.next_multiple_of(BLOCK)).sum();
            let content = Arc::new(expected(layer, 0, end as usize));
            let (entries, own) = layout(layer, sizes, &content);
            tree.apply(entries.into_iter().map(Ok::<_, MergeError>)).expect("merges");
            let path = dir.path().join(format!("layer{layer}"));
            fs::write(&path, &*content).expect("writes");
            File::open(&path).expect("opens").sync_all().expect("synced");
            paths.push(path);
            samples.extend(own);
            blocks.push(end / BLOCK);
        }
        let metadata = dir.path().join("metadata.erofs");
        let mut out = std::io::BufWriter::new(File::create(&metadata).expect("creates"));
        erofs::write(&tree, &blocks, Form::Devices, &mut out).expect("writes");
        out.into_inner().expect("flushes").sync_all().expect("synced");
        let last = paths.last().filter(|_| !program.is_empty()).map(|path| {
            let file = File::options().write(true).open(path).expect("opens");
            file.write_all_at(program, 0).expect("writes");
            file.sync_all().expect("synced");
            samples.pop().expect("a sample for each file").path
        });
        Self { dir, metadata, layers: paths, samples, program: last }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Mounts FUSE on `blocks` in this room.
    pub(crate) fn blockfs(&self, runtime: &tokio::runtime::Runtime, way: Way) -> BlockFs {
        mount_blocks(self.dir.path(), runtime, options(way))
    }

    /// A source for each layer, all local.
    pub(crate) fn sources(&self) -> Vec<Arc<MoodySource>> {
        self.layers.iter().map(|path| MoodySource::open(path)).collect()
    }

    /// Reads every file below `root` and compares it.
    pub(crate) fn check(&self, root: &Path) {
        for sample in &self.samples {
            check(root, sample);
        }
    }

    /// Forgets the cached pages of every file below `root`.
    pub(crate) fn forget(&self, root: &Path) {
        for sample in &self.samples {
            forget(&root.join(&sample.path));
        }
    }

    /// Loop devices on files below this room.
    pub(crate) fn devices(&self) -> Vec<loop_device::LoopListing> {
        devices_below(self.dir.path())
    }

    /// Waits until nothing of this room is mounted or attached.
    pub(crate) fn assert_released(&self) {
        let below =
            || mounts().expect("mounts").into_iter().any(|mount| mount.target.starts_with(self.dir.path()));
        wait_until("mounts and devices are released", || self.devices().is_empty() && !below());
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut targets: Vec<_> = mounts().expect("mounts").into_iter().map(|mount| mount.target).collect();
        targets.retain(|target| target.starts_with(self.dir.path()));
        for target in targets.iter().rev() {
            if let Err(error) = unmount(target, UnmountOptions { lazy: true, force: false }) {
                eprintln!("{error}: {}", target.display());
            }
        }
    }
}

/// Entries and samples of a layer.
fn layout(layer: usize, sizes: &[u64], content: &Arc<Vec<u8>>) -> (Vec<Entry>, Vec<Sample>) {
    let entry = |path: String, kind| Entry {
        path: path.into_bytes(),
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    let mut entries = vec![entry(format!("layer{layer}"), EntryKind::Directory)];
    let (mut samples, mut end) = (Vec::new(), 0);
    for (number, size) in sizes.iter().copied().enumerate() {
        let path = format!("layer{layer}/file{number}");
        entries.push(entry(path.clone(), EntryKind::File { size, store_offset: end }));
        samples.push(Sample { path: path.into(), layer, offset: end, size, content: Arc::clone(content) });
        end += size.next_multiple_of(BLOCK);
    }
    (entries, samples)
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

pub(crate) fn options(way: Way) -> Options {
    Options { choice: Choice::Only(way), ..Options::default() }
}

pub(crate) fn mount_blocks(room: &Path, runtime: &tokio::runtime::Runtime, options: Options) -> BlockFs {
    let dir = room.join("blocks");
    fs::create_dir_all(&dir).expect("creates");
    let blockfs = BlockFs::mount(&dir, options, runtime.handle().clone()).expect("FUSE mounts");
    assert!(options.choice == Choice::Auto || options.choice == Choice::Only(blockfs.way().0));
    blockfs
}

/// A loop device on the FUSE file of each source.
pub(crate) fn attach_all(blockfs: &BlockFs, sources: &[Arc<MoodySource>]) -> Vec<Arc<Device>> {
    let attach = |(number, source): (usize, &Arc<MoodySource>)| {
        let source = Arc::clone(source) as Arc<dyn BlockSource>;
        let path = blockfs.add(&format!("layer{number}"), source).expect("added").remove(0);
        Arc::new(Device::attach(&path).expect("attaches"))
    };
    sources.iter().enumerate().map(attach).collect()
}

pub(crate) fn mount_image(room: &Room, devices: Vec<Arc<Device>>, name: &str) -> ImageMount {
    ImageMount::mount(&room.metadata, devices, &room.path(name)).expect("EROFS mounts")
}

/// Reads one file whole and compares it.
pub(crate) fn check(root: &Path, sample: &Sample) {
    let path = root.join(&sample.path);
    let mut file = File::open(&path).expect("opens");
    let mut at = 0;
    let mut buffer = vec![0; 1 << 17];
    loop {
        let got =
            file.read(&mut buffer).unwrap_or_else(|error| panic!("{} at {at}: {error}", path.display()));
        if got == 0 {
            break;
        }
        assert!(buffer[..got] == *sample.bytes(at, got), "{} at {at}", path.display());
        at += got as u64;
    }
    assert_eq!(at, sample.size, "{}", path.display());
}

/// Drops a file's pages from the page cache, so that the next read goes to its device.
pub(crate) fn forget(path: &Path) {
    let file = File::open(path).expect("opens");
    posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advised");
}

pub(crate) fn devices_below(dir: &Path) -> Vec<loop_device::LoopListing> {
    let mut found = loop_device::list().expect("listed");
    found.retain(|device| device.backing_file.starts_with(dir));
    found
}

/// Waits for what the kernel does in its own time.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How a source behaves at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Everything is local, and in the local file: not asked for once this was seen.
    OnDisk,
    /// Everything is local, in memory.
    Local,
    /// Two of three reads wait 1 to 8 ms, the third is local. Every third block is in the local file.
    Mixed,
    /// Like `Mixed`, and what waited comes in less than was asked for, in whole blocks.
    Pieces,
    /// A read waits until the mood changes.
    Stuck,
    /// Reads fail with this errno.
    Fail(i32),
    /// More bytes than asked for: a fault of the source.
    TooMuch,
    /// No bytes: another.
    Nothing,
}

/// A layer's file behind a source that can be slow, stuck or broken.
#[derive(Debug)]
pub(crate) struct MoodySource {
    file: Arc<File>,
    size: u64,
    mood: Mutex<watch::Sender<Mood>>,
    /// Reads that had to wait, and those that did not.
    pub(crate) waited: AtomicU64,
    pub(crate) hit: AtomicU64,
    /// What it can bring again of what the file does not give any more.
    pub(crate) again: OnceLock<Vec<u8>>,
    /// Bytes that it was told of.
    lost: Mutex<Vec<Range<u64>>>,
}

impl MoodySource {
    pub(crate) fn open(path: &Path) -> Arc<Self> {
        let file = Arc::new(File::open(path).expect("opens"));
        let size = file.metadata().expect("stat").len();
        let mood = Mutex::new(watch::Sender::new(Mood::Local));
        let (waited, hit, again, lost) = Default::default();
        Arc::new(Self { file, size, mood, waited, hit, again, lost })
    }

    fn is_lost(&self, offset: u64, len: usize) -> bool {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.iter().any(|range| range.start < offset + len as u64 && offset < range.end)
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).send_replace(mood);
    }

    fn mood(&self) -> watch::Receiver<Mood> {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).subscribe()
    }

    fn bytes(&self, offset: u64, len: usize) -> Result<Bytes, ReadError> {
        if let Some(again) = self.again.get() {
            return Ok(Bytes::copy_from_slice(&again[offset as usize..offset as usize + len]));
        }
        let mut bytes = vec![0; len];
        let failed = |error: std::io::Error| ReadError { errno: 5, message: error.to_string() };
        self.file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        if hole_exposed() {
            bytes.fill(0);
        }
        Ok(bytes.into())
    }
}

impl BlockSource for MoodySource {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
        if self.again.get().is_some() && self.is_lost(offset, buffer.len()) {
            return Ok(false);
        }
        let local = match *self.mood().borrow() {
            Mood::OnDisk | Mood::Local => true,
            Mood::Mixed | Mood::Pieces => (offset / BLOCK).is_multiple_of(3),
            Mood::Stuck | Mood::Fail(_) | Mood::TooMuch | Mood::Nothing => false,
        };
        if local {
            self.hit.fetch_add(1, Ordering::Relaxed);
            self.file.read_exact_at(buffer, offset)?;
        }
        Ok(local)
    }

    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>> {
        async move {
            self.waited.fetch_add(1, Ordering::Relaxed);
            let mut mood = self.mood();
            let changed = mood.wait_for(|mood| *mood != Mood::Stuck).await.map(|mood| *mood);
            match changed.map_err(|error| ReadError { errno: 5, message: error.to_string() })? {
                Mood::Fail(errno) => Err(ReadError { errno, message: "as the test wants".to_owned() }),
                Mood::TooMuch => self.bytes(offset, len).map(|bytes| [&bytes[..], &[0; 8]].concat().into()),
                Mood::Nothing => Ok(Bytes::new()),
                Mood::OnDisk | Mood::Local | Mood::Stuck => self.bytes(offset, len),
                now => {
                    tokio::time::sleep(Duration::from_millis(1 + offset / BLOCK % 8)).await;
                    let half = (len / 2).next_multiple_of(BLOCK as usize).min(len);
                    self.bytes(offset, if now == Mood::Pieces { half } else { len })
                }
            }
        }
        .boxed()
    }

    fn file(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.file))
    }

    fn on_disk(&self, range: Range<u64>) -> Range<u64> {
        let offset = range.start;
        match *self.mood().borrow() {
            Mood::OnDisk if !self.is_lost(offset, (self.size - offset) as usize) => range,
            // Every third block.
            Mood::Mixed => {
                let third = (offset / BLOCK).is_multiple_of(3);
                let start = if third { offset } else { offset.next_multiple_of(3 * BLOCK) };
                start.min(range.end)..((start / BLOCK + 1) * BLOCK).min(range.end)
            }
            _ => offset..offset,
        }
    }

    fn unreadable(&self, offset: u64, len: usize) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).push(offset..offset + len as u64);
    }
}
