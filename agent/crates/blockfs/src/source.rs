//! What a block file is made of.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

/// The errno of a read that failed for no better reason (all architectures of Linux).
const EIO: i32 = 5;

/// A read that failed for good: the reader gets `errno`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ReadError {
    /// What the reader sees; EIO unless there is a reason for another.
    pub errno: i32,
    /// For the log.
    pub message: String,
}

impl ReadError {
    /// A local file that cannot be read.
    pub(crate) fn of_store(error: &std::io::Error) -> Self {
        Self { errno: EIO, message: format!("cannot read the layer store: {error}") }
    }

    /// A source that gives nothing, or more than was asked for.
    pub(crate) fn other_length(got: usize, len: usize) -> Self {
        Self { errno: EIO, message: format!("the source gave {got} bytes of {len}") }
    }
}

/// One layer's bytes. All of them are verified before they are given.
pub trait BlockSource: Send + Sync + std::fmt::Debug {
    /// Bytes of the file: a multiple of 4096.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset` if all of it is local; says whether it was. Must not block on the network.
    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool>;
    /// Reads what is not local; takes as long as it takes. May give fewer bytes than asked for, but some: it is asked again.
    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>>;

    /// The local file that holds, at the same offsets, whatever [`Self::on_disk`] vouches for. It is read without asking
    /// again. None, the default: every read asks.
    fn file(&self) -> Option<Arc<File>> {
        None
    }

    /// The first run of bytes in a range that is verified and in [`Self::file`] for good; empty, the default, when there is none. Cheap:
    /// asked once for each read that was not known to be local.
    fn on_disk(&self, range: Range<u64>) -> Range<u64> {
        range.start..range.start
    }

    /// [`Self::file`] did not give these bytes although they were vouched for. They are asked for after this, and whatever else is
    /// lost is to be vouched for no more. Nothing by default.
    fn unreadable(&self, _offset: u64, _len: usize) {}
}
