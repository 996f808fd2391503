//! Checks the store: every verified chunk is read again and compared with its digest.

use std::fs;
use std::os::unix::fs::FileExt;

use sluice_image::index::LayerIndex;
use sluice_image::records::{BLOCK_SIZE, ChunkRecord};

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
}

impl Store {
    /// Reads everything. Blocks the thread.
    pub fn fsck(&self) -> Result<FsckReport, StoreError> {
        let mut report = FsckReport::default();
        for digest in self.layers()? {
            report.layers += 1;
            match self.layer(&digest) {
                Ok(Some(layer)) => self.check_layer(&layer, &mut report)?,
                Ok(None) => {}
                Err(error) => report.problems.push(format!("layer {digest}: cannot be opened: {error}")),
            }
        }
        for image in self.images()? {
            for layer in &image.layers {
                if self.inner.state.layer(layer)?.is_none() && !self.unpacked_path(layer)?.exists() {
                    report
                        .problems
                        .push(format!("image {}: layer {layer} is missing", image.manifest_digest));
                }
            }
        }
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
        let file = fs::File::open(&data).on("open", &data)?;
        if file.metadata().on("stat", &data)?.len() != layer.size() {
            report.problems.push(format!("layer {}: its file has the wrong size", layer.digest()));
        }
        let mut bad = false;
        let mut buffer = vec![0; index.header().chunk_size.get() as usize];
        let failed = |source| StoreError::Index { layer: layer.digest().to_owned(), source };
        for item in index.toc().map_err(failed)? {
            for chunk in item.map_err(failed)?.chunks {
                let start = chunk.store_offset.get();
                let end = start + u64::from(chunk.len.get());
                if !layer.has(start..end) {
                    continue;
                }
                report.chunks_checked += 1;
                if !matches(&file, &chunk, &index, &mut buffer) {
                    bad = true;
                    report.problems.push(format!(
                        "layer {}: bytes {start}..{end} are not what they were",
                        layer.digest()
                    ));
                    layer.unverify(start..end.next_multiple_of(BLOCK_SIZE));
                }
            }
        }
        if bad {
            self.inner.state.set_incomplete(layer.digest(), &layer.all_pages())?;
        }
        tracing::debug!(layer = layer.digest(), dir = %layer.dir().display(), bad, "checked");
        Ok(())
    }
}

fn matches(file: &fs::File, chunk: &ChunkRecord, index: &LayerIndex, buffer: &mut [u8]) -> bool {
    let Some(bytes) = buffer.get_mut(..chunk.len.get() as usize) else { return false };
    file.read_exact_at(bytes, chunk.store_offset.get()).is_ok()
        && index.digest_algorithm().digest(bytes) == chunk.digest
}
