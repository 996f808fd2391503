//! Reads of a layer: from memory, from what is recorded, and from what was only written.
//!
//! What is in the page cache but not recorded may be lost there: the kernel tells of a write that failed afterwards only at the
//! next flush, and until then a read may find a hole (Linux 6.18: ext4 once the page was dropped, XFS at once). So such bytes are
//! compared with their digest each time. What is recorded was flushed; a disk that does not give it any more is an error of the read,
//! and the chunk is fetched again.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use sluice_image::parts::part_value;
use sluice_image::records::ChunkRecord;

use crate::Layer;
use crate::layer::{blocks, bytes_in, span_of};
use crate::memory::{copy_part, overlay};

/// What came of a look for bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    All,
    /// Some are not verified.
    NotAll,
    /// Some were verified and are not to be had any more: they are forgotten now.
    Lost(String),
}

impl Layer {
    /// Fills `buffer` from `offset` if all of it is verified; says whether it was. Bytes beyond the end are zero. What the disk
    /// does not give any more is not verified from then on.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        Ok(self.look(offset, buffer)? == Found::All)
    }

    pub(crate) fn look(&self, offset: u64, buffer: &mut [u8]) -> io::Result<Found> {
        let end = offset.saturating_add(buffer.len() as u64).min(self.size());
        let (inside, beyond) = buffer.split_at_mut((end.saturating_sub(offset)) as usize);
        beyond.fill(0);
        loop {
            let evictions = self.memory.evictions();
            if !self.has(offset..end) {
                return Ok(Found::NotAll);
            }
            // Taken before the file is read: what is not held any more was written before.
            let held = self.memory.overlapping(offset..end);
            if overlay(&held, offset, inside) < inside.len() as u64 {
                match self.look_in_file(offset, inside, &held)? {
                    Found::All => {}
                    other => return Ok(other),
                }
            }
            if evictions == self.memory.evictions() {
                return Ok(Found::All);
            }
        }
    }

    /// Reads verified bytes from the file, but for those that are held in memory.
    fn look_in_file(&self, offset: u64, buffer: &mut [u8], held: &[(u64, Bytes)]) -> io::Result<Found> {
        let range = offset..offset + buffer.len() as u64;
        // Which chunk it was that failed is found out below.
        if held.is_empty()
            && self.durable.all(blocks(range.clone()))
            && self.file.read_exact_at(buffer, offset).is_ok()
        {
            return Ok(Found::All);
        }
        let mut found = Found::All;
        self.each_chunk(range.clone(), |chunk, content| {
            let start = chunk.store_offset.get();
            if held.iter().any(|(held, _)| *held == start) {
                return;
            }
            match self.read_chunk(chunk, &range, content) {
                Ok(()) => {
                    copy_part(start, content, offset, buffer);
                }
                Err(why) => found = self.forget_lost(chunk, why),
            }
        })?;
        Ok(found)
    }

    /// Gives `visit` the chunks with bytes in a range, and a buffer of each one's size.
    fn each_chunk(
        &self,
        range: Range<u64>,
        mut visit: impl FnMut(&ChunkRecord, &mut [u8]),
    ) -> io::Result<()> {
        let mut number = self.first_chunk(range.start)?;
        let mut content = Vec::new();
        while let Some(chunk) = self.chunk(number)?.filter(|chunk| chunk.store_offset.get() < range.end) {
            content.resize(chunk.len.get() as usize, 0);
            visit(&chunk, &mut content);
            number += 1;
        }
        Ok(())
    }

    /// Reads from the file what a chunk has of a range, if it is there; compared with digests unless it is recorded. `content` is the
    /// whole chunk's.
    fn read_chunk(&self, chunk: &ChunkRecord, range: &Range<u64>, content: &mut [u8]) -> Result<(), String> {
        let wanted = bytes_in(chunk, range);
        // Looked at before the bytes are read.
        let durable = self.durable.all(blocks(wanted.clone()));
        let known = if durable { None } else { self.parts.of(chunk, &wanted) };
        let start = chunk.store_offset.get();
        let read = match known.as_deref() {
            Some([first, .., last] | [first @ last]) => first.bytes.start as usize..last.bytes.end as usize,
            _ if durable => (wanted.start - start) as usize..(wanted.end - start) as usize,
            _ => 0..content.len(),
        };
        let bytes = content.get_mut(read.clone()).unwrap_or_default();
        self.file.read_exact_at(bytes, start + read.start as u64).map_err(|error| error.to_string())?;
        let same = match known {
            Some(parts) => parts.iter().all(|part| {
                let bytes = content.get(part.bytes.start as usize..part.bytes.end as usize);
                part_value(part.bytes.start, bytes.unwrap_or_default()) == part.value
            }),
            None => {
                durable || self.algorithm.is_some_and(|algorithm| algorithm.digest(content) == chunk.digest)
            }
        };
        if same { Ok(()) } else { Err("the disk did not keep what was written".to_owned()) }
    }

    /// Somebody could not read these bytes from the file: those chunks that cannot be are not verified from now on. Blocks the thread.
    pub fn reread(&self, range: Range<u64>) -> io::Result<()> {
        self.each_chunk(range.clone(), |chunk, content| {
            if self.has(bytes_in(chunk, &range))
                && self.memory.overlapping(span_of(chunk)).is_empty()
                && let Err(why) = self.read_chunk(chunk, &range, content)
            {
                self.forget_lost(chunk, why);
            }
        })
    }

    fn forget_lost(&self, chunk: &ChunkRecord, why: String) -> Found {
        let span = span_of(chunk);
        tracing::error!(
            layer = self.digest(),
            offset = span.start,
            size = chunk.len.get(),
            why,
            "verified bytes cannot be read from the layer store any more: they are fetched again"
        );
        if !self.durable.all(blocks(span.clone())) {
            // Others may be lost, too: the kernel may have told nobody yet.
            self.suspect.store(true, Ordering::Release);
        }
        self.doubtful().set(blocks(span.clone()));
        self.unverify(span);
        Found::Lost(why)
    }
}
