//! What the tests and examples of this crate share: made-up layers, an image of them, and a source with moods.
//!
//! Every eight bytes of a layer follow from its number and their offset, so a byte that comes from the wrong layer, the wrong
//! block or a hole is seen at once.
#![allow(dead_code, reason = "each test and example takes what it needs")]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sluice_blockfs::{BlockFs, BlockSource, Device, ImageMount, ReadError};
use sluice_image::entry::{Entry, EntryKind, Timestamp};
use sluice_image::erofs::{self, Form};
use sluice_image::merge::{MergeError, Tree};
use sluice_kernel::mount::UnmountOptions;
use sluice_kernel::{loop_device, mounts, unmount};
use tokio::sync::watch;

pub(crate) const BLOCK: u64 = 4096;
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
    let mut bytes: Vec<u8> =
        (0..len.div_ceil(8) as u64).flat_map(|index| word(layer, offset + index * 8)).collect();
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
}

/// A directory with an image in it. When it goes, so does all that is mounted below it.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) metadata: PathBuf,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) samples: Vec<Sample>,
}

impl Room {
    /// An image whose layer `n` has files of the sizes `layers[n]`, in bytes.
    pub(crate) fn new(layers: &[Vec<u64>]) -> Self {
        // Not /tmp: it may be a tmpfs, which has no direct I/O on older kernels.
        let dir = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
        let mut tree = Tree::new();
        let (mut paths, mut samples, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, sizes) in layers.iter().enumerate() {
            let (entries, own, end) = layout(layer, sizes);
            tree.apply(entries.into_iter().map(Ok::<_, MergeError>)).expect("merges");
            let path = dir.path().join(format!("layer{layer}"));
            write_layer(&path, layer, end);
            paths.push(path);
            samples.extend(own);
            blocks.push(end / BLOCK);
        }
        let metadata = dir.path().join("metadata.erofs");
        let mut out = std::io::BufWriter::new(File::create(&metadata).expect("creates"));
        erofs::write(&tree, &blocks, Form::Devices, &mut out).expect("writes");
        out.into_inner().expect("flushes").sync_all().expect("synced");
        Self { dir, metadata, layers: paths, samples }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Mounts FUSE on `blocks` in this room.
    pub(crate) fn blockfs(&self, runtime: &tokio::runtime::Runtime) -> BlockFs {
        mount_blocks(self.dir.path(), runtime)
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

/// Entries, samples and size of a layer.
fn layout(layer: usize, sizes: &[u64]) -> (Vec<Entry>, Vec<Sample>, u64) {
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
        samples.push(Sample { path: path.into(), layer, offset: end, size });
        end += size.next_multiple_of(BLOCK);
    }
    (entries, samples, end)
}

fn write_layer(path: &Path, layer: usize, size: u64) {
    const PIECE: u64 = 1 << 20;
    let file = File::create(path).expect("creates");
    for at in (0..size).step_by(PIECE as usize) {
        let piece = expected(layer, at, PIECE.min(size - at) as usize);
        file.write_all_at(&piece, at).expect("writes");
    }
    file.sync_all().expect("synced");
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

pub(crate) fn mount_blocks(room: &Path, runtime: &tokio::runtime::Runtime) -> BlockFs {
    let dir = room.join("blocks");
    fs::create_dir_all(&dir).expect("creates");
    BlockFs::mount(&dir, runtime.handle().clone()).expect("FUSE mounts")
}

/// A loop device on the FUSE file of each source.
pub(crate) fn attach_all(blockfs: &BlockFs, sources: &[Arc<MoodySource>]) -> Vec<Arc<Device>> {
    let attach = |(number, source): (usize, &Arc<MoodySource>)| {
        let path = blockfs.add(&format!("layer{number}"), Arc::clone(source) as Arc<dyn BlockSource>);
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
        assert!(
            buffer[..got] == expected(sample.layer, sample.offset + at, got)[..],
            "{} at {at}",
            path.display()
        );
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
    /// Everything is local.
    Local,
    /// Two of three reads wait 1 to 8 ms, the third is local.
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
    file: File,
    size: u64,
    mood: Mutex<watch::Sender<Mood>>,
    /// Reads that had to wait, and those that did not.
    pub(crate) waited: AtomicU64,
    pub(crate) hit: AtomicU64,
}

impl MoodySource {
    pub(crate) fn open(path: &Path) -> Arc<Self> {
        let file = File::open(path).expect("opens");
        let size = file.metadata().expect("stat").len();
        let mood = Mutex::new(watch::Sender::new(Mood::Local));
        Arc::new(Self { file, size, mood, waited: AtomicU64::new(0), hit: AtomicU64::new(0) })
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).send_replace(mood);
    }

    fn mood(&self) -> watch::Receiver<Mood> {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).subscribe()
    }

    fn bytes(&self, offset: u64, len: usize) -> Result<Bytes, ReadError> {
        let mut bytes = vec![0; len];
        let failed = |error: std::io::Error| ReadError { errno: 5, message: error.to_string() };
        self.file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        Ok(bytes.into())
    }
}

impl BlockSource for MoodySource {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
        let local = match *self.mood().borrow() {
            Mood::Local => true,
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
                Mood::Local | Mood::Stuck => self.bytes(offset, len),
                now => {
                    tokio::time::sleep(Duration::from_millis(1 + offset / BLOCK % 8)).await;
                    let half = (len / 2).next_multiple_of(BLOCK as usize).min(len);
                    self.bytes(offset, if now == Mood::Pieces { half } else { len })
                }
            }
        }
        .boxed()
    }
}
