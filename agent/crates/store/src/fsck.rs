//! Checks the store: every verified chunk is read again and compared with its digest.

use std::fs;
use std::ops::Range;

use sluice_image::index::LayerIndex;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord};

use crate::reading::Found;
use crate::{Layer, OnFile, Store, StoreError};

/// What was found. Bad chunks are forgotten, so that they are fetched again.
#[derive(Debug, Clone, Default)]
pub struct FsckReport {
    /// Layers looked at.
    pub layers: usize,
    /// Chunks read and compared.
    pub chunks_checked: u64,
    /// One line each.
    pub problems: Vec<String>,
    /// Digests of the layers of which something has to be fetched again.
    pub damaged: Vec<String>,
}

impl FsckReport {
    fn add(&mut self, other: Self) {
        self.layers += other.layers;
        self.chunks_checked += other.chunks_checked;
        self.problems.extend(other.problems);
        self.damaged.extend(other.damaged);
    }
}

impl Store {
    /// Reads everything. Blocks the thread.
    pub fn fsck(&self) -> Result<FsckReport, StoreError> {
        let mut report = FsckReport::default();
        for digest in self.layers()? {
            let mut found = FsckReport::default();
            // One layer that cannot be read does not keep the others from being looked at.
            if let Err(error) = self.check_by_digest(&digest, &mut found) {
                found.problems.push(format!("layer {digest}: {}", with_causes(&error)));
            }
            // One that was removed meanwhile has none.
            if found.problems.is_empty() || self.is_there(&digest)? {
                report.add(found);
            }
        }
        for image in self.images()? {
            for layer in &image.layers {
                if self.inner.state.layer(layer)?.is_none()
                    && !self.unpacked_path(layer)?.exists()
                    && self.inner.state.image(&image.manifest_digest)?.is_some()
                {
                    report
                        .problems
                        .push(format!("image {}: layer {layer} is missing", image.manifest_digest));
                }
            }
        }
        Ok(report)
    }

    fn check_by_digest(&self, digest: &str, report: &mut FsckReport) -> Result<(), StoreError> {
        report.layers = 1;
        let dir = self.layer_dir(digest)?;
        if ["data", "index", "chunks", "extents"].iter().any(|name| !dir.join(name).exists()) {
            if !self.is_there(digest)? {
                return Ok(());
            }
            report.problems.push(format!("layer {digest}: files of it are gone; it is fetched again"));
            // Whoever asks for it next begins it anew.
            self.lock_open().remove(digest);
            report.damaged.push(digest.to_owned());
            return Ok(());
        }
        match self.layer(digest)? {
            Some(layer) => self.check_layer(&layer, report),
            None => Ok(()),
        }
    }

    /// Whether the store has a layer, and nobody is about to remove it.
    fn is_there(&self, digest: &str) -> Result<bool, StoreError> {
        let _removal = self.lock_open();
        Ok(self.inner.state.layer(digest)?.is_some())
    }

    /// Reads all of a layer that is verified. Blocks the thread.
    pub fn check(&self, layer: &Layer) -> Result<FsckReport, StoreError> {
        let mut report = FsckReport { layers: 1, ..FsckReport::default() };
        self.check_layer(layer, &mut report)?;
        Ok(report)
    }

    fn check_layer(&self, layer: &Layer, report: &mut FsckReport) -> Result<(), StoreError> {
        let path = layer.index_path();
        let index = LayerIndex::from_blob(fs::read(&path).on("read", &path)?);
        let index = match index {
            Ok(index) => index,
            Err(error) => {
                report.problems.push(format!("layer {}: {error}", layer.digest()));
                return Ok(());
            }
        };
        let data = layer.data_path();
        if fs::metadata(&data).on("stat", &data)?.len() != layer.size() {
            report.problems.push(format!("layer {}: its file has the wrong size", layer.digest()));
        }
        let (mut bad, mut forgotten) = (false, false);
        let mut buffer = vec![0; index.header().chunk_size.get() as usize];
        let failed = |source| StoreError::Index { layer: layer.digest().to_owned(), source };
        for item in index.toc().map_err(failed)? {
            for chunk in item.map_err(failed)?.chunks {
                let range = chunk.store_offset.get()..chunk.store_offset.get() + u64::from(chunk.len.get());
                let what = match check_chunk(layer, &chunk, &index, &mut buffer, report) {
                    Checked::Whole(what) => what,
                    Checked::NotWhole => {
                        let (what, some) = layer.check_parts(&chunk);
                        forgotten |= some;
                        what
                    }
                };
                if let Some(what) = what {
                    bad = true;
                    let (digest, Range { start, end }) = (layer.digest(), range.clone());
                    report.problems.push(format!("layer {digest}: bytes {start}..{end} {what}"));
                    layer.unverify(start..end.next_multiple_of(BLOCK_SIZE));
                }
            }
        }
        if bad {
            report.damaged.push(layer.digest().to_owned());
        }
        if bad || forgotten {
            self.flush(layer)?;
        }
        tracing::debug!(layer = layer.digest(), dir = %layer.dir().display(), bad, "checked");
        Ok(())
    }
}

/// What came of a look at a chunk.
enum Checked {
    /// What is wrong with it, if anything is.
    Whole(Option<String>),
    NotWhole,
}

/// Reads a verified chunk as a reader would, from memory too.
fn check_chunk(
    layer: &Layer,
    chunk: &ChunkRecord,
    index: &LayerIndex,
    buffer: &mut [u8],
    report: &mut FsckReport,
) -> Checked {
    let Some(bytes) = buffer.get_mut(..chunk.len.get() as usize) else { return Checked::Whole(None) };
    let found = layer.look(chunk.store_offset.get(), bytes);
    if matches!(found, Ok(Found::NotAll)) {
        return Checked::NotWhole;
    }
    report.chunks_checked += 1;
    Checked::Whole(match found {
        Ok(Found::Lost(why)) => Some(format!("cannot be read: {why}")),
        Err(error) => Some(format!("cannot be read: {error}")),
        Ok(_) => {
            let same = index.digest_algorithm().digest(bytes) == chunk.digest;
            (!same).then(|| "are not what they were".to_owned())
        }
    })
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
