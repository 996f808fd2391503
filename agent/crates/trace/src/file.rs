//! Trace files: written as a start goes on, read one record at a time.
//!
//! | part | bytes |
//! |---|---|
//! | magic | `SLUICETR` |
//! | version | 2, little-endian |
//! | zero | 2 |
//! | header length | 4, little-endian |
//! | header | JSON of [`Header`] |
//! | blocks | each: 4 length, 4 compressed length (both little-endian), a zstd frame with checksum |
//! | end | a block of length 0; its frame holds JSON of [`Footer`] |
//!
//! Blocks hold records: see [`crate::codec`]. Version 2 added kinds of records (steps, fetches, what arrived, files) and where
//! served bytes were; version 3 the lane of look-ups. Older ones are still read. A file without end was cut off (a crash): what is whole is read, then an error
//! says so.

use std::io::{self, Read, Write};

use crate::codec::{Decoder, Encoder};
use crate::{Footer, Header, Record};

const MAGIC: [u8; 8] = *b"SLUICETR";
/// Version of the format.
pub const TRACE_VERSION: u16 = 3;
/// The oldest version that is read: what later ones added is missing in it.
const OLDEST_VERSION: u16 = 1;
/// Longest header or footer accepted.
const MAX_TEXT: usize = 64 << 10;
/// Records are gathered to blocks of about this size.
const BLOCK: usize = 64 << 10;
/// Longest block accepted.
const MAX_BLOCK: usize = 1 << 20;
/// Compression that costs little: a recording container is starting.
const ZSTD_LEVEL: i32 = 1;

