//! The files of an image's layers, by content: between what traces and profiles say, and places in the layer store.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;

use anyhow::{Context, Result};
use sluice_image::entry::EntryKind;
use sluice_image::erofs::reader::{Location, Reader};
use sluice_image::index::LayerIndex;
use sluice_image::records::BLOCK_SIZE;
use sluice_prefetch::{FileAt, LayerFiles};
use sluice_store::Store;
use sluice_trace::{ContentKey, FetchLane, FileFacts, Process, Record, Resolve, What};

/// Files by layer, in the order in which layers are applied.
pub(super) struct ImageFiles {
    pub(super) layers: Vec<LayerFiles>,
    /// The mount's metadata, which inode numbers are looked up in.
    inodes: Option<Reader<File>>,
}

impl ImageFiles {
    /// Reads the layers' indexes. Blocks the thread.
    pub(super) fn read(store: &Store, layers: &[String]) -> Result<Self> {
        let read = layers
            .iter()
            .map(|digest| layer_files(store, digest).with_context(|| format!("the index of layer {digest}")));
        Ok(Self { layers: read.collect::<Result<_>>()?, inodes: None })
    }

    /// Makes inode numbers known; `metadata` is the device with the mount's EROFS metadata.
    pub(super) fn with_inodes(self, metadata: File, store: &Store) -> Result<Self> {
        let blocks = self.layers.iter().map(|layer| {
            let stored = store.layer(&layer.digest)?.context("a layer vanished")?;
            Ok(stored.size() / BLOCK_SIZE)
        });
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let inodes = Reader::with_layer_blocks(metadata, &blocks).context("the mount's metadata")?;
        Ok(Self { inodes: Some(inodes), ..self })
    }

    /// The files that records speak of, as records of the beginning.
    pub(super) fn of_records(&self, records: &[Record], time_ns: u64) -> Vec<Record> {
        // By layer and place in it; the inode number, if any record has one.
        let mut found: BTreeMap<(usize, u64), u64> = BTreeMap::new();
        let mut inodes = HashSet::new();
        for record in records {
            match record.what {
                What::Open { inode }
                | What::Exec { inode, .. }
                | What::Access { inode, .. }
                | What::Blocked { inode, .. } => {
                    if inodes.insert(inode)
                        && let Some(place) = self.location(inode)
                    {
                        found.insert((place.layer, place.store_offset), inode);
                    }
                }
                What::Served { layer, offset, len, .. }
                | What::Brought { lane: FetchLane::Prefetch | FetchLane::StartPack, layer, offset, len } => {
                    let files = self.layers.get(layer as usize);
                    for file in
                        files.into_iter().flat_map(|files| sluice_prefetch::overlapping(files, offset, len))
                    {
                        found.entry((layer as usize, file.store_offset)).or_insert(0);
                    }
                }
                _ => {}
            }
        }
        let records = found.into_iter().filter_map(|((layer, offset), inode)| {
            let file = self.file_at(layer, offset)?;
            let what = What::File {
                inode,
                layer: u32::try_from(layer).ok()?,
                offset,
                size: file.facts.size,
                path: file.facts.path.clone(),
            };
            Some(Record { time_ns, process: Process::default(), what })
        });
        records.collect()
    }

    fn file_at(&self, layer: usize, store_offset: u64) -> Option<&FileAt> {
        let files = &self.layers.get(layer)?.files;
        let at = files.binary_search_by_key(&store_offset, |file| file.store_offset).ok()?;
        files.get(at)
    }

    /// Number of the layer that has a byte of the file with this inode number, and where in its local file.
    pub(super) fn place(&self, inode: u64, offset: u64) -> Option<(u32, u64)> {
        let found = self.location(inode)?;
        Some((u32::try_from(found.layer).ok()?, found.store_offset.checked_add(offset)?))
    }

    fn location(&self, inode: u64) -> Option<Location> {
        let looked = self.inodes.as_ref()?.location(inode);
        looked.unwrap_or_else(|error| {
            tracing::debug!(inode, %error, "an inode is not found");
            None
        })
    }
}

impl Resolve for ImageFiles {
    fn inode(&self, inode: u64) -> Option<FileFacts> {
        let found = self.location(inode)?;
        self.file_at(found.layer, found.store_offset).map(|file| file.facts.clone())
    }

    fn served(&self, layer: u32, offset: u64, len: u64) -> Vec<(FileFacts, u64, u64)> {
        let layer = self.layers.get(layer as usize);
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
