//! Parts of chunks that are not here as a whole: taken when they are proved, read, and forgotten when nothing proves them any more.
//!
//! They stand in the file like any other bytes. What proves a part until it is recorded is kept in memory only: a part that was
//! recorded by an earlier process counts like all that is recorded, but `fsck` cannot tell whether it is still what it was.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sluice_image::parts::{PART_SIZE, Part, part_value, ranges_of};
use sluice_image::records::{BLOCK_SIZE, ChunkRecord, DigestAlgorithm};

use crate::Layer;
use crate::layer::{blocks, bytes_in, span_of};

/// Chaining values by the parts' store offsets: 40 bytes for each 4 KiB.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    values: Mutex<BTreeMap<u64, [u8; 32]>>,
}

/// A part, and what proved it.
#[derive(Debug)]
pub(crate) struct Proved {
    /// Its bytes in the chunk.
    pub(crate) bytes: Range<u32>,
    pub(crate) value: [u8; 32],
}

impl Parts {
    /// The parts that have a range of a chunk's bytes; none if one of them is not known.
    pub(crate) fn of(&self, chunk: &ChunkRecord, wanted: &Range<u64>) -> Option<Vec<Proved>> {
        let values = self.lock();
        if values.is_empty() {
            return None;
        }
        let start = chunk.store_offset.get();
        let parts = parts_in(chunk, wanted);
        let proved = parts.map(|bytes| {
            let value = *values.get(&(start + u64::from(bytes.start)))?;
            Some(Proved { bytes, value })
        });
        proved.collect()
    }

    /// All of the layer is recorded.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, [u8; 32]>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layer {
    /// Whether parts of its chunks can be proved.
    pub fn takes_parts(&self) -> bool {
        self.algorithm == Some(DigestAlgorithm::Blake3)
    }

    /// Takes parts of a chunk that the caller has proved, in order, unless the disk does not take them: says whether it took all. Blocks
    /// the thread.
    pub fn insert_parts(&self, chunk: &ChunkRecord, parts: &[Part<'_>]) -> bool {
        let _inserting = self.inserting();
        let behind = |part: &Part<'_>| part.offset + part.bytes.len() as u32;
        // Those that follow each other are written together.
        parts.chunk_by(|one, next| behind(one) == next.offset).all(|run| {
            let Some(first) = run.first() else { return true };
            let start = chunk.store_offset.get() + u64::from(first.offset);
            let bytes = run.iter().map(|part| part.bytes).collect::<Vec<_>>().concat();
            if self.is_doubtful(start) {
                return false;
            }
            if let Err(error) = self.write(start, &bytes) {
                tracing::debug!(layer = self.digest(), offset = start, size = bytes.len(), %error, "the disk does not take parts of a chunk");
                return false;
            }
            let value = |part: &Part<'_>| (chunk.store_offset.get() + u64::from(part.offset), part.value);
            self.parts.lock().extend(run.iter().map(value));
            self.verified.set(blocks(start..start + bytes.len() as u64));
            true
        })
    }

    /// A chunk is not here as a whole: parts of it that nothing proves, or that are not what they were, are not verified from now on.
    /// Says what was wrong, if bytes were; and whether anything was forgotten. Blocks the thread.
    pub(crate) fn check_parts(&self, chunk: &ChunkRecord) -> (Option<String>, bool) {
        let (mut wrong, mut forgotten) = (None, false);
        let start = chunk.store_offset.get();
        if !self.verified.any(blocks(span_of(chunk))) {
            return (wrong, forgotten);
        }
        for bytes in parts_in(chunk, &span_of(chunk)) {
            let at = start + u64::from(bytes.start)..start + u64::from(bytes.end);
            if !self.verified.any(blocks(at.clone())) {
                continue;
            }
            if let Some(value) = self.parts.lock().get(&at.start).copied() {
                let mut content = vec![0; bytes.len()];
                let read = self.file().read_exact_at(&mut content, at.start);
                if read.is_ok() && part_value(bytes.start, &content) == value {
                    continue;
                }
                wrong = Some(read.map_or_else(
                    |error| format!("cannot be read: {error}"),
                    |()| "are not what they were".to_owned(),
                ));
            }
            self.unverify(at.start..at.end.next_multiple_of(BLOCK_SIZE));
            forgotten = true;
        }
        (wrong, forgotten)
    }

    /// Which parts of a chunk have bytes that are not verified, as [`sluice_image::parts::parts_of`] numbers them.
    pub fn missing_parts(&self, chunk: &ChunkRecord) -> u64 {
        let start = chunk.store_offset.get();
        let missing = ranges_of(chunk.len.get(), u64::MAX)
            .enumerate()
            .filter(|(_, part)| !self.has(start + u64::from(part.start)..start + u64::from(part.end)));
        missing.map(|(number, _)| 1 << number).sum()
    }
}

/// The parts, as ranges of the chunk's bytes, that have bytes of a store range.
fn parts_in(chunk: &ChunkRecord, range: &Range<u64>) -> impl Iterator<Item = Range<u32>> {
    let start = chunk.store_offset.get();
    let wanted = bytes_in(chunk, range);
    let (from, to) = ((wanted.start - start) as u32, (wanted.end - start) as u32);
    let len = chunk.len.get();
    let starts = (from / PART_SIZE * PART_SIZE..to).step_by(PART_SIZE as usize);
    starts.map(move |start| start..len.min(start.saturating_add(PART_SIZE)))
}
