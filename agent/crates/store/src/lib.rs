//! Layer store: one sparse file per layer, verified blocks, state that survives a crash.
//!
//! It takes verified chunks from the stream crate and gives them to the block crate; it does not know where they come from.
//! `state.redb` holds which layers and images there are and which blocks are verified; `layers/HEX/` holds a layer's file
//! (`data`), its index as far as it is here (`index`), and fixed-size records derived from it (`chunks`, `extents`).

mod bitmap;
mod fsck;
mod ingest;
mod layer;
mod records;
mod state;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use sluice_image::index::{IndexError, LayerIndex};

pub use fsck::FsckReport;
pub use ingest::Ingest;
pub use layer::Layer;
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
    open: Mutex<HashMap<String, Weak<Layer>>>,
    /// Held while a layer is put in its place: two must not put the same one there.
    placing: Mutex<()>,
    memory_budget_bytes: u64,
    _lock: File,
}

/// What `gc` removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Layers.
    pub layers: usize,
    /// Bytes on disk.
    pub bytes: u64,
}

impl Store {
    /// Opens or makes the store at `root`. Leftovers of a crash are removed. `memory_budget_bytes` bounds, per layer,
    /// what is kept in memory while the disk is full.
    pub fn open(root: &Path, memory_budget_bytes: u64) -> Result<Self, StoreError> {
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
        let store = Self {
            inner: Arc::new(Inner {
                root: root.to_path_buf(),
                state,
                open: Mutex::default(),
                placing: Mutex::default(),
                memory_budget_bytes,
                _lock: lock,
            }),
        };
        store.remove_leftovers()?;
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

    /// Adds a layer whose contents are to come. A layer that is there already stays.
    pub fn add_layer(&self, index: &LayerIndex) -> Result<Arc<Layer>, StoreError> {
        let digest = index.header().layer_digest_text();
        let _placing = self.inner.placing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = self.layer(&digest)? {
            return Ok(layer);
        }
        let dir = self.stage(index)?;
        let data = dir.join("data");
        File::create(&data)
            .and_then(|file| file.set_len(index.header().store_size.get()))
            .on("create", &data)?;
        self.publish(&dir, index, false)?;
        self.require(&digest)
    }

    /// Begins a layer that is decoded as it arrives.
    pub fn begin_ingest(&self) -> Result<Ingest, StoreError> {
        Ingest::begin(&self.temporary())
    }

    /// Ends an ingest: the layer is complete. The caller has compared its digest and diffID with the manifest and config.
    pub fn commit_ingest(&self, ingest: Ingest, index: &LayerIndex) -> Result<Arc<Layer>, StoreError> {
        let digest = index.header().layer_digest_text();
        let _placing = self.inner.placing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = self.layer(&digest)?
            && layer.is_complete()
        {
            return Ok(layer);
        }
        let dir = self.stage(index)?;
        ingest.finish(&dir.join("data"), index.header().store_size.get())?;
        self.lock_open().remove(&digest);
        self.publish(&dir, index, true)?;
        self.require(&digest)
    }

    /// A layer of the store.
    pub fn layer(&self, digest: &str) -> Result<Option<Arc<Layer>>, StoreError> {
        if let Some(layer) = self.lock_open().get(digest).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let Some(record) = self.inner.state.layer(digest)? else { return Ok(None) };
        let bits = self.inner.state.bits(digest)?;
        let dir = self.layer_dir(digest)?;
        let layer = Arc::new(Layer::open(digest, dir, &record, &bits, self.inner.memory_budget_bytes)?);
        let mut open = self.lock_open();
        // Another thread may have opened it meanwhile: there is one map of verified blocks per layer.
        if let Some(other) = open.get(digest).and_then(Weak::upgrade) {
            return Ok(Some(other));
        }
        open.insert(digest.to_owned(), Arc::downgrade(&layer));
        Ok(Some(layer))
    }

    /// Digests of all layers.
    pub fn layers(&self) -> Result<Vec<String>, StoreError> {
        self.inner.state.layers()
    }

    /// Makes durable what was verified so far. Blocks the thread.
    pub fn flush(&self, layer: &Layer) -> Result<(), StoreError> {
        let Some(pages) = layer.sync()? else { return Ok(()) };
        self.inner.state.put_bits(layer.digest(), &pages)
    }

    /// Marks a layer complete: all blocks verified and its diffID checked by the caller.
    pub fn mark_complete(&self, layer: &Layer) -> Result<(), StoreError> {
        self.flush(layer)?;
        self.inner.state.set_complete(layer.digest())?;
        layer.set_complete();
        Ok(())
    }

    /// Forgets a layer and its file.
    pub fn remove_layer(&self, digest: &str) -> Result<u64, StoreError> {
        let dir = self.layer_dir(digest)?;
        self.lock_open().remove(digest);
        self.inner.state.remove_layer(digest)?;
        let bytes = disk_bytes(&dir);
        remove_dir(&dir)?;
        Ok(bytes)
    }

    /// Records an image.
    pub fn put_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        self.inner.state.put_image(image)
    }

