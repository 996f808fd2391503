//! Decoder windows of a layer's spans: small pieces of its index blob.
//!
//! A fetch cannot begin to decode without its window, and a request for each would double what a read costs where the registry is
//! far. So the first that is asked for makes all of the layer's come (0.4 % of it), into a file beside the layer.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::source::read_all;
use crate::{BlobSource, Lane, SourceError};

/// Windows of larger layers (beyond some 4 GB) are asked for one by one: all pass through memory.
const MOST_BYTES: u64 = 16 << 20;

/// See the module text.
#[derive(Debug)]
pub(crate) struct Windows {
    index_blob: Arc<dyn BlobSource>,
    /// Where they stand in the index blob.
    section: Range<u64>,
    path: PathBuf,
    local: OnceLock<File>,
    begun: AtomicBool,
}

impl Windows {
    /// `path` is the file for them, which may exist.
    pub(crate) fn new(index_blob: Arc<dyn BlobSource>, section: Range<u64>, path: PathBuf) -> Arc<Self> {
        let local = OnceLock::new();
        if let Ok(file) = File::open(&path) {
            drop(local.set(file));
        }
        Arc::new(Self { index_blob, section, path, local, begun: AtomicBool::new(false) })
    }

    /// The window at `range` of the index blob. What is here may be damaged: then it decodes to other bytes, and the next attempt
    /// goes `elsewhere`.
    pub(crate) async fn read(
        self: &Arc<Self>,
        range: Range<u64>,
        lane: Lane,
        elsewhere: bool,
    ) -> Result<Vec<u8>, SourceError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        if !elsewhere {
            if let Some(window) = self.read_local(&range) {
                return Ok(window);
            }
            if self.section.end - self.section.start <= MOST_BYTES
                && !self.begun.swap(true, Ordering::Relaxed)
            {
                let windows = Arc::clone(self);
                tokio::spawn(async move { windows.bring(lane).await });
            }
        }
        read_all(&*self.index_blob, range, lane, elsewhere).await
    }

    fn read_local(&self, range: &Range<u64>) -> Option<Vec<u8>> {
        let mut window = vec![0; usize::try_from(range.end - range.start).ok()?];
        let at = range.start.checked_sub(self.section.start)?;
        self.local.get()?.read_exact_at(&mut window, at).ok()?;
        Some(window)
    }

    async fn bring(&self, lane: Lane) {
        let brought = match read_all(&*self.index_blob, self.section.clone(), lane, false).await {
            Ok(windows) => keep(&self.path, &windows).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match brought {
            Ok(file) => drop(self.local.set(file)),
            Err(error) => {
                tracing::debug!(path = %self.path.display(), error, "windows are asked for one by one");
            }
        }
    }
}

/// Appears whole or not at all, but may be lost with power: then it is fetched again.
fn keep(path: &Path, windows: &[u8]) -> io::Result<File> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, windows)?;
    fs::rename(&temporary, path)?;
    File::open(path)
}