/// Why a trace cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// Reading or writing failed.
    #[error("cannot read or write the trace")]
    Io(#[from] io::Error),
    /// It does not begin as traces do.
    #[error("this is no trace")]
    NotATrace,
    /// Another version of the format.
    #[error("the trace has version {0}, and this program reads versions {OLDEST_VERSION} to {TRACE_VERSION}")]
    Version(u16),
    /// Something in it is not as the format has it.
    #[error("the trace is damaged in block {block}: {what}")]
    Damaged {
        /// Number of the block, from 0.
        block: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Header or footer is no JSON of the expected form.
    #[error("the trace's description of itself is damaged")]
    Text(#[source] serde_json::Error),
    /// The file ends before its end: who wrote it was interrupted. All records before were given.
    #[error("the trace was cut off in block {block}")]
    CutOff {
        /// Number of the block, from 0.
        block: u64,
    },
}

/// Writes a trace. Without [`TraceWriter::finish`] it counts as cut off.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: W,
    encoder: Encoder,
    records: u64,
}

impl<W: Write> TraceWriter<W> {
    /// Writes the header.
    pub fn new(mut out: W, header: &Header) -> Result<Self, TraceError> {
        let text = serde_json::to_vec(header).map_err(TraceError::Text)?;
        if text.len() > MAX_TEXT {
            return Err(TraceError::Damaged { block: 0, what: "the header is too long" });
        }
        out.write_all(&MAGIC)?;
        out.write_all(&TRACE_VERSION.to_le_bytes())?;
        out.write_all(&[0; 2])?;
        out.write_all(&(text.len() as u32).to_le_bytes())?;
        out.write_all(&text)?;
        Ok(Self { out, encoder: Encoder::default(), records: 0 })
    }

    /// Appends a record.
    pub fn push(&mut self, record: &Record) -> Result<(), TraceError> {
        self.encoder.push(record);
        self.records += 1;
        if self.encoder.len() >= BLOCK { self.flush() } else { Ok(()) }
    }

    /// Writes the records that were gathered, e.g. before a long silence.
    pub fn flush(&mut self) -> Result<(), TraceError> {
        let block = self.encoder.take();
        if !block.is_empty() {
            self.block(&block, block.len())?;
        }
        Ok(self.out.flush()?)
    }

    /// Writes the end; the footer's number of records is filled in. Gives the output back.
    pub fn finish(mut self, footer: Footer) -> Result<W, TraceError> {
        self.flush()?;
        let text =
            serde_json::to_vec(&Footer { records: self.records, ..footer }).map_err(TraceError::Text)?;
        self.block(&text, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn block(&mut self, bytes: &[u8], len: usize) -> Result<(), TraceError> {
        let mut frame = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
        frame.include_checksum(true)?;
        frame.write_all(bytes)?;
        let frame = frame.finish()?;
        self.out.write_all(&(len as u32).to_le_bytes())?;
        self.out.write_all(&(frame.len() as u32).to_le_bytes())?;
        Ok(self.out.write_all(&frame)?)
    }
}

/// Reads a trace, of which it holds one block and the processes. What it is given need not be trusted.
#[derive(Debug)]
pub struct TraceReader<R: Read> {
    input: R,
    header: Header,
    decoder: Decoder,
    footer: Option<Footer>,
    blocks: u64,
    records: u64,
    failed: bool,
}

impl<R: Read> TraceReader<R> {
    /// Reads the header.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let mut start = [0; 16];
        input.read_exact(&mut start).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => TraceError::NotATrace,
            _ => TraceError::Io(error),
        })?;
        let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, _, _, l0, l1, l2, l3] = start;
        if [m0, m1, m2, m3, m4, m5, m6, m7] != MAGIC {
            return Err(TraceError::NotATrace);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if !(OLDEST_VERSION..=TRACE_VERSION).contains(&version) {
            return Err(TraceError::Version(version));
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len > MAX_TEXT {
            return Err(TraceError::Damaged { block: 0, what: "the header is too long" });
        }
        let text = exactly(&mut input, len, 0)?;
        let header = serde_json::from_slice(&text).map_err(TraceError::Text)?;
        let decoder = Decoder::default();
        Ok(Self { input, header, decoder, footer: None, blocks: 0, records: 0, failed: false })
    }

    /// What was to be recorded.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What came of it; `None` until all records have been read.
    pub fn footer(&self) -> Option<&Footer> {
        self.footer.as_ref()
    }

    fn record(&mut self) -> Result<Option<Record>, TraceError> {
        loop {
            let block = self.blocks.saturating_sub(1);
            let damaged = |_| TraceError::Damaged { block, what: "a record is malformed" };
            if let Some(record) = self.decoder.next().map_err(damaged)? {
                self.records += 1;
                return Ok(Some(record));
            }
            if self.footer.is_some() {
                return Ok(None);
            }
            self.block()?;
        }
    }

    /// Reads the next block, or the end.
    fn block(&mut self) -> Result<(), TraceError> {
        let block = self.blocks;
        let lengths = exactly(&mut self.input, 8, block)?;
        let (len, packed) = match lengths.as_slice() {
            [a, b, c, d, e, f, g, h] => {
                (u32::from_le_bytes([*a, *b, *c, *d]) as usize, u32::from_le_bytes([*e, *f, *g, *h]) as usize)
            }
            _ => return Err(TraceError::CutOff { block }),
        };
        if len > MAX_BLOCK || packed > MAX_BLOCK + MAX_TEXT {
            return Err(TraceError::Damaged { block, what: "a block is too long" });
        }
        let frame = exactly(&mut self.input, packed, block)?;
        let most = if len == 0 { MAX_TEXT } else { len };
        let bytes = zstd::bulk::decompress(&frame, most)
            .map_err(|_damage| TraceError::Damaged { block, what: "a block does not decompress" })?;
        self.blocks += 1;
        if len > 0 {
            if bytes.len() != len {
                return Err(TraceError::Damaged { block, what: "a block has another length" });
            }
            self.decoder.block(bytes);
            return Ok(());
        }
        let footer: Footer = serde_json::from_slice(&bytes).map_err(TraceError::Text)?;
        if footer.records != self.records {
            return Err(TraceError::Damaged { block, what: "records are missing" });
        }
        self.footer = Some(footer);
        Ok(())
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.record().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

fn exactly(input: &mut impl Read, len: usize, block: u64) -> Result<Vec<u8>, TraceError> {
    let mut bytes = vec![0; len];
    input.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => TraceError::CutOff { block },
        _ => TraceError::Io(error),
    })?;
    Ok(bytes)
}