    /// All images.
    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.inner.state.images()
    }

    /// Forgets an image; its layers go with `gc`.
    pub fn remove_image(&self, manifest_digest: &str) -> Result<(), StoreError> {
        self.inner.state.remove_image(manifest_digest)?;
        let path = self.erofs_path(manifest_digest)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", &path),
            _ => Ok(()),
        }
    }

    /// Removes layers that no image names and `in_use` does not hold.
    pub fn gc(&self, in_use: &dyn Fn(&str) -> bool) -> Result<Freed, StoreError> {
        let images = self.images()?;
        let wanted =
            |digest: &str| images.iter().any(|image| image.layers.iter().any(|layer| layer == digest));
        let mut freed = Freed::default();
        for digest in self.layers()? {
            if !wanted(&digest) && !in_use(&digest) {
                freed.bytes += self.remove_layer(&digest)?;
                freed.layers += 1;
            }
        }
        let unpacked = self.inner.root.join("unpacked");
        for entry in fs::read_dir(&unpacked).into_iter().flatten() {
            let entry = entry.on("list", &unpacked)?;
            let digest = format!("sha256:{}", entry.file_name().to_string_lossy());
            if !wanted(&digest) && !in_use(&digest) {
                freed.bytes += disk_bytes(&entry.path());
                freed.layers += 1;
                remove_dir(&entry.path())?;
            }
        }
        Ok(freed)
    }

    /// Bytes that the store takes on disk.
    pub fn disk_bytes(&self) -> u64 {
        disk_bytes(&self.inner.root)
    }

    fn require(&self, digest: &str) -> Result<Arc<Layer>, StoreError> {
        self.layer(digest)?.ok_or_else(|| StoreError::Digest(digest.to_owned()))
    }

    fn layer_dir(&self, digest: &str) -> Result<PathBuf, StoreError> {
        Ok(self.inner.root.join("layers").join(hex_of(digest)?))
    }

    /// Writes what is derived from an index into a new temporary directory.
    fn stage(&self, index: &LayerIndex) -> Result<PathBuf, StoreError> {
        let header = index.header();
        let unique = format!("{}-{}", hex::encode(header.layer_digest), std::process::id());
        let dir = self.temporary().join(unique);
        remove_dir(&dir)?;
        fs::create_dir(&dir).on("create", &dir)?;
        let path = dir.join("index");
        fs::write(&path, index.blob()).on("write", &path)?;
        records::write_tables(index, &dir)?;
        Ok(dir)
    }

    /// Moves a staged layer to its place and records it.
    fn publish(&self, staged: &Path, index: &LayerIndex, complete: bool) -> Result<(), StoreError> {
        let digest = index.header().layer_digest_text();
        let dir = self.layer_dir(&digest)?;
        remove_dir(&dir)?;
        for name in ["data", "index", "chunks", "extents"] {
            let path = staged.join(name);
            File::open(&path).and_then(|file| file.sync_data()).on("flush", &path)?;
        }
        File::open(staged).and_then(|file| file.sync_all()).on("flush", staged)?;
        fs::rename(staged, &dir).on("move", staged)?;
        let parent = self.inner.root.join("layers");
        File::open(&parent).and_then(|file| file.sync_all()).on("flush", &parent)?;
        self.inner.state.put_layer(
            &digest,
            &state::LayerRecord {
                diff_id: index.header().diff_id_text(),
                store_size: index.header().store_size.get(),
                complete,
            },
        )
    }

    /// Temporary files, and directories of layers that were never recorded.
    fn remove_leftovers(&self) -> Result<(), StoreError> {
        let temporary = self.temporary();
        remove_dir(&temporary)?;
        fs::create_dir(&temporary).on("create", &temporary)?;
        for digest in self.layers()? {
            // A crash between the removal of an incomplete layer and its replacement.
            if !self.layer_dir(&digest)?.exists() {
                self.inner.state.remove_layer(&digest)?;
            }
        }
        let known = self.layers()?;
        let layers = self.inner.root.join("layers");
        for entry in fs::read_dir(&layers).on("list", &layers)? {
            let entry = entry.on("list", &layers)?;
            let digest = format!("sha256:{}", entry.file_name().to_string_lossy());
            if !known.contains(&digest) {
                remove_dir(&entry.path())?;
            }
        }
        Ok(())
    }

    fn lock_open(&self) -> MutexGuard<'_, HashMap<String, Weak<Layer>>> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Allocated bytes below `path`; what vanishes meanwhile counts nothing.
fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let mut bytes = meta.blocks() * 512;
    if meta.is_dir() {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        bytes += entries.map(|entry| disk_bytes(&entry.path())).sum::<u64>();
    }
    bytes
}
