//! Layer store: one sparse file per layer, verified blocks, state that survives a crash.
//!
//! It takes verified chunks from the stream crate and gives them to the block crate; it does not know where they come from.
//! `state.redb` holds which layers and images there are and which blocks are verified; `layers/HEX/` holds a layer's file
//! (`data`), its index as far as it is here (`index`), and fixed-size records derived from it (`chunks`, `extents`, `digests`).

mod bitmap;
mod copies;
mod flush;
mod fsck;
mod gc;
mod ingest;
mod layer;
mod memory;
mod parts;
mod place;
mod reading;
mod records;
mod space;
mod state;
mod writer;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use sluice_image::index::IndexError;

use flush::Flushing;
use writer::Writer;

pub use copies::LocalCopies;
pub use fsck::FsckReport;
pub use gc::{Freed, InUse};
pub use ingest::Ingest;
pub use layer::Layer;
pub use space::StoreLimits;
pub use state::ImageRecord;

/// What went wrong in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the store open.
    #[error("the layer store {} is in use by another sluice; stop it, or give another --root", .0.display())]
    Locked(PathBuf),
    /// A file of the store cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The database failed.
    #[error("the state of the layer store cannot be read or written")]
    State(#[from] Box<redb::Error>),
    /// A record of the database is not understood.
    #[error("the state of the layer store holds a record that is not understood")]
    Record(#[from] serde_json::Error),
    /// A layer's index is not usable.
    #[error("index of layer {layer}")]
    Index {
        /// Digest of the layer.
        layer: String,
        /// Why not.
        #[source]
        source: IndexError,
    },
    /// A digest is not of the form `sha256:HEX`.
    #[error("`{0}` is not a sha256 digest")]
    Digest(String),
    /// A layer is not there.
    #[error("the store has no layer {0}")]
    NoLayer(String),
    /// The caller's handle is of a layer that was removed; another may have taken its place.
    #[error("layer {0} was removed from the store meanwhile")]
    Superseded(String),
    /// A layer cannot be complete while some of its bytes are only in memory.
    #[error("layer {0} is not all on the disk: there is no space")]
    OnlyInMemory(String),
    /// The disk did not keep what was written. What of it was not recorded is forgotten: it is to be fetched again.
    #[error("the disk did not keep what was written to layer {layer}; {bytes} bytes of it are fetched again")]
    Lost {
        /// Digest of the layer.
        layer: String,
        /// Bytes that were verified and are forgotten.
        bytes: u64,
        /// What the flush said.
        #[source]
        source: io::Error,
    },
    /// A layer cannot be complete while blocks are missing.
    #[error("layer {0} has blocks that are not verified")]
    NotFull(String),
}

/// Adds what was tried, and on what file.
pub(crate) trait OnFile<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T> OnFile<T> for io::Result<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::File { what, path: path.to_path_buf(), source })
    }
}

/// The node's layers and images. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    state: state::State,
    /// Open layers. Held while a record and its directory change together, so that no handle has one of each.
    open: Mutex<HashMap<String, Weak<Layer>>>,
    /// Held while a layer is put in its place: two must not put the same one there.
    placing: Mutex<()>,
    /// Layers staged so far.
    staged: AtomicU64,
    space: Arc<space::Space>,
    /// Ends before another process may have the store.
    _writer: Writer,
    _lock: File,
}

impl Store {
    /// Opens or makes the store at `root`, without a quota. `memory_budget_bytes` bounds what is kept in memory while the disk
    /// is full.
    pub fn open(root: &Path, memory_budget_bytes: u64) -> Result<Self, StoreError> {
        Self::open_with(root, StoreLimits::memory(memory_budget_bytes))
    }

