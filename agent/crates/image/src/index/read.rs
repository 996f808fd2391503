//! Reads an index back: entries with their store offsets, extents, chunks, spans, and the tar itself again.

use std::io::Read;

use zerocopy::FromBytes;

use super::IndexError;
use super::header::{HEADER_LEN, IndexHeader, Section};
use super::layout::{Layout, chunk_record, chunks, extents};
use crate::decode::{Compression, MAX_WINDOW_FRAME};
use crate::entry::{Entry, EntryKind};
use crate::records::{ChunkRecord, DigestAlgorithm, ExtentRecord, SpanRecord};
use crate::tar::{Content, Step, TarKind, TarParser};

/// Most bytes of span records accepted.
const MAX_SPANS: u64 = 64 << 20;

/// The table of contents of one layer, checked for consistency; windows may be absent.
#[derive(Debug, Clone)]
pub struct LayerIndex {
    header: IndexHeader,
    blob: Vec<u8>,
    spans: Vec<SpanRecord>,
}

impl LayerIndex {
    /// From a blob, or from its first [`IndexHeader::toc_len`] bytes.
    pub fn from_blob(blob: Vec<u8>) -> Result<Self, IndexError> {
        let header = IndexHeader::parse(&blob)?;
        let toc_len =
            usize::try_from(header.toc_len()).map_err(|_range| IndexError::Corrupt("larger than memory"))?;
        let toc =
            blob.get(HEADER_LEN..toc_len).ok_or(IndexError::Corrupt("shorter than its table of contents"))?;
        if *blake3::hash(toc).as_bytes() != header.toc_digest {
            return Err(IndexError::Corrupt("its table of contents does not match its digest"));
        }
        let spans = read_spans(&header, &blob)?;
        Ok(Self { header, blob, spans })
    }

    /// The fixed part.
    pub fn header(&self) -> &IndexHeader {
        &self.header
    }

    /// The blob, as far as it is here.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// How the layer is compressed.
    pub fn compression(&self) -> Compression {
        Compression::from_number(self.header.compression).unwrap_or(Compression::None)
    }

    /// Whether decoding can begin at every span.
    pub fn random_access(&self) -> bool {
        self.header.random_access == 1
    }

    /// The spans, ascending in both offsets.
    pub fn spans(&self) -> &[SpanRecord] {
        &self.spans
    }

    /// What digests chunks.
    pub fn digest_algorithm(&self) -> DigestAlgorithm {
        if self.header.digest_algorithm == DigestAlgorithm::Sha256 as u8 {
            DigestAlgorithm::Sha256
        } else {
            DigestAlgorithm::Blake3
        }
    }

    /// Entries in tar order, each with the extents and chunks of its content.
    pub fn toc(&self) -> Result<TocReader<'_>, IndexError> {
        TocReader::new(self)
    }

    /// Entries in tar order.
    pub fn entries(&self) -> Result<impl Iterator<Item = Result<Entry, IndexError>> + '_, IndexError> {
        Ok(self.toc()?.filter_map(|item| item.map(|item| item.entry).transpose()))
    }

    /// Gives the layer's tar again, byte for byte, from the skeleton and from contents read by store offset.
    pub fn replay_tar(
        &self,
        mut content: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>,
        mut out: impl FnMut(&[u8]),
    ) -> Result<(), IndexError> {
        let mut reader = self.toc()?;
        let mut buffer = vec![0; 256 * 1024];
        while let Some(item) = reader.next_step(&mut out)? {
            for (at, len) in item.segments {
                let mut done = 0;
                while done < len {
                    let now = (len - done).min(buffer.len() as u64);
                    let piece = buffer.get_mut(..now as usize).unwrap_or(&mut []);
                    content(at + done, piece).map_err(IndexError::Sink)?;
                    out(piece);
                    done += now;
                }
            }
        }
        Ok(())
    }

    fn section(&self, section: &Section) -> Result<&[u8], IndexError> {
        slice(&self.blob, section)
    }
}

