//! The files of an image's layers, by content: between what traces and profiles say, and places in the layer store.

use anyhow::{Context, Result};
use sluice_image::entry::EntryKind;
use sluice_image::index::LayerIndex;
use sluice_prefetch::{FileAt, LayerFiles};
use sluice_store::Store;
use sluice_trace::{ContentKey, FetchLane, FileFacts, Process, Record, Resolve, What};

/// Files by layer, in the order in which layers are applied.
pub(super) struct ImageFiles(pub(super) Vec<LayerFiles>);

impl ImageFiles {
    /// Reads the layers' indexes. Blocks the thread.
    pub(super) fn read(store: &Store, layers: &[String]) -> Result<Self> {
        let read = layers
            .iter()
            .map(|digest| layer_files(store, digest).with_context(|| format!("the index of layer {digest}")));
        Ok(Self(read.collect::<Result<_>>()?))
    }
}

impl ImageFiles {
    /// Descriptions of the files that records touch or fetch ahead, for who has the trace and not the image.
    pub(super) fn spoken_of(&self, records: &[Record]) -> Vec<Record> {
        let mut found = std::collections::BTreeSet::new();
        for record in records {
            let (layer, offset, len) = match record.what {
                What::Served { layer, offset, len, .. } => (layer, offset, len),
                What::Brought { lane: FetchLane::Prefetch | FetchLane::StartPack, layer, offset, len } => {
                    (layer, offset, len)
                }
                _ => continue,
            };
            let Some(files) = self.0.get(layer as usize).map(|layer| &layer.files) else { continue };
            let first = files.partition_point(|file| file.store_offset + file.facts.size <= offset);
            let end = files.partition_point(|file| file.store_offset < offset.saturating_add(len));
            found.extend((first..end).map(|number| (layer, number)));
        }
        let describe = |(layer, number): (u32, usize)| {
            let file = self.0.get(layer as usize)?.files.get(number)?;
            Some(Record {
                time_ns: 0,
                process: Process::default(),
                what: What::File {
                    inode: 0,
                    layer,
                    offset: file.store_offset,
                    size: file.facts.size,
                    path: file.facts.path.clone(),
                },
            })
        };
        found.into_iter().filter_map(describe).collect()
    }
}

impl Resolve for ImageFiles {
    fn inode(&self, _: u64) -> Option<FileFacts> {
        // Level 0 knows no inodes.
        None
    }

    fn served(&self, layer: u32, offset: u64, len: u64) -> Vec<(FileFacts, u64, u64)> {
        let layer = self.0.get(layer as usize);
        layer.map_or_else(Vec::new, |layer| sluice_prefetch::served(layer, offset, len))
    }
}

fn layer_files(store: &Store, digest: &str) -> Result<LayerFiles> {
    let layer = store.layer(digest)?.context("it is not in the store")?;
    let index = LayerIndex::from_blob(std::fs::read(layer.index_path())?)?;
    let mut files = Vec::new();
    for item in index.toc()? {
        let item = item?;
        let Some(entry) = item.entry.filter(|_| !item.chunks.is_empty()) else { continue };
        let EntryKind::File { size, store_offset } = entry.kind else { continue };
        let mut content = ring::digest::Context::new(&ring::digest::SHA256);
        content.update(&size.to_le_bytes());
        item.chunks.iter().for_each(|chunk| content.update(&chunk.digest));
        let content = content.finish();
        let key = content.as_ref().first_chunk::<16>().context("a digest is short")?;
        let facts = FileFacts { content: ContentKey(*key), size, path: entry.path };
        files.push(FileAt { store_offset, facts });
    }
    Ok(LayerFiles { digest: digest.to_owned(), files })
}
