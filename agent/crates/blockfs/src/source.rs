//! What a block file is made of.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

/// A read that failed for good: the reader gets `errno`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ReadError {
    /// What the reader sees; EIO unless there is a reason for another.
    pub errno: i32,
    /// For the log.
    pub message: String,
}

/// One layer's bytes. All of them are verified before they are given.
pub trait BlockSource: Send + Sync + std::fmt::Debug {
    /// Bytes of the file: a multiple of 4096.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset` if all of it is local; says whether it was. Must not block on the network.
    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool>;
    /// Reads what is not local; takes as long as it takes.
    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>>;
}
