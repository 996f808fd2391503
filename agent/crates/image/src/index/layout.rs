//! The layout rule, version 1: where in the layer's file each content stands. Used when an index is made and when it is read,
//! so that a store offset is never taken from outside.

use super::IndexError;
use crate::records::{BLOCK_SIZE, ExtentRecord};
use crate::tar::Content;

/// Largest layer file accepted: 1 TiB.
pub(super) const MAX_STORE_SIZE: u64 = 1 << 40;

/// Where the next content goes, and where the earlier ones went.
#[derive(Debug, Default)]
pub(super) struct Layout {
    next: u64,
    /// `(store offset, size)` of files with content of their own.
    own: Vec<(u64, u64)>,
}

impl Layout {
    /// Where a file of `size` bytes would begin.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Where a file of `size` bytes would end; an error if the layer's file would be too large.
    pub(super) fn check(&self, size: u64) -> Result<u64, IndexError> {
        size.checked_next_multiple_of(BLOCK_SIZE)
            .and_then(|rounded| self.next.checked_add(rounded))
            .filter(|end| *end <= MAX_STORE_SIZE)
            .ok_or(IndexError::Limit("its files take more than 1 TiB"))
    }

    /// Places a file with content of its own.
    pub(super) fn place(&mut self, size: u64) -> Result<u64, IndexError> {
        let start = self.next;
        self.next = self.check(size)?;
        self.own.push((start, size));
        Ok(start)
    }

    /// How many files with content of their own there are.
    pub(super) fn own_count(&self) -> u64 {
        self.own.len() as u64
    }

    /// Where the `number`-th file with content of its own stands, and its size.
    pub(super) fn own(&self, number: u64) -> Option<(u64, u64)> {
        self.own.get(usize::try_from(number).ok()?).copied()
    }
}

/// Extents of a file whose content begins at `tar_offset` of the tar and `store_offset` of the layer's file.
pub(super) fn extents(content: &Content, tar_offset: u64, store_offset: u64) -> Vec<ExtentRecord> {
    let mut at = tar_offset;
    let mut extents: Vec<ExtentRecord> = Vec::with_capacity(1);
    for (offset, len) in content.segments() {
        extents.push(ExtentRecord {
            store_offset: (store_offset + offset).into(),
            tar_offset: at.into(),
            len: len.into(),
        });
        at += len;
    }
    extents
}

/// `(store offset, length)` of each chunk of a file, in order.
pub(super) fn chunks(size: u64, store_offset: u64, chunk_size: u32) -> impl Iterator<Item = (u64, u32)> {
    (0..size.div_ceil(u64::from(chunk_size))).map(move |number| {
        let at = number * u64::from(chunk_size);
        (store_offset + at, (size - at).min(u64::from(chunk_size)) as u32)
    })
}
