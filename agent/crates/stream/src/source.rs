//! Where compressed bytes come from.

use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::Lane;

/// Why a source gave no bytes.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// For people: host, status, what to do.
    pub message: String,
    /// Whether trying again may help.
    pub transient: bool,
}

/// A blob that can be read by range: a layer, or a layer's index.
pub trait BlobSource: Send + Sync + std::fmt::Debug {
    /// Bytes of the blob.
    fn size(&self) -> u64;
    /// The bytes of a range, in order. Dropping the stream ends the transfer.
    fn read(&self, range: Range<u64>, lane: Lane) -> BoxStream<'static, Result<Bytes, SourceError>>;
    /// Like `read`, after `read` brought wrong bytes: from another mirror or location, if there is one.
    fn read_elsewhere(
        &self,
        range: Range<u64>,
        lane: Lane,
    ) -> BoxStream<'static, Result<Bytes, SourceError>> {
        self.read(range, lane)
    }
}

/// A blob in memory.
#[derive(Debug, Clone)]
pub struct MemorySource(pub Bytes);

impl BlobSource for MemorySource {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: Range<u64>, _: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(self.0.len());
        let start = usize::try_from(range.start).unwrap_or(usize::MAX).min(end);
        futures::stream::iter([Ok(self.0.slice(start..end))]).boxed()
    }
}

/// Reads a small range whole.
pub(crate) async fn read_all(
    source: &dyn BlobSource,
    range: Range<u64>,
    lane: Lane,
    elsewhere: bool,
) -> Result<Vec<u8>, SourceError> {
    let want = range.end - range.start;
    let mut stream = if elsewhere { source.read_elsewhere(range, lane) } else { source.read(range, lane) };
    let mut out = Vec::new();
    while let Some(piece) = stream.next().await {
        out.extend_from_slice(&piece?);
        if out.len() as u64 > want {
            return Err(SourceError {
                message: "more bytes came than were asked for".to_owned(),
                transient: false,
            });
        }
    }
    if out.len() as u64 == want {
        return Ok(out);
    }
    Err(SourceError { message: format!("{} of {want} bytes came", out.len()), transient: true })
}
