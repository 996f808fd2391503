//! Brings verified bytes from the registry into the layer store, most urgent first.
//!
//! A read that misses becomes chunks, chunks become spans, and a run of spans becomes one ranged GET whose bytes are decoded as
//! they arrive; each chunk that falls out is compared with its digest, stored, and wakes whoever waits. One fetch serves
//! everybody. It knows nothing of files or mounts.

mod ahead;
mod claims;
mod cutter;
mod fill;
mod first_pull;
mod layer;
mod outage;
mod run;
mod scheduler;
mod source;
mod spans;
mod told;
mod watch;
mod windows;

pub use ahead::Expected;
pub use first_pull::{FirstPull, first_pull};
pub use layer::{LayerParts, StreamedLayer};
pub use scheduler::{Counters, FETCH_BYTES, Lane, Prefetching, Scheduler, Starting};
pub use source::{BlobSource, MemorySource, SourceError};
pub use watch::{FetchDone, Watcher};

use sluice_image::index::IndexError;
use sluice_image::records::ChunkRecord;
use sluice_store::StoreError;

/// Why bytes could not be had.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The source failed.
    #[error("layer {layer}: cannot fetch bytes {start}..{end} of the blob: {source}")]
    Fetch {
        /// Digest of the layer.
        layer: String,
        /// First compressed byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// What the source said.
        #[source]
        source: SourceError,
    },
    /// What came is not what the index says.
    #[error(
        "layer {layer}{}: {size} bytes at offset {offset} are not what its index says ({what}); the registry or the index is corrupt",
        in_file(.path.as_deref())
    )]
    Corrupt {
        /// Digest of the layer.
        layer: String,
        /// A file that has these bytes, if that was found out.
        path: Option<String>,
        /// Store offset of the chunk.
        offset: u64,
        /// Bytes of the chunk; 0 if there is no chunk at the offset.
        size: u64,
        /// What differs.
        what: String,
    },
    /// The whole layer is not what the image's configuration says.
    #[error(
        "layer {layer}: its contents have diffID {actual}, the image says {expected}; the stream index lied"
    )]
    DiffId {
        /// Digest of the layer.
        layer: String,
        /// From the configuration.
        expected: String,
        /// Of the contents.
        actual: String,
    },
    /// The index cannot be used.
    #[error("layer {layer}: {message}")]
    Index {
        /// Digest of the layer.
        layer: String,
        /// What is wrong.
        message: String,
    },
    /// The store failed.
    #[error("layer {layer}: {message}")]
    Store {
        /// Digest of the layer.
        layer: String,
        /// What failed.
        message: String,
    },
    /// The layer store did not keep what was verified: it is to be fetched again.
    #[error("layer {layer}: {message}")]
    Lost {
        /// Digest of the layer.
        layer: String,
        /// What was lost, and why.
        message: String,
    },
    /// There is no space, and none in the memory that stands in for it.
    #[error("layer {layer}: the disk or the quota of the layer store is full; free space, or remove images")]
    DiskFull {
        /// Digest of the layer.
        layer: String,
    },
}

fn in_file(path: Option<&str>) -> String {
    path.map(|path| format!(", file /{path}")).unwrap_or_default()
}

impl StreamError {
    pub(crate) fn corrupt(layer: &str, chunk: &ChunkRecord, what: String) -> Self {
        let (offset, size) = (chunk.store_offset.get(), chunk.len.get().into());
        Self::Corrupt { layer: layer.to_owned(), path: None, offset, size, what }
    }

    pub(crate) fn store(layer: &str, error: &StoreError) -> Self {
        if error.is_full() {
            return Self::DiskFull { layer: layer.to_owned() };
        }
        let (layer, message) = (layer.to_owned(), with_causes(error));
        match error {
            // A full layer that is not full any more has lost something.
            StoreError::Lost { .. } | StoreError::NotFull(_) => Self::Lost { layer, message },
            _ => Self::Store { layer, message },
        }
    }

    pub(crate) fn io(layer: &str, error: &std::io::Error) -> Self {
        Self::Store { layer: layer.to_owned(), message: error.to_string() }
    }

    pub(crate) fn index(layer: &str, error: &IndexError) -> Self {
        Self::Index { layer: layer.to_owned(), message: with_causes(error) }
    }

    /// Whether the layer's bytes are not what its index says, whichever of the two is wrong.
    pub fn is_of_the_layer(&self) -> bool {
        matches!(self, Self::DiffId { .. } | Self::Corrupt { .. } | Self::Index { .. })
    }

    /// Whether trying again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Fetch { source, .. } => source.transient,
            Self::DiskFull { .. } | Self::Lost { .. } => true,
            _ => false,
        }
    }
}

/// An error and its causes in one line: these errors are cloned for every waiter, their causes cannot be.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
