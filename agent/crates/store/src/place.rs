//! Puts layers in their places, finds them there, and takes them away; what a crash leaves between two steps is cleared at the
//! next start.
//!
//! A layer is a record and a directory. The directory comes first, by one rename, and goes first, by one rename: a record without
//! a directory is forgotten at the next start, a directory without a record is removed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use sluice_image::entry::Entry;
use sluice_image::index::LayerIndex;

use crate::state::LayerRecord;
use crate::{Ingest, Layer, OnFile, Store, StoreError, gc, hex_of, remove_dir};

impl Store {
    /// Adds a layer whose contents are to come. A layer that is there already stays.
    pub fn add_layer(&self, index: &LayerIndex) -> Result<Arc<Layer>, StoreError> {
        self.add_layer_with(index, |_| {})
    }

    /// The same; the layer's entries, in order, go to `seen` as they are decoded, and it is dropped behind the last. Of a layer that
    /// is there already none are.
    pub fn add_layer_with(
        &self,
        index: &LayerIndex,
        seen: impl FnMut(Entry),
    ) -> Result<Arc<Layer>, StoreError> {
        let digest = index.header().layer_digest_text();
        if let Some(layer) = self.layer(&digest)? {
            return Ok(layer);
        }
        let write_data = |data: &Path| {
            File::create(data)
                .and_then(|file| file.set_len(index.header().store_size.get()))
                .on("create", data)
        };
        self.place(index, |_| true, write_data, seen, false)
    }

    /// Begins a layer that is decoded as it arrives.
    pub fn begin_ingest(&self) -> Result<Ingest, StoreError> {
        Ingest::begin(&self.temporary(), Arc::clone(&self.inner.space))
    }

    /// Ends an ingest: the layer is complete. The caller has compared its digest and diffID with the manifest and config.
    pub fn commit_ingest(&self, ingest: Ingest, index: &LayerIndex) -> Result<Arc<Layer>, StoreError> {
        let digest = index.header().layer_digest_text();
        if let Some(layer) = self.layer(&digest)?
            && layer.is_complete()
        {
            return Ok(layer);
        }
        let write_data = |data: &Path| ingest.finish(data, index.header().store_size.get());
        self.place(index, Layer::is_complete, write_data, |_| {}, true)
    }

    /// A layer of the store.
    pub fn layer(&self, digest: &str) -> Result<Option<Arc<Layer>>, StoreError> {
        let mut open = self.lock_open();
        if let Some(layer) = open.get(digest).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let Some((record, bits)) = self.inner.state.layer_and_bits(digest)? else { return Ok(None) };
        let dir = self.layer_dir(digest)?;
        let space = Arc::clone(&self.inner.space);
        let index = dir.join("index");
        let opened = fs::metadata(&index)
            .on("find", &index)
            .and_then(|_there| Layer::open(digest, dir.clone(), &record, &bits, Arc::clone(&space)));
        let layer = match opened {
            Err(error) if error.is_gone() => {
                let Some(record) = self.rebuild(digest, &dir, record, &error)? else { return Ok(None) };
                Layer::open(digest, dir, &record, &[], space)?
            }
            opened => opened?,
        };
        let layer = Arc::new(layer);
        open.insert(digest.to_owned(), Arc::downgrade(&layer));
        Ok(Some(layer))
    }

    /// Files of a layer were removed behind our back: with its index it begins anew, as a layer of which nothing is here yet; without
    /// it is forgotten. Handles from before record nothing any more.
    fn rebuild(
        &self,
        digest: &str,
        dir: &Path,
        mut record: LayerRecord,
        error: &StoreError,
    ) -> Result<Option<LayerRecord>, StoreError> {
        let cause = error.to_string();
        let index = fs::read(dir.join("index")).ok().and_then(|blob| LayerIndex::from_blob(blob).ok());
        let Some(index) = index else {
            tracing::error!(layer = digest, cause, "a layer is damaged and has no index: it is forgotten");
            let gone = self.take_away(digest)?;
            self.inner.state.remove_layer(digest)?;
            return gone.as_deref().map_or(Ok(()), remove_dir).map(|()| None);
        };
        tracing::error!(layer = digest, cause, "files of a layer are gone: it is fetched again");
        record.complete = false;
        // The record first: it must not speak of bytes that a new file has not.
        self.inner.state.put_layer(digest, record)?;
        crate::records::write_tables(&index, dir, |_| {})?;
        let (staged, data) = (dir.join("data.new"), dir.join("data"));
        File::create(&staged)
            .and_then(|file| file.set_len(index.header().store_size.get()))
            .and_then(|()| fs::rename(&staged, &data))
            .on("create", &data)?;
        self.inner.state.layer(digest)
    }

    /// Forgets a layer and its file; bytes freed. Handles of it go on reading, but nothing they verify is recorded any more.
    pub fn remove_layer(&self, digest: &str) -> Result<u64, StoreError> {
        let mut open = self.lock_open();
        open.remove(digest);
        let gone = self.take_away(digest)?;
        let bytes = gone.as_deref().map_or(Ok(0), gc::disk_bytes)?;
        // On a full disk there may be room for the transaction only once the file is gone.
        let removed = gone.as_deref().map_or(Ok(()), remove_dir);
        self.inner.state.remove_layer(digest)?;
        drop(open);
        removed.map(|()| bytes)
    }