    /// Opens or makes the store at `root`. Leftovers of a crash are removed.
    pub fn open_with(root: &Path, limits: StoreLimits) -> Result<Self, StoreError> {
        for dir in ["layers", "images", "tmp"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).on("create", &dir)?;
        }
        let lock_path = root.join("lock");
        let lock = File::create(&lock_path).on("create", &lock_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StoreError::Locked(root.to_path_buf())),
            Err(fs::TryLockError::Error(source)) => return Err(source).on("lock", &lock_path),
        }
        let state = state::State::open(&root.join("state.redb"))?;
        let space = Arc::new(space::Space::new(root, limits));
        let store = Self {
            inner: Arc::new(Inner {
                root: root.to_path_buf(),
                state,
                open: Mutex::default(),
                placing: Mutex::default(),
                staged: AtomicU64::default(),
                _writer: Writer::start(Arc::clone(&space.queue)),
                space,
                _lock: lock,
            }),
        };
        store.remove_leftovers()?;
        // Readers wait for this store, and to look at every file takes long.
        if store.quota_bytes().is_some() {
            store.measure()?;
        }
        Ok(store)
    }

    /// Where an image's EROFS metadata goes.
    pub fn erofs_path(&self, manifest_digest: &str) -> Result<PathBuf, StoreError> {
        Ok(self.inner.root.join("images").join(format!("{}.erofs", hex_of(manifest_digest)?)))
    }

    /// Where an image's layers go when it is pulled the ordinary way.
    pub fn unpacked_path(&self, layer_digest: &str) -> Result<PathBuf, StoreError> {
        Ok(self.inner.root.join("unpacked").join(hex_of(layer_digest)?))
    }

    /// A directory for files that are not state yet; emptied at every start.
    pub fn temporary(&self) -> PathBuf {
        self.inner.root.join("tmp")
    }

    /// Digests of all layers.
    pub fn layers(&self) -> Result<Vec<String>, StoreError> {
        self.inner.state.layers()
    }

    /// Tells when a layer that was complete has lost something. Who holds this does not hold the store.
    pub fn lost(&self) -> Arc<tokio::sync::Notify> {
        Arc::clone(&self.inner.space.lost)
    }

    /// Waits until what was verified so far is in the layers' files, or stays in memory because the disk does not take it. Blocks the
    /// thread.
    pub fn settle(&self) {
        self.inner.space.queue.settle();
    }

    /// Makes durable what was verified so far, but for what is in memory only. Flushes of a layer come one at a time: one that had to
    /// wait has nothing left to do. Blocks the thread.
    ///
    /// `Lost`: what was verified since the last flush is not there any more, and is to be fetched again.
    pub fn flush(&self, layer: &Layer) -> Result<(), StoreError> {
        self.flush_alone(layer, &mut layer.flushing())
    }

    fn flush_alone(&self, layer: &Layer, flushing: &mut Flushing) -> Result<(), StoreError> {
        self.record(layer, flushing, Vec::new())?;
        match layer.write_singly() {
            written if written.is_empty() => Ok(()),
            written => self.record(layer, flushing, written),
        }
    }

    /// Flushes the layer's file, then records what was verified before.
    fn record(&self, layer: &Layer, flushing: &mut Flushing, written: Vec<u64>) -> Result<(), StoreError> {
        let (state, digest, generation) = (&self.inner.state, layer.digest(), layer.generation());
        // It lost something since it was recorded as complete: there are no pages of its map to be changed.
        let anew = flushing.complete && !layer.is_complete();
        if anew {
            layer.mark_all();
        }
        let flushed = match layer.sync(written) {
            Err(error) if anew => {
                state.set_incomplete(digest, generation, &layer.durable_pages())?;
                flushing.complete = false;
                return Err(error);
            }
            flushed => flushed?,
        };
        let recorded = match flushed.pages.as_slice() {
            [] => Ok(()),
            pages if anew => state.set_incomplete(digest, generation, pages),
            pages => state.put_bits(digest, generation, pages),
        };
        match &recorded {
            Ok(()) => {
                flushing.complete &= !anew;
                layer.recorded(&flushed);
            }
            Err(_) => layer.not_recorded(&flushed),
        }
        recorded
    }

    /// Marks a layer complete: all blocks verified, all of them on the disk, and its diffID checked by the caller.
    pub fn mark_complete(&self, layer: &Layer) -> Result<(), StoreError> {
        let mut flushing = layer.flushing();
        self.flush_alone(layer, &mut flushing)?;
        if !layer.is_full() {
            return Err(StoreError::NotFull(layer.digest().to_owned()));
        }
        if layer.memory_bytes() > 0 {
            return Err(StoreError::OnlyInMemory(layer.digest().to_owned()));
        }
        // What was verified since the flush is not on the disk yet.
        if !layer.is_durable() {
            return Err(StoreError::NotFull(layer.digest().to_owned()));
        }
        self.inner.state.set_complete(layer.digest(), layer.generation())?;
        flushing.complete = true;
        layer.set_complete();
        Ok(())
    }

    /// Records an image.
    pub fn put_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        self.inner.state.put_image(image)
    }

    /// The image with this manifest.
    pub fn image(&self, manifest_digest: &str) -> Result<Option<ImageRecord>, StoreError> {
        self.inner.state.image(manifest_digest)
    }

    /// All images.
    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.inner.state.images()
    }

    /// An image is used now: others are evicted before it.
    pub fn touch_image(&self, manifest_digest: &str) -> Result<(), StoreError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.inner.state.touch_image(manifest_digest, now.as_secs())
    }
}

/// The hexadecimal part of a sha256 digest, checked, since it becomes a file name.
fn hex_of(digest: &str) -> Result<&str, StoreError> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| StoreError::Digest(digest.to_owned()))
}

fn remove_dir(dir: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", dir),
        _ => Ok(()),
    }
}
