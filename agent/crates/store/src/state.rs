//! The database: layers, their verified maps, and images.
//!
//! A transaction that fails for want of space leaves redb refusing everything until it is opened anew: that is done here, at
//! once and again before each later use until it succeeds.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::place::sync_dir;
use crate::{OnFile, StoreError};

const LAYERS: TableDefinition<&str, &[u8]> = TableDefinition::new("layers");
/// Pages of verified maps, by layer digest and page number.
const BITS: TableDefinition<(&str, u32), &[u8]> = TableDefinition::new("bits");
const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");
const COUNTERS: TableDefinition<&str, u64> = TableDefinition::new("counters");
/// The last generation number given to a layer.
const GENERATION: &str = "generation";
/// The whole database of a node with 1,000 layers is smaller; redb's default would be 1 GiB.
const CACHE_BYTES: usize = 4 << 20;

/// A page of a verified map: its number and its bytes.
pub(crate) type Page = (u32, Vec<u8>);

/// What is known of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: String,
    pub(crate) store_size: u64,
    pub(crate) complete: bool,
    /// Which of the layers that had this digest one after another this is: only its own handle may write its map.
    #[serde(default)]
    pub(crate) generation: u64,
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
    path: PathBuf,
    /// `None` after a failure, until it can be opened again.
    database: RwLock<Option<Database>>,
}

/// All of redb's error types become one.
fn state<E: Into<redb::Error>>(error: E) -> StoreError {
    StoreError::State(Box::new(error.into()))
}

impl State {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.exists() {
            create(path)?;
        }
        let opened = Self { path: path.to_path_buf(), database: RwLock::new(Some(open(path)?)) };
        opened.write(|write| {
            write.open_table(LAYERS).map_err(state)?;
            write.open_table(BITS).map_err(state)?;
            write.open_table(IMAGES).map_err(state)?;
            write.open_table(COUNTERS).map_err(state)?;
            Ok(())
        })?;
        Ok(opened)
    }

    fn read<T>(&self, look: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.with(|database| look(&database.begin_read().map_err(state)?))
    }

    /// One transaction, durable when this returns.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.with(|database| {
            let write = database.begin_write().map_err(state)?;
            let value = change(&write)?;
            write.commit().map_err(state)?;
            Ok(value)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.reopen_if_failed()?;
        let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = guard.as_ref() else {
            return Err(state(redb::Error::PreviousIo));
        };
        let result = work(database);
        drop(guard);
        if let Err(StoreError::State(error)) = &result
            && matches!(**error, redb::Error::Io(_) | redb::Error::PreviousIo)
        {
            tracing::warn!(%error, "the state database failed and is opened anew");
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
            if let Err(error) = self.reopen_if_failed() {
                tracing::warn!(%error, "the state database cannot be opened; this is tried again");
            }
        }
        result
    }

    fn reopen_if_failed(&self) -> Result<(), StoreError> {
        if self.database.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if database.is_none() {
            forget_cached(&self.path)?;
            *database = Some(open(&self.path)?);
        }
        Ok(())
    }

    pub(crate) fn layer(&self, digest: &str) -> Result<Option<LayerRecord>, StoreError> {
        self.read(|read| record_of(&read.open_table(LAYERS).map_err(state)?, digest))
    }

    /// A layer and its map, of one moment.
    pub(crate) fn layer_and_bits(
        &self,
        digest: &str,
    ) -> Result<Option<(LayerRecord, Vec<Page>)>, StoreError> {
        self.read(|read| {
            let Some(record) = record_of(&read.open_table(LAYERS).map_err(state)?, digest)? else {
                return Ok(None);
            };
            let table = read.open_table(BITS).map_err(state)?;
            let mut pages = Vec::new();
            for row in table.range((digest, 0)..=(digest, u32::MAX)).map_err(state)? {
                let (key, page) = row.map_err(state)?;
                pages.push((key.value().1, page.value().to_vec()));
            }
            Ok(Some((record, pages)))
        })
    }

    pub(crate) fn layers(&self) -> Result<Vec<String>, StoreError> {
        self.read(|read| {
            let table = read.open_table(LAYERS).map_err(state)?;
            let mut digests = Vec::new();
            for row in table.iter().map_err(state)? {
                digests.push(row.map_err(state)?.0.value().to_owned());
            }
            Ok(digests)
        })
    }

    /// Records a new layer, in place of an earlier one of this digest; gives it its generation.
    pub(crate) fn put_layer(&self, digest: &str, mut record: LayerRecord) -> Result<(), StoreError> {
        self.write(|write| {
            let mut counters = write.open_table(COUNTERS).map_err(state)?;
            record.generation = counters.get(GENERATION).map_err(state)?.map_or(0, |last| last.value()) + 1;
            counters.insert(GENERATION, record.generation).map_err(state)?;
            remove_bits(write, digest)?;
            put_record(write, digest, &record)
        })
    }

    pub(crate) fn set_complete(&self, digest: &str, generation: u64) -> Result<(), StoreError> {
        self.write(|write| {
            let mut record = current(write, digest, generation)?;
            record.complete = true;
            // The map of a complete layer is all ones: its pages are not needed any more.
            remove_bits(write, digest)?;
            put_record(write, digest, &record)
        })
    }

    pub(crate) fn set_incomplete(
        &self,
        digest: &str,
        generation: u64,
        pages: &[Page],
    ) -> Result<(), StoreError> {
        self.write(|write| {
            let mut record = current(write, digest, generation)?;
            record.complete = false;
            put_record(write, digest, &record)?;
            remove_bits(write, digest)?;
            insert_bits(write, digest, pages)
        })
    }

    pub(crate) fn put_bits(&self, digest: &str, generation: u64, pages: &[Page]) -> Result<(), StoreError> {
        self.write(|write| {
            current(write, digest, generation)?;
            insert_bits(write, digest, pages)
        })
    }

    pub(crate) fn remove_layer(&self, digest: &str) -> Result<(), StoreError> {
        self.write(|write| {
            remove_bits(write, digest)?;
            write.open_table(LAYERS).map_err(state)?.remove(digest).map_err(state)?;
            Ok(())
        })
    }

    pub(crate) fn put_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        let record = serde_json::to_vec(image)?;
        self.write(|write| {
            let mut table = write.open_table(IMAGES).map_err(state)?;
            table.insert(image.manifest_digest.as_str(), record.as_slice()).map_err(state)?;
            Ok(())
        })
    }

    pub(crate) fn image(&self, digest: &str) -> Result<Option<ImageRecord>, StoreError> {
        self.read(|read| {
            let table = read.open_table(IMAGES).map_err(state)?;
            let row = table.get(digest).map_err(state)?;
            Ok(row.map(|record| serde_json::from_slice(record.value())).transpose()?)
        })
    }

    pub(crate) fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.read(|read| {
            let table = read.open_table(IMAGES).map_err(state)?;
            let mut images = Vec::new();
            for row in table.iter().map_err(state)? {
                images.push(serde_json::from_slice(row.map_err(state)?.1.value())?);
            }
            Ok(images)
        })
    }

    pub(crate) fn remove_image(&self, digest: &str) -> Result<(), StoreError> {
        self.write(|write| {
            write.open_table(IMAGES).map_err(state)?.remove(digest).map_err(state)?;
            Ok(())
        })
    }

    pub(crate) fn touch_image(&self, digest: &str, now_s: u64) -> Result<(), StoreError> {
        self.write(|write| {
            let mut table = write.open_table(IMAGES).map_err(state)?;
            let Some(mut image) = table
                .get(digest)
                .map_err(state)?
                .map(|record| serde_json::from_slice::<ImageRecord>(record.value()))
                .transpose()?
            else {
                return Ok(());
            };
            image.last_used = image.last_used.max(now_s);
            table.insert(digest, serde_json::to_vec(&image)?.as_slice()).map_err(state)?;
            Ok(())
        })
    }
}

