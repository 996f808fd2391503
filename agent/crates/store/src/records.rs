//! Sorted files of fixed-size records, read by `pread` and binary search, so that memory does not grow with them.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sluice_image::index::LayerIndex;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

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

    pub(crate) fn get(&self, number: u64) -> io::Result<Option<R>> {
        if number >= self.count {
            return Ok(None);
        }
        let mut record = R::new_zeroed();
        self.file.read_exact_at(record.as_mut_bytes(), number * size_of::<R>() as u64)?;
        Ok(Some(record))
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

/// Writes `chunks` and `extents` of an index into `dir`.
pub(crate) fn write_tables(index: &LayerIndex, dir: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Index { layer: index.header().layer_digest_text(), source };
    let (chunks_path, extents_path) = (dir.join("chunks"), dir.join("extents"));
    let create = |path: &Path| File::create(path).map(BufWriter::new).on("create", path);
    let (mut chunks, mut extents) = (create(&chunks_path)?, create(&extents_path)?);
    for item in index.toc().map_err(failed)? {
        let item = item.map_err(failed)?;
        chunks.write_all(item.chunks.as_slice().as_bytes()).on("write", &chunks_path)?;
        extents.write_all(item.extents.as_slice().as_bytes()).on("write", &extents_path)?;
    }
    chunks.flush().on("write", &chunks_path)?;
    extents.flush().on("write", &extents_path)
}