fn slice<'a>(blob: &'a [u8], section: &Section) -> Result<&'a [u8], IndexError> {
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
struct Frame<'a> {
    decoder: zstd::stream::read::Decoder<'static, std::io::BufReader<&'a [u8]>>,
    /// Raw bytes still to come out of the decoder.
    left: u64,
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
}

impl<'a> Frame<'a> {
    fn new(blob: &'a [u8], section: &Section) -> Result<Self, IndexError> {
        let decoder = zstd::stream::read::Decoder::new(slice(blob, section)?)
            .map_err(|_io| IndexError::Corrupt("a section does not decompress"))?;
        let left = section.raw_len.get();
        let size = usize::try_from(left).unwrap_or(usize::MAX).min(FRAME_BUFFER);
        Ok(Self { decoder, left, buffer: vec![0; size], at: 0, filled: 0 })
    }

    /// The next raw bytes; none at the end. An error if the section holds more or less than its header says.
    fn bytes(&mut self) -> Result<&[u8], IndexError> {
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

    fn consume(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.filled);
    }

    /// All of a section that has at most `limit` raw bytes.
    fn read_all(mut self, limit: u64) -> Result<Vec<u8>, IndexError> {
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

fn read_spans(header: &IndexHeader, blob: &[u8]) -> Result<Vec<SpanRecord>, IndexError> {
    let raw = Frame::new(blob, &header.spans)?.read_all(MAX_SPANS)?;
    let spans = <[SpanRecord]>::ref_from_bytes(&raw)
        .map_err(|_cast| IndexError::Corrupt("its spans are not whole records"))?
        .to_vec();
    let mut last: Option<&SpanRecord> = None;
    for span in &spans {
        let (compressed, tar) = (span.compressed_offset.get(), span.tar_offset.get());
        let follows = match last {
            None => compressed == 0 && tar == 0,
            Some(last) => compressed >= last.compressed_offset.get() && tar > last.tar_offset.get(),
        };
        let window_end = span.window_offset.get().checked_add(u64::from(span.window_len.get()));
        let window_fits = span.window_len.get() <= MAX_WINDOW_FRAME
            && window_end.is_some_and(|end| end <= header.windows.len.get());
        if !follows || compressed > header.layer_size.get() || tar > header.tar_size.get() || !window_fits {
            return Err(IndexError::Corrupt("its spans do not ascend within the layer"));
        }
        last = Some(span);
    }
    if spans.is_empty() && header.tar_size.get() > 0 {
        return Err(IndexError::Corrupt("it has no spans"));
    }
    Ok(spans)
}

/// An entry of the table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocItem {
    /// The entry; `None` for kinds that images do not use.
    pub entry: Option<Entry>,
    /// Where its content stands, if it has content of its own.
    pub extents: Vec<ExtentRecord>,
    /// The chunks of its own content.
    pub chunks: Vec<ChunkRecord>,
    /// `(store offset, bytes)` in tar order, own content or not.
    segments: Vec<(u64, u64)>,
}

/// Iterator over the table of contents; memory does not grow with it but for 16 bytes a file.
pub struct TocReader<'a> {
    index: &'a LayerIndex,
    skeleton: Frame<'a>,
    parser: TarParser,
    files: Frame<'a>,
    digests: &'a [u8],
    layout: Layout,
    tar_offset: u64,
    entries: u64,
    ended: bool,
}