/// Makes an empty database: elsewhere first, since half of one cannot be opened any more.
fn create(path: &Path) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).on("remove", &new)?,
        _ => {}
    }
    drop(open(&new)?);
    std::fs::rename(&new, path).on("move", &new)?;
    let root = path.parent().unwrap_or(path);
    sync_dir(root)?;
    // The root itself may be new.
    root.parent().map_or(Ok(()), sync_dir)
}

/// After a write or a flush that failed, the page cache may have what the disk has not: the database is to be read as the disk has it.
fn forget_cached(path: &Path) -> Result<(), StoreError> {
    let file = File::open(path).on("open", path)?;
    if let Err(error) = file.sync_data() {
        tracing::debug!(path = %path.display(), %error, "what failed before is told again");
    }
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(std::io::Error::from)
        .on("drop the cached pages of", path)
}

fn open(path: &Path) -> Result<Database, StoreError> {
    Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(state)
}

fn record_of(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    digest: &str,
) -> Result<Option<LayerRecord>, StoreError> {
    let Some(record) = table.get(digest).map_err(state)? else { return Ok(None) };
    Ok(Some(serde_json::from_slice(record.value())?))
}

/// The record, if it is still that of the caller's layer.
fn current(write: &WriteTransaction, digest: &str, generation: u64) -> Result<LayerRecord, StoreError> {
    record_of(&write.open_table(LAYERS).map_err(state)?, digest)?
        .filter(|record| record.generation == generation)
        .ok_or_else(|| StoreError::Superseded(digest.to_owned()))
}

fn put_record(write: &WriteTransaction, digest: &str, record: &LayerRecord) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(record)?;
    write.open_table(LAYERS).map_err(state)?.insert(digest, bytes.as_slice()).map_err(state)?;
    Ok(())
}

fn insert_bits(write: &WriteTransaction, digest: &str, pages: &[Page]) -> Result<(), StoreError> {
    let mut table = write.open_table(BITS).map_err(state)?;
    for (page, bytes) in pages {
        table.insert((digest, *page), bytes.as_slice()).map_err(state)?;
    }
    Ok(())
}

fn remove_bits(write: &WriteTransaction, digest: &str) -> Result<(), StoreError> {
    let mut table = write.open_table(BITS).map_err(state)?;
    table.retain_in((digest, 0)..=(digest, u32::MAX), |_, _| false).map_err(state)
}
