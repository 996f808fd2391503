//! What the store takes on disk, and what goes when it is to take less: first what no image needs, then the images least recently
//! used, never anything held.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{OnFile, Store, StoreError, remove_dir};

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Images.
    pub images: usize,
    /// Layers.
    pub layers: usize,
    /// Bytes on disk.
    pub bytes: u64,
}

/// What the caller knows to be in use: mounted, held, being made.
#[derive(Debug, Clone, Default)]
pub struct InUse {
    /// Manifest digests.
    pub images: HashSet<String>,
    /// Layer digests.
    pub layers: HashSet<String>,
}

impl Store {
    /// Forgets an image; its layers go with `gc`. That nobody uses it is for the caller to know.
    pub fn remove_image(&self, manifest_digest: &str) -> Result<(), StoreError> {
        self.inner.state.remove_image(manifest_digest)?;
        let path = self.erofs_path(manifest_digest)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", &path),
            _ => Ok(()),
        }
    }

    /// Digests of layers that the ordinary pull unpacked.
    pub fn unpacked(&self) -> Result<Vec<String>, StoreError> {
        let unpacked = self.inner.root.join("unpacked");
        let entries = match fs::read_dir(&unpacked) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.on("list", &unpacked)?,
        };
        let digest = |entry: fs::DirEntry| format!("sha256:{}", entry.file_name().to_string_lossy());
        entries.map(|entry| Ok(digest(entry.on("list", &unpacked)?))).collect()
    }

    /// Removes layers that no image names and `in_use` does not hold.
    pub fn gc(&self, in_use: &dyn Fn(&str) -> bool) -> Result<Freed, StoreError> {
        let wanted: HashSet<String> = self.images()?.into_iter().flat_map(|image| image.layers).collect();
        let mut freed = Freed::default();
        for digest in self.layers()? {
            if !wanted.contains(&digest) && !in_use(&digest) {
                freed.bytes += self.remove_layer(&digest)?;
                freed.layers += 1;
            }
        }
        for digest in self.unpacked()? {
            if !wanted.contains(&digest) && !in_use(&digest) {
                let dir = self.unpacked_path(&digest)?;
                freed.bytes += disk_bytes(&dir)?;
                freed.layers += 1;
                remove_dir(&dir)?;
            }
        }
        self.measure()?;
        Ok(freed)
    }

    /// Makes room for `need_bytes` within the quota and the reserve: removes what no image needs, then images not in use,
    /// least recently used first, until there is room. What is left may still be too much: then everything is in use.
    pub fn make_room(&self, need_bytes: u64, in_use: &InUse) -> Result<Freed, StoreError> {
        self.measure()?;
        let mut freed = Freed::default();
        if self.inner.space.recheck(need_bytes) {
            return Ok(freed);
        }
        let mut images = self.images()?;
        images.retain(|image| !in_use.images.contains(&image.manifest_digest));
        images.sort_by_key(|image| image.last_used);
        let mut images = images.into_iter();
        loop {
            let gone = self.gc(&|digest| in_use.layers.contains(digest))?;
            freed.layers += gone.layers;
            freed.bytes += gone.bytes;
            if self.inner.space.recheck(need_bytes) {
                return Ok(freed);
            }
            let Some(image) = images.next() else { return Ok(freed) };
            tracing::info!(
                image = image.manifest_digest,
                last_used = image.last_used,
                "evicted for want of space"
            );
            let metadata = disk_bytes(&self.erofs_path(&image.manifest_digest)?)?;
            self.remove_image(&image.manifest_digest)?;
            freed.images += 1;
            freed.bytes += metadata;
        }
    }

    /// Whether the quota or the reserve is used up.
    pub fn needs_room(&self) -> bool {
        self.inner.space.is_full()
    }

    /// The quota in bytes, if there is one.
    pub fn quota_bytes(&self) -> Option<u64> {
        self.inner.space.limits().quota_bytes
    }

    /// Bytes that the store has allocated on disk. Blocks that files share (reflinks) count once per file.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        disk_bytes(&self.inner.root)
    }

    /// Counts anew what is on disk.
    pub(crate) fn measure(&self) -> Result<(), StoreError> {
        self.inner.space.measured(self.disk_bytes()?);
        Ok(())
    }
}

/// Allocated bytes at and below `path`; what vanishes meanwhile counts nothing.
pub(crate) fn disk_bytes(path: &Path) -> Result<u64, StoreError> {
    let Some(meta) = unless_gone(fs::symlink_metadata(path)).on("stat", path)? else { return Ok(0) };
    let mut bytes = meta.blocks() * 512;
    if meta.is_dir() {
        let entries = unless_gone(fs::read_dir(path)).on("list", path)?;
        for entry in entries.into_iter().flatten() {
            bytes += disk_bytes(&entry.on("list", path)?.path())?;
        }
    }
    Ok(bytes)
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
