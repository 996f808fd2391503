//! Who wants to know what is fetched: recordings of container starts.

use std::ops::Range;
use std::time::Instant;

use crate::Lane;

/// One request for bytes of a layer's blob.
#[derive(Debug, Clone, Copy)]
pub struct FetchDone<'a> {
    /// Digest of the layer.
    pub layer: &'a str,
    /// For whom.
    pub lane: Lane,
    /// First byte of the blob that was asked for.
    pub offset: u64,
    /// Bytes that came.
    pub len: u64,
    /// When it was asked for.
    pub began: Instant,
    /// When the first of them came; `None`: none did.
    pub first_byte: Option<Instant>,
    /// Whether all of it came, and was as the index says.
    pub whole: bool,
}

/// Told of fetches as they go. Called by the threads that fetch: it returns at once.
pub trait Watcher: Send + Sync + std::fmt::Debug {
    /// Verified bytes of a layer's local file arrived.
    fn brought(&self, layer: &str, lane: Lane, bytes: Range<u64>);
    /// A request ended.
    fn fetched(&self, fetch: FetchDone<'_>);
}