impl std::fmt::Debug for TocReader<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TocReader").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl<'a> TocReader<'a> {
    fn new(index: &'a LayerIndex) -> Result<Self, IndexError> {
        let header = &index.header;
        Ok(Self {
            index,
            skeleton: Frame::new(&index.blob, &header.skeleton)?,
            parser: TarParser::new(true),
            files: Frame::new(&index.blob, &header.files)?,
            digests: index.section(&header.digests)?,
            layout: Layout::default(),
            tar_offset: 0,
            entries: 0,
            ended: false,
        })
    }

    /// The next entry; skeleton bytes on the way go to `skeleton_bytes`.
    fn next_step(&mut self, mut skeleton_bytes: impl FnMut(&[u8])) -> Result<Option<TocItem>, IndexError> {
        loop {
            let input = self.skeleton.bytes()?;
            if input.is_empty() {
                return self.end();
            }
            let (consumed, step) = self.parser.step(input)?;
            skeleton_bytes(input.get(..consumed).unwrap_or(input));
            self.skeleton.consume(consumed);
            self.tar_offset += consumed as u64;
            match step {
                Step::Skeleton => {}
                Step::Entry(entry) => return self.item(*entry).map(Some),
                Step::Content { .. } => return Err(IndexError::Corrupt("its skeleton holds content")),
            }
        }
    }

    fn end(&mut self) -> Result<Option<TocItem>, IndexError> {
        self.parser.finish()?;
        let header = &self.index.header;
        if !self.files.bytes()?.is_empty()
            || self.tar_offset != header.tar_size.get()
            || self.layout.next() != header.store_size.get()
            || !self.digests.is_empty()
            || self.entries != header.entry_count.get()
        {
            return Err(IndexError::Corrupt("its sections do not fit each other"));
        }
        Ok(None)
    }

    fn item(&mut self, tar: crate::tar::TarEntry) -> Result<TocItem, IndexError> {
        self.entries += 1;
        let mut item = TocItem { entry: None, extents: Vec::new(), chunks: Vec::new(), segments: Vec::new() };
        let kind = match tar.kind {
            TarKind::File(content) => self.file(&content, &mut item)?,
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink(target) => EntryKind::Symlink { target },
            TarKind::HardLink(target) => EntryKind::HardLink { target },
            TarKind::CharDevice(major, minor) => EntryKind::CharDevice { major, minor },
            TarKind::BlockDevice(major, minor) => EntryKind::BlockDevice { major, minor },
            TarKind::Fifo => EntryKind::Fifo,
            TarKind::Unknown(_) => return Ok(item),
        };
        item.entry = Some(Entry {
            path: tar.path,
            kind,
            mode: tar.mode,
            uid: tar.uid,
            gid: tar.gid,
            mtime: tar.mtime,
            xattrs: tar.xattrs,
        });
        Ok(item)
    }

    fn file(&mut self, content: &Content, item: &mut TocItem) -> Result<EntryKind, IndexError> {
        let size = content.size;
        if size == 0 {
            return Ok(EntryKind::File { size: 0, store_offset: 0 });
        }
        let store_offset = match self.next_file()? {
            0 => {
                let store_offset = self.layout.place(size)?;
                item.extents = extents(content, self.tar_offset, store_offset);
                for chunk in chunks(size, store_offset, self.index.header.chunk_size.get()) {
                    let (digest, rest) = self
                        .digests
                        .split_first_chunk::<32>()
                        .ok_or(IndexError::Corrupt("it lacks digests"))?;
                    item.chunks.push(chunk_record(chunk, *digest));
                    self.digests = rest;
                }
                store_offset
            }
            number => match self.layout.own(number - 1) {
                Some((store_offset, own_size)) if own_size == size => store_offset,
                _ => return Err(IndexError::Corrupt("a file shares content that is not there")),
            },
        };
        item.segments = content.segments().map(|(offset, len)| (store_offset + offset, len)).collect();
        self.tar_offset = self
            .tar_offset
            .checked_add(content.stored)
            .filter(|offset| *offset <= self.index.header.tar_size.get())
            .ok_or(IndexError::Corrupt("its files are larger than the layer"))?;
        Ok(EntryKind::File { size, store_offset })
    }

    /// The next varint of the files section.
    fn next_file(&mut self) -> Result<u64, IndexError> {
        let mut value = 0_u64;
        for shift in (0..63).step_by(7) {
            let byte = *self.files.bytes()?.first().ok_or(IndexError::Corrupt("it lacks files"))?;
            self.files.consume(1);
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(IndexError::Corrupt("a number is too long"))
    }
}

impl Iterator for TocReader<'_> {
    type Item = Result<TocItem, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.next_step(|_| {}).transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}
