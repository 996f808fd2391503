//! A compressed section of an index, read as a stream.

use std::io::Read;

use super::IndexError;
use super::header::Section;

/// The bytes of a section.
pub(super) fn slice<'a>(blob: &'a [u8], section: &Section) -> Result<&'a [u8], IndexError> {
    let start = usize::try_from(section.offset.get()).ok();
    let end = section.end().and_then(|end| usize::try_from(end).ok());
    start
        .zip(end)
        .and_then(|(start, end)| blob.get(start..end))
        .ok_or(IndexError::Corrupt("a section lies outside the blob"))
}

/// Raw bytes kept of a section that is read as a stream.
const FRAME_BUFFER: usize = 64 * 1024;

/// A compressed section, read in order: memory does not depend on the sizes that the blob claims.
pub(super) struct Frame<'a> {
    decoder: zstd::stream::read::Decoder<'static, std::io::BufReader<&'a [u8]>>,
    /// Raw bytes still to come out of the decoder.
    left: u64,
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
}

impl<'a> Frame<'a> {
    pub(super) fn new(blob: &'a [u8], section: &Section) -> Result<Self, IndexError> {
        let decoder = zstd::stream::read::Decoder::new(slice(blob, section)?)
            .map_err(|_io| IndexError::Corrupt("a section does not decompress"))?;
        let left = section.raw_len.get();
        let size = usize::try_from(left).unwrap_or(usize::MAX).min(FRAME_BUFFER);
        Ok(Self { decoder, left, buffer: vec![0; size], at: 0, filled: 0 })
    }

    /// The next raw bytes; none at the end. An error if the section holds more or less than its header says.
    pub(super) fn bytes(&mut self) -> Result<&[u8], IndexError> {
        if self.at == self.filled {
            let want = self.buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            self.at = 0;
            // At the end one byte more is asked for: there must be none.
            let mut beyond = [0];
            let room = if want > 0 { self.buffer.get_mut(..want).unwrap_or(&mut []) } else { &mut beyond };
            let read = self
                .decoder
                .read(room)
                .map_err(|_io| IndexError::Corrupt("a section does not decompress"))?;
            if (read > 0) != (want > 0) {
                return Err(IndexError::Corrupt("a section has not the size its header says"));
            }
            self.filled = read;
            self.left -= read as u64;
        }
        Ok(self.buffer.get(self.at..self.filled).unwrap_or(&[]))
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.filled);
    }

    /// All of a section that has at most `limit` raw bytes.
    pub(super) fn read_all(mut self, limit: u64) -> Result<Vec<u8>, IndexError> {
        if self.left > limit {
            return Err(IndexError::Corrupt("a section is larger than it may be"));
        }
        let mut all = Vec::new();
        loop {
            let bytes = self.bytes()?;
            if bytes.is_empty() {
                return Ok(all);
            }
            let len = bytes.len();
            all.extend_from_slice(bytes);
            self.consume(len);
        }
    }
}
