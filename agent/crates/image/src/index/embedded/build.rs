//! Makes the index from a table's entries.

use std::collections::HashMap;

use super::EmbeddedToc;
use super::json::{Source, TableEntry};
use super::stand_in::put_headers;
use crate::decode::members::{Piece, PieceList};
use crate::decode::{Compression, Decoder, WINDOW};
use crate::index::blob::{Blob, Parts, content_key};
use crate::index::layout::Layout;
use crate::index::{IndexError, LayerIndex};
use crate::records::{BLOCK_SIZE, CHUNK_SIZE, DigestAlgorithm, SpanKind, SpanRecord};
use crate::tar::{Step, TAR_BLOCK, TarParser};
use crate::varint;

/// A span ends once it has this many bytes of the layer, or of the tar.
const SPAN_COMPRESSED: u64 = 2 << 20;
const SPAN_TAR: u64 = 5 << 20;
/// Largest stand-in tar: what the layer's file may have, and headers.
const MAX_TAR: u64 = 1 << 41;

/// The whole index.
pub(super) fn index(
    toc: &EmbeddedToc,
    entries: Vec<TableEntry>,
    layer_digest: [u8; 32],
    diff_id: [u8; 32],
) -> Result<LayerIndex, IndexError> {
    let mut parts = Parts::new()?;
    let mut spans = Spans::new(toc.compression);
    let mut layout = Layout::default();
    let mut known = HashMap::new();
    let mut largest = u64::from(CHUNK_SIZE);
    let count = entries.len() as u64;
    for entry in entries {
        let mut headers = Vec::new();
        put_headers(&mut headers, &entry.tar)?;
        parts.skeleton(&headers)?;
        spans.gap(headers.len() as u64)?;
        let size: u64 = entry.chunks.iter().map(|(len, _)| len).sum();
        if size == 0 {
            continue;
        }
        let digests: Vec<u8> = entry.chunks.iter().flat_map(|(_, digest)| *digest).collect();
        let key = content_key(size, &digests);
        if let Some(number) = known.get(&key) {
            varint::put(&mut parts.files, number + 1);
            // Decoded, but in no extent.
            spans.content(&entry.chunks, &entry.pieces)?;
        } else {
            varint::put(&mut parts.files, 0);
            varint::put(&mut parts.files, entry.chunks.len() as u64);
            for (len, _) in &entry.chunks {
                varint::put(&mut parts.files, *len);
                largest = largest.max(*len);
            }
            known.insert(key, layout.own_count());
            layout.place(size)?;
            parts.digests.extend_from_slice(&digests);
            spans.content(&entry.chunks, &entry.pieces)?;
        }
        let padding = size.wrapping_neg() % TAR_BLOCK as u64;
        parts.skeleton(&vec![0; padding as usize])?;
        spans.gap(padding)?;
    }
    parts.skeleton(&[0; 2 * TAR_BLOCK])?;
    spans.gap(2 * TAR_BLOCK as u64)?;
    let tar_size = spans.tar;
    let (spans, windows) = spans.finish(toc.offset)?;
    let blob = Blob {
        listed_chunks: true,
        compression: toc.compression,
        algorithm: DigestAlgorithm::Sha256,
        random_access: true,
        chunk_size: u32::try_from(largest.next_power_of_two())
            .map_err(|_range| IndexError::Limit("a chunk is too large"))?,
        layer_size: toc.layer_size,
        tar_size,
        store_size: layout.next().next_multiple_of(BLOCK_SIZE),
        layer_digest,
        diff_id,
        entry_count: count,
    };
    let index = LayerIndex::from_blob(blob.assemble(parts, &spans, &windows)?)?;
    // What the table says of entries is judged by the one who reads tars: better here than when the layer is used.
    index.toc()?.try_for_each(|item| item.map(drop))?;
    Ok(index)
}

/// Spans and their lists of pieces, in order.
struct Spans {
    kind: SpanKind,
    done: Vec<SpanRecord>,
    windows: Vec<u8>,
    /// Tar bytes so far.
    tar: u64,
    /// Where the open span begins: layer, tar.
    start: (u64, u64),
    list: PieceList,
    /// The last piece, which the next one's offset ends, and where it begins.
    last: Option<(u64, Piece)>,
}

impl Spans {
    fn new(compression: Compression) -> Self {
        let kind =
            if compression == Compression::Gzip { SpanKind::GzipMembers } else { SpanKind::ZstdFrames };
        Self {
            kind,
            done: Vec::new(),
            windows: Vec::new(),
            tar: 0,
            start: (0, 0),
            list: PieceList::default(),
            last: Some((0, Piece::default())),
        }
    }

