//! What the store takes on disk, and what goes when it is to take less: first what no image needs, then the images least recently
//! used, never anything held.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
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

    /// Bytes that the store has allocated on disk. What files share, by reflinks or by being one, counts once.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        disk_bytes(&self.inner.root)
    }

    /// Counts anew what is on disk.
    pub(crate) fn measure(&self) -> Result<(), StoreError> {
        self.inner.space.measured(self.disk_bytes()?);
        Ok(())
    }
}

/// Allocated bytes at and below `path`, each counted once; what vanishes meanwhile counts nothing, nor does what is mounted there: roots of
/// containers, in which every file of an image would be looked at.
pub(crate) fn disk_bytes(path: &Path) -> Result<u64, StoreError> {
    let mut counted = Counted::default();
    let bytes = counted.add(path)?;
    Ok(bytes.saturating_sub(twice(&mut counted.shared)))
}

/// What was seen of a tree so far.
#[derive(Default)]
struct Counted {
    /// The file system that is counted: that of the first path.
    device: Option<u64>,
    /// Files with several names: device and inode.
    linked: HashSet<(u64, u64)>,
    /// Places on the device that several files have.
    shared: Vec<Range<u64>>,
}

impl Counted {
    fn add(&mut self, path: &Path) -> Result<u64, StoreError> {
        let Some(meta) = unless_gone(fs::symlink_metadata(path)).on("stat", path)? else { return Ok(0) };
        if meta.dev() != *self.device.get_or_insert(meta.dev()) {
            return Ok(0);
        }
        if meta.is_file() && meta.nlink() > 1 && !self.linked.insert((meta.dev(), meta.ino())) {
            return Ok(0);
        }
        let mut bytes = meta.blocks() * 512;
        if meta.is_dir() {
            let entries = unless_gone(fs::read_dir(path)).on("list", path)?;
            for entry in entries.into_iter().flatten() {
                bytes += self.add(&entry.on("list", path)?.path())?;
            }
        } else if meta.is_file() && meta.blocks() > 0 && path.file_name().is_some_and(|name| name == "data") {
            // Only layers' files share blocks.
            if let Some(file) = unless_gone(fs::File::open(path)).on("open", path)? {
                let shared = sluice_kernel::file::shared_extents(file.as_fd()).map_err(io::Error::other);
                self.shared.extend(shared.on("look for shared blocks of", path)?);
            }
        }
        Ok(bytes)
    }
}

/// How many bytes of these places were counted before.
fn twice(places: &mut [Range<u64>]) -> u64 {
    places.sort_unstable_by_key(|place| place.start);
    let (mut twice, mut end) = (0, 0);
    for place in places {
        twice += end.min(place.end).saturating_sub(place.start);
        end = end.max(place.end);
    }
    twice
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_several_files_have_count_once() {
        for (mut places, expected) in [
            (vec![], 0),
            (vec![0..10, 10..20], 0),
            (vec![0..10, 0..10, 0..10], 20),
            (vec![5..15, 0..10, 12..20], 8),
            (vec![0..100, 10..20, 30..40], 20),
        ] {
            assert_eq!(twice(&mut places), expected, "{places:?}");
        }
    }
}
