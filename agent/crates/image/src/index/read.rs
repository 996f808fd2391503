//! Reads an index back: entries with their store offsets, extents, chunks, spans, and the tar itself again.

use zerocopy::FromBytes;

use super::frame::Frame;
use super::header::{HEADER_LEN, IndexHeader, VERSION_LISTED};
use super::{IndexError, TocReader};
use crate::decode::{Compression, MAX_WINDOW_FRAME};
use crate::entry::Entry;
use crate::records::{DigestAlgorithm, SpanKind, SpanRecord};

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

    /// Whether the tar that the index describes is the layer's own. Of a layer that brings a table of contents it is a stand-in
    /// ([`super::embedded`]): its replay does not have the diffID, and the chunks' digests alone verify the layer. An
    /// index from elsewhere may not claim that.
    pub fn has_own_tar(&self) -> bool {
        !self.lists_chunks()
    }

    /// Whether decoding can go on from one span into the next.
    pub fn spans_are_continuous(&self) -> bool {
        let alone = [SpanKind::GzipMembers as u8, SpanKind::ZstdFrames as u8];
        !self.spans.iter().any(|span| alone.contains(&span.kind))
    }

    /// Whether the files section lists each file's chunks.
    pub(super) fn lists_chunks(&self) -> bool {
        self.header.version.get() == VERSION_LISTED
    }

    /// What digests chunks.
    pub fn digest_algorithm(&self) -> DigestAlgorithm {
        self.header.digest_algorithm()
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