    /// Bytes of the tar that are no content.
    fn gap(&mut self, bytes: u64) -> Result<(), IndexError> {
        if let Some((_, piece)) = &mut self.last {
            piece.gap += bytes;
        }
        self.advance(bytes)
    }

    fn advance(&mut self, bytes: u64) -> Result<(), IndexError> {
        let tar = self.tar.checked_add(bytes).filter(|tar| *tar <= MAX_TAR);
        self.tar = tar.ok_or(IndexError::Limit("its files take more than 1 TiB"))?;
        Ok(())
    }

    /// A file's content. A span ends only where a chunk does.
    fn content(&mut self, chunks: &[(u64, [u8; 32])], pieces: &[Source]) -> Result<(), IndexError> {
        let mut pieces = pieces.iter();
        for (len, _) in chunks {
            let mut left = *len;
            let mut first = true;
            while left > 0 {
                let piece = pieces.next().ok_or(IndexError::Corrupt("a file lacks content"))?;
                self.piece(piece, first)?;
                first = false;
                left = left.saturating_sub(piece.len);
            }
        }
        Ok(())
    }

    fn piece(&mut self, source: &Source, may_begin_span: bool) -> Result<(), IndexError> {
        let Some(offset) = source.offset else { return self.gap(source.len) };
        self.end_piece(offset)?;
        let (compressed, tar) = (offset - self.start.0, self.tar - self.start.1);
        if may_begin_span
            && (compressed >= SPAN_COMPRESSED || tar >= SPAN_TAR || self.list.len() > WINDOW / 2)
        {
            self.end_span(offset)?;
        }
        self.last = Some((offset, Piece { compressed: 0, content: source.len, gap: 0 }));
        self.advance(source.len)
    }

    fn end_piece(&mut self, end: u64) -> Result<(), IndexError> {
        let Some((start, mut piece)) = self.last.take() else { return Ok(()) };
        piece.compressed =
            end.checked_sub(start).ok_or(IndexError::Corrupt("contents of the layer do not ascend"))?;
        if self.list.push(piece) { Ok(()) } else { Err(IndexError::Limit("a file has too many pieces")) }
    }

    fn end_span(&mut self, next: u64) -> Result<(), IndexError> {
        let list = std::mem::take(&mut self.list).into_bytes();
        let window = zstd::bulk::compress(&list, 6).map_err(IndexError::Sink)?;
        self.done.push(SpanRecord {
            compressed_offset: self.start.0.into(),
            tar_offset: self.start.1.into(),
            window_offset: (self.windows.len() as u64).into(),
            window_len: (window.len() as u32).into(),
            bits: 0,
            kind: self.kind as u8,
            reserved: [0; 2],
        });
        self.windows.extend_from_slice(&window);
        self.start = (next, self.tar);
        Ok(())
    }

    fn finish(mut self, end: u64) -> Result<(Vec<SpanRecord>, Vec<u8>), IndexError> {
        self.end_piece(end)?;
        self.end_span(end)?;
        Ok((self.done, self.windows))
    }
}

/// The content of the file `name` in a gzip-compressed tar, at most `limit` bytes.
pub(super) fn tar_file(gzip: &[u8], name: &[u8], limit: u64) -> Result<Option<Vec<u8>>, IndexError> {
    let mut decoder = Decoder::new(Compression::Gzip)?;
    let mut parser = TarParser::new(false);
    let mut input = gzip;
    let mut found: Option<Vec<u8>> = None;
    let mut passed = 0;
    loop {
        let step = decoder.step(input)?;
        input = input.get(step.consumed..).unwrap_or(&[]);
        let mut tar = decoder.output();
        if step.consumed == 0 && tar.is_empty() && !step.boundary {
            return Ok(found);
        }
        passed += tar.len() as u64;
        // Two headers, padding and the end mark besides the file.
        if passed > limit + 64 * TAR_BLOCK as u64 {
            return Err(IndexError::Limit("its table of contents is too large"));
        }
        while !tar.is_empty() {
            let (consumed, step) = parser.step(tar)?;
            let (bytes, rest) = tar.split_at_checked(consumed).unwrap_or((tar, &[]));
            match step {
                Step::Entry(entry) if entry.path == name => found = Some(Vec::new()),
                Step::Entry(_) if found.is_some() => return Ok(found),
                Step::Content { .. } => {
                    if let Some(found) = &mut found {
                        found.extend_from_slice(bytes);
                    }
                }
                _ => {}
            }
            tar = rest;
        }
    }
}