    /// Moves a layer's directory out of its place.
    fn take_away(&self, digest: &str) -> Result<Option<PathBuf>, StoreError> {
        let dir = self.layer_dir(digest)?;
        let gone = self.temporary().join(format!("removed-{}", hex_of(digest)?));
        remove_dir(&gone)?;
        match fs::rename(&dir, &gone) {
            Ok(()) => Ok(Some(gone)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).on("move", &dir),
        }
    }

    pub(crate) fn layer_dir(&self, digest: &str) -> Result<PathBuf, StoreError> {
        Ok(self.inner.root.join("layers").join(hex_of(digest)?))
    }

    /// Stages a layer, at the same time as others, and publishes it unless one that will `do` came meanwhile; leaves nothing if
    /// that fails.
    fn place(
        &self,
        index: &LayerIndex,
        will_do: impl Fn(&Layer) -> bool,
        write_data: impl FnOnce(&Path) -> Result<(), StoreError>,
        seen: impl FnMut(Entry),
        complete: bool,
    ) -> Result<Arc<Layer>, StoreError> {
        let digest = index.header().layer_digest_text();
        let number = self.inner.staged.fetch_add(1, Ordering::Relaxed);
        let staged = self.temporary().join(format!("staged-{number}-{}", hex_of(&digest)?));
        let placed = stage(index, &staged, seen)
            .and_then(|()| write_data(&staged.join("data")))
            .and_then(|()| flush(&staged))
            .and_then(|()| {
                let _placing = self.inner.placing.lock().unwrap_or_else(PoisonError::into_inner);
                match self.layer(&digest)?.filter(|layer| will_do(layer)) {
                    Some(layer) => remove_dir(&staged).map(|()| Some(layer)),
                    None => {
                        self.publish(&staged, index, complete)?;
                        self.layer(&digest)
                    }
                }
            });
        match placed {
            Ok(layer) => layer.ok_or(StoreError::NoLayer(digest)),
            Err(error) => {
                remove_dir(&staged)?;
                Err(error)
            }
        }
    }

    /// Moves a staged layer to its place and records it.
    fn publish(&self, staged: &Path, index: &LayerIndex, complete: bool) -> Result<(), StoreError> {
        let digest = index.header().layer_digest_text();
        let dir = self.layer_dir(&digest)?;
        let record = LayerRecord {
            diff_id: index.header().diff_id_text(),
            store_size: index.header().store_size.get(),
            complete,
            generation: 0,
        };
        let mut open = self.lock_open();
        open.remove(&digest);
        let gone = self.take_away(&digest)?;
        fs::rename(staged, &dir).on("move", staged)?;
        sync_dir(&self.inner.root.join("layers"))?;
        self.inner.state.put_layer(&digest, record)?;
        drop(open);
        gone.as_deref().map_or(Ok(()), remove_dir)
    }

    /// Temporary files, directories of layers that were never recorded, records of layers that are gone, metadata of images that
    /// are not recorded.
    pub(crate) fn remove_leftovers(&self) -> Result<(), StoreError> {
        let temporary = self.temporary();
        remove_dir(&temporary)?;
        fs::create_dir(&temporary).on("create", &temporary)?;
        for digest in self.layers()? {
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
        let known = self.images()?;
        let images = self.inner.root.join("images");
        for entry in fs::read_dir(&images).on("list", &images)? {
            let path = entry.on("list", &images)?.path();
            let recorded = known
                .iter()
                .any(|image| self.erofs_path(&image.manifest_digest).is_ok_and(|metadata| metadata == path));
            if !recorded {
                fs::remove_file(&path).on("remove", &path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn lock_open(&self) -> MutexGuard<'_, HashMap<String, Weak<Layer>>> {
        self.inner.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what is derived from an index into a new directory.
fn stage(index: &LayerIndex, dir: &Path, seen: impl FnMut(Entry)) -> Result<(), StoreError> {
    fs::create_dir(dir).on("create", dir)?;
    let path = dir.join("index");
    fs::write(&path, index.blob()).on("write", &path)?;
    crate::records::write_tables(index, dir, seen)
}

/// Makes a staged layer durable: its files at the same time, since each waits for the disk.
fn flush(staged: &Path) -> Result<(), StoreError> {
    std::thread::scope(|scope| {
        let flushing = ["data", "index", "chunks", "extents", "digests"].map(|name| {
            let path = staged.join(name);
            scope.spawn(move || File::open(&path).and_then(|file| file.sync_data()).on("flush", &path))
        });
        let panicked = |_panic| Err(std::io::Error::other("a thread panicked")).on("flush", staged);
        flushing.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(panicked))
    })?;
    sync_dir(staged)
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|file| file.sync_all()).on("flush", dir)
}
