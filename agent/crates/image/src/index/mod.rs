//! The stream index of a layer: made in one pass over it, read back as a table of contents and decoder checkpoints.
//!
//! The format stands in ARCHITECTURE.md, "Stream index"; its fixed part is [`header::IndexHeader`].

mod blob;
mod build;
mod contents;
pub mod embedded;
mod frame;
mod hashing;
pub mod header;
mod layout;
mod read;
mod toc;
mod window;

pub use build::{IndexOptions, LayerIndexer};
pub use contents::{ContentSink, NoSink};
pub use read::LayerIndex;
pub use toc::{TocItem, TocReader};

use crate::decode::DecodeError;
use crate::tar::TarError;

/// Artifact type of an image's stream index.
pub const ARTIFACT_TYPE: &str = "application/vnd.sluice.index.v1";
/// Media type of one layer's index blob.
pub const BLOB_MEDIA_TYPE: &str = "application/vnd.sluice.index.layer.v1";

/// Why a layer cannot be indexed, or an index is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The layer's compression is damaged.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The layer's tar is damaged.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The compressed bytes are not the layer.
    #[error("layer digest mismatch: expected {expected}, the bytes have {actual}")]
    LayerDigest {
        /// What the manifest says.
        expected: String,
        /// What came.
        actual: String,
    },
    /// The blob is of another version.
    #[error("stream index version {found} is not supported (this build reads versions up to {supported})")]
    Version {
        /// In the blob.
        found: u16,
        /// Here.
        supported: u16,
    },
    /// The blob contradicts itself.
    #[error("stream index is corrupt: {0}")]
    Corrupt(&'static str),
    /// A limit on untrusted layers is exceeded.
    #[error("layer exceeds a limit: {0}")]
    Limit(&'static str),
    /// The system gave no thread.
    #[error("cannot start the thread that computes a layer's digests: {0}")]
    Thread(#[source] std::io::Error),
    /// Contents could not be stored or compressed.
    #[error("cannot keep the layer's contents: {0}")]
    Sink(#[source] std::io::Error),
}
