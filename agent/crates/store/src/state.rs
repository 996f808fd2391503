//! The database: layers, their verified maps, and images.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::StoreError;

const LAYERS: TableDefinition<&str, &[u8]> = TableDefinition::new("layers");
/// Pages of verified maps, by layer digest and page number.
const BITS: TableDefinition<(&str, u32), &[u8]> = TableDefinition::new("bits");
const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");

/// What is known of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: String,
    pub(crate) store_size: u64,
    pub(crate) complete: bool,
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Digest of its manifest.
    pub manifest_digest: String,
    /// The references it was asked for by, newest last.
    pub references: Vec<String>,
    /// The manifest, as in the registry.
    pub manifest: String,
    /// The configuration, as in the registry.
    pub config: String,
    /// Digests of its layers, lowest first.
    pub layers: Vec<String>,
    /// Blocks of each layer's local file, as its EROFS image has them; empty if it was pulled the ordinary way.
    pub layer_blocks: Vec<u64>,
    /// Seconds since 1970 when it was last used.
    pub last_used: u64,
}

#[derive(Debug)]
pub(crate) struct State {
    database: Database,
}

/// All of redb's error types become one.
fn state<E: Into<redb::Error>>(error: E) -> StoreError {
    StoreError::State(Box::new(error.into()))
}

impl State {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(state)?;
        let write = database.begin_write().map_err(state)?;
        write.open_table(LAYERS).map_err(state)?;
        write.open_table(BITS).map_err(state)?;
        write.open_table(IMAGES).map_err(state)?;
        write.commit().map_err(state)?;
        Ok(Self { database })
    }

    pub(crate) fn layer(&self, digest: &str) -> Result<Option<LayerRecord>, StoreError> {
        let read = self.database.begin_read().map_err(state)?;
        let table = read.open_table(LAYERS).map_err(state)?;
        let Some(record) = table.get(digest).map_err(state)? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(record.value())?))
    }

    pub(crate) fn layers(&self) -> Result<Vec<String>, StoreError> {
        let read = self.database.begin_read().map_err(state)?;
        let table = read.open_table(LAYERS).map_err(state)?;
        let mut digests = Vec::new();
        for row in table.iter().map_err(state)? {
            digests.push(row.map_err(state)?.0.value().to_owned());
        }
        Ok(digests)
    }

    pub(crate) fn put_layer(&self, digest: &str, record: &LayerRecord) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(state)?;
        remove_bits(&write, digest)?;
        write
            .open_table(LAYERS)
            .map_err(state)?
            .insert(digest, serde_json::to_vec(record)?.as_slice())
            .map_err(state)?;
        write.commit().map_err(state)
    }

    pub(crate) fn set_complete(&self, digest: &str) -> Result<(), StoreError> {
        let Some(mut record) = self.layer(digest)? else { return Ok(()) };
        record.complete = true;
        // The map of a complete layer is all ones: its pages are not needed any more.
        self.put_layer(digest, &record)
    }

    pub(crate) fn set_incomplete(&self, digest: &str, pages: &[(u32, Vec<u8>)]) -> Result<(), StoreError> {
        let Some(mut record) = self.layer(digest)? else { return Ok(()) };
        record.complete = false;
        self.put_layer(digest, &record)?;
        self.put_bits(digest, pages)
    }

    pub(crate) fn remove_layer(&self, digest: &str) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(state)?;
        remove_bits(&write, digest)?;
        write.open_table(LAYERS).map_err(state)?.remove(digest).map_err(state)?;
        write.commit().map_err(state)
    }

    pub(crate) fn bits(&self, digest: &str) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
        let read = self.database.begin_read().map_err(state)?;
        let table = read.open_table(BITS).map_err(state)?;
        let mut pages = Vec::new();
        for row in table.range((digest, 0)..=(digest, u32::MAX)).map_err(state)? {
            let (key, page) = row.map_err(state)?;
            pages.push((key.value().1, page.value().to_vec()));
        }
        Ok(pages)
    }

    pub(crate) fn put_bits(&self, digest: &str, pages: &[(u32, Vec<u8>)]) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(state)?;
        {
            let mut table = write.open_table(BITS).map_err(state)?;
            for (page, bytes) in pages {
                table.insert((digest, *page), bytes.as_slice()).map_err(state)?;
            }
        }
        write.commit().map_err(state)
    }

    pub(crate) fn put_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(state)?;
        write
            .open_table(IMAGES)
            .map_err(state)?
            .insert(image.manifest_digest.as_str(), serde_json::to_vec(image)?.as_slice())
            .map_err(state)?;
        write.commit().map_err(state)
    }

    pub(crate) fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let read = self.database.begin_read().map_err(state)?;
        let table = read.open_table(IMAGES).map_err(state)?;
        let mut images = Vec::new();
        for row in table.iter().map_err(state)? {
            images.push(serde_json::from_slice(row.map_err(state)?.1.value())?);
        }
        Ok(images)
    }

    pub(crate) fn remove_image(&self, digest: &str) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(state)?;
        write.open_table(IMAGES).map_err(state)?.remove(digest).map_err(state)?;
        write.commit().map_err(state)
    }
}

fn remove_bits(write: &redb::WriteTransaction, digest: &str) -> Result<(), StoreError> {
    let mut table = write.open_table(BITS).map_err(state)?;
    table.retain_in((digest, 0)..=(digest, u32::MAX), |_, _| false).map_err(state)
}
