//! A layer that is written in order while it arrives, for the first pull of an image without an index.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use sluice_image::index::ContentSink;

use crate::space::Space;
use crate::{OnFile, StoreError};

/// A temporary file that becomes a layer's file. Dropped without `commit_ingest` it leaves nothing.
#[derive(Debug)]
pub struct Ingest {
    file: tempfile::NamedTempFile,
    space: Arc<Space>,
}

impl Ingest {
    pub(crate) fn begin(temporary: &Path, space: Arc<Space>) -> Result<Self, StoreError> {
        let file = tempfile::NamedTempFile::new_in(temporary).on("create a file in", temporary)?;
        Ok(Self { file, space })
    }

    fn file(&self) -> &File {
        self.file.as_file()
    }

    pub(crate) fn finish(self, target: &Path, size: u64) -> Result<(), StoreError> {
        self.file().set_len(size).on("set the length of", target)?;
        // By the descriptor that wrote: one opened afterwards may not be told that a write was lost.
        self.file().sync_data().on("flush", target)?;
        self.file.persist(target).map_err(|error| error.error).on("move to", target)?;
        Ok(())
    }
}

impl ContentSink for Ingest {
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        self.space.admit(len)?;
        self.file().write_all_at(bytes, store_offset).inspect_err(|error| self.space.refused(len, error))
    }

    fn rewind(&mut self, store_offset: u64) -> io::Result<()> {
        self.file().set_len(store_offset)
    }
}
