//! Sorted files of fixed-size records, read by `pread` and binary search, so that memory does not grow with them.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sluice_image::entry::Entry;
use sluice_image::index::LayerIndex;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{OnFile, StoreError};

/// Records of type `R`, sorted.
#[derive(Debug)]
pub(crate) struct Records<R> {
    file: File,
    count: u64,
    record: PhantomData<R>,
}

impl<R: FromBytes + IntoBytes + FromZeros> Records<R> {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).on("open", path)?;
        let len = file.metadata().on("stat", path)?.len();
        Ok(Self { file, count: len / size_of::<R>() as u64, record: PhantomData })
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn get(&self, number: u64) -> io::Result<Option<R>> {
        if number >= self.count {
            return Ok(None);
        }
        let mut record = R::new_zeroed();
        self.file.read_exact_at(record.as_mut_bytes(), number * size_of::<R>() as u64)?;
        Ok(Some(record))
    }

    /// Up to `count` records from `first` on.
    pub(crate) fn several(&self, first: u64, count: usize) -> io::Result<Vec<R>>
    where
        R: Clone,
    {
        let count = usize::try_from(self.count.saturating_sub(first)).unwrap_or(usize::MAX).min(count);
        let mut records = vec![R::new_zeroed(); count];
        self.file.read_exact_at(records.as_mut_slice().as_mut_bytes(), first * size_of::<R>() as u64)?;
        Ok(records)
    }

    /// Number of the first record for which `before` does not hold.
    pub(crate) fn partition_point(&self, before: impl Fn(&R) -> bool) -> io::Result<u64> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.get(middle)? {
                Some(record) if before(&record) => low = middle + 1,
                _ => high = middle,
            }
        }
        Ok(low)
    }
}

/// A chunk by the first bytes of its digest; sorted, so that two layers are compared by reading both once, in order.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub(crate) struct DigestRecord {
    /// First 8 bytes of the digest.
    pub(crate) prefix: [u8; 8],
    /// Number of the chunk, big-endian, so that records of one digest are sorted by it.
    pub(crate) number: [u8; 4],
}

impl DigestRecord {
    pub(crate) fn number(&self) -> u64 {
        u32::from_be_bytes(self.number).into()
    }
}

/// Writes `chunks`, `extents` and `digests` of an index into `dir`; each entry that is met on the way goes to `seen`.
pub(crate) fn write_tables(
    index: &LayerIndex,
    dir: &Path,
    mut seen: impl FnMut(Entry),
) -> Result<(), StoreError> {
    let failed = |source| StoreError::Index { layer: index.header().layer_digest_text(), source };
    let [chunks_path, extents_path, digests_path] =
        ["chunks", "extents", "digests"].map(|name| dir.join(name));
    let create = |path: &Path| File::create(path).map(BufWriter::new).on("create", path);
    let (mut chunks, mut extents) = (create(&chunks_path)?, create(&extents_path)?);
    let mut digests = Vec::new();
    for item in index.toc().map_err(failed)? {
        let item = item.map_err(failed)?;
        chunks.write_all(item.chunks.as_slice().as_bytes()).on("write", &chunks_path)?;
        extents.write_all(item.extents.as_slice().as_bytes()).on("write", &extents_path)?;
        for chunk in &item.chunks {
            let prefix = *chunk.digest.first_chunk().unwrap_or(&[0; 8]);
            digests.push(DigestRecord { prefix, number: (digests.len() as u32).to_be_bytes() });
        }
        item.entry.into_iter().for_each(&mut seen);
    }
    // Whoever takes entries knows now that there are no more.
    drop(seen);
    chunks.flush().on("write", &chunks_path)?;
    extents.flush().on("write", &extents_path)?;
    digests.sort_unstable();
    std::fs::write(&digests_path, digests.as_slice().as_bytes()).on("write", &digests_path)
}
