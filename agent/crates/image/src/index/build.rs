//! Makes an index in one pass over a layer, and hands the contents to a sink on the way.
//!
//! The two SHA-256 digests run on a thread of their own, beside decoding, parsing and chunk digests.

use std::collections::HashMap;
use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use zerocopy::IntoBytes;

use super::header::{HEADER_LEN, IndexHeader, MAGIC, Section, VERSION};
use super::layout::{Layout, chunks};
use super::{IndexError, LayerIndex};
use crate::decode::{Checkpoint, Compression, Decoder, MAX_SPAN};
use crate::records::{CHUNK_SIZE, DigestAlgorithm, LAYOUT_VERSION, SpanKind, SpanRecord};
use crate::tar::{Content, Step, TarEntry, TarKind, TarParser};

/// Receives the contents of a layer's files, by store offset, ascending but for rewinds.
pub trait ContentSink {
    /// Content at `store_offset`; what is never written is zero.
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> std::io::Result<()>;
    /// What was written at or after `store_offset` was a copy of an earlier file: it is to be zero again.
    fn rewind(&mut self, store_offset: u64) -> std::io::Result<()>;
}

/// Takes contents and forgets them: for `sluice index`.
#[derive(Debug, Default)]
pub struct NoSink;

impl ContentSink for NoSink {
    fn write(&mut self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn rewind(&mut self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// How an index is made.
#[derive(Debug, Clone, Copy)]
pub struct IndexOptions {
    /// Bytes a chunk covers at most; a power of two.
    pub chunk_size: u32,
    /// A checkpoint is taken once a span has this many compressed bytes…
    pub span_compressed_bytes: u64,
    /// …or this many of tar.
    pub span_tar_bytes: u64,
}

impl Default for IndexOptions {
    /// Spacing found by measurement: an index stays below 1.5 % of Debian's layers.
    fn default() -> Self {
        Self { chunk_size: CHUNK_SIZE, span_compressed_bytes: 2 << 20, span_tar_bytes: 5 << 20 }
    }
}

/// See the module text.
#[derive(Debug)]
pub struct LayerIndexer<S> {
    options: IndexOptions,
    head: Vec<u8>,
    compression: Compression,
    decoder: Option<Decoder>,
    hashing: Hashing,
    contents: Contents<S>,
    parser: TarParser,
    spans: Vec<SpanRecord>,
    windows: Vec<u8>,
    random_access: bool,
    compressed: u64,
    tar: u64,
}

impl<S: ContentSink> LayerIndexer<S> {
    /// Begins a layer.
    pub fn new(options: IndexOptions, sink: S) -> Result<Self, IndexError> {
        Ok(Self {
            options,
            head: Vec::new(),
            compression: Compression::None,
            decoder: None,
            hashing: Hashing::start()?,
            contents: Contents::new(options.chunk_size, sink)?,
            parser: TarParser::new(false),
            spans: Vec::new(),
            windows: Vec::new(),
            random_access: true,
            compressed: 0,
            tar: 0,
        })
    }

    /// The next bytes of the layer blob.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.hashing.compressed(bytes);
        self.compressed += bytes.len() as u64;
        if self.decoder.is_some() {
            return self.decode(bytes);
        }
        self.head.extend_from_slice(bytes);
        if self.head.len() < 4 { Ok(()) } else { self.begin() }
    }

    fn begin(&mut self) -> Result<(), IndexError> {
        self.compression = Compression::sniff(&self.head);
        self.decoder = Some(Decoder::new(self.compression)?);
        self.spans.push(SpanRecord {
            compressed_offset: 0.into(),
            tar_offset: 0.into(),
            window_offset: 0.into(),
            window_len: 0.into(),
            bits: 0,
            kind: match self.compression {
                Compression::None => SpanKind::Plain,
                Compression::Gzip => SpanKind::GzipMember,
                Compression::Zstd => SpanKind::ZstdFrame,
            } as u8,
            reserved: [0; 2],
        });
        let head = std::mem::take(&mut self.head);
        self.decode(&head)
    }

    fn decode(&mut self, mut input: &[u8]) -> Result<(), IndexError> {
        let Some(mut decoder) = self.decoder.take() else { return Ok(()) };
        loop {
            let step = decoder.step(input)?;
            input = input.get(step.consumed..).unwrap_or(&[]);
            let output = decoder.output();
            self.tar += output.len() as u64;
            self.hashing.tar(output);
            self.contents.parse(&mut self.parser, output)?;
            if step.boundary {
                self.offer_checkpoint(&decoder)?;
            } else if step.consumed == 0 && output.is_empty() {
                break;
            }
        }
        self.decoder = Some(decoder);
        Ok(())
    }

    fn offer_checkpoint(&mut self, decoder: &Decoder) -> Result<(), IndexError> {
        let Some(last) = self.spans.last() else { return Ok(()) };
        let tar = self.tar - last.tar_offset.get();
        // The decoder may be behind what was pushed; the checkpoint's own offset decides.
        if tar < self.options.span_tar_bytes / 8 {
            return Ok(());
        }
        let enough = |compressed: u64| {
            tar >= self.options.span_tar_bytes || compressed >= self.options.span_compressed_bytes
        };
        let Some(checkpoint) = decoder.checkpoint() else { return Ok(()) };
        if enough(checkpoint.compressed_offset - last.compressed_offset.get()) {
            self.random_access &= tar <= MAX_SPAN;
            self.take_checkpoint(checkpoint)?;
        }
        Ok(())
    }

    fn take_checkpoint(&mut self, checkpoint: Checkpoint) -> Result<(), IndexError> {
        let window = match &checkpoint.window {
            Some(window) => zstd::bulk::compress(window, 6).map_err(IndexError::Sink)?,
            None => Vec::new(),
        };
        self.spans.push(SpanRecord {
            compressed_offset: checkpoint.compressed_offset.into(),
            tar_offset: self.tar.into(),
            window_offset: (self.windows.len() as u64).into(),
            window_len: (window.len() as u32).into(),
            bits: checkpoint.bits,
            kind: checkpoint.kind as u8,
            reserved: [0; 2],
        });
        self.windows.extend_from_slice(&window);
        Ok(())
    }

    /// Ends the layer. `expected` is its digest in the manifest, `sha256:…`.
    pub fn finish(mut self, expected: &str) -> Result<(LayerIndex, S), IndexError> {
        if self.decoder.is_none() && !self.head.is_empty() {
            self.begin()?;
        }
        let digests = self.hashing.finish();
        let actual = format!("sha256:{}", hex::encode(digests.compressed));
        if actual != expected {
            return Err(IndexError::LayerDigest { expected: expected.to_owned(), actual });
        }
        if let Some(decoder) = &self.decoder {
            decoder.finish()?;
        }
        self.parser.finish()?;
        let last_span = self.spans.last().map_or(0, |span| self.tar - span.tar_offset.get());
        let random_access = self.random_access && last_span <= MAX_SPAN;
        let contents = self.contents;
        let store_size = contents.layout.next();
        let entry_count = contents.entries;
        let (sections, sink) = contents.finish()?;
        let mut header = IndexHeader {
            magic: MAGIC,
            version: VERSION.into(),
            layout_version: LAYOUT_VERSION.into(),
            compression: self.compression as u8,
            digest_algorithm: DigestAlgorithm::Blake3 as u8,
            random_access: u8::from(random_access),
            reserved: 0,
            chunk_size: self.options.chunk_size.into(),
            reserved2: 0.into(),
            layer_size: self.compressed.into(),
            tar_size: self.tar.into(),
            store_size: store_size.into(),
            layer_digest: digests.compressed,
            diff_id: digests.tar,
            entry_count: entry_count.into(),
            chunk_count: (sections.digests.len() as u64 / 32).into(),
            toc_digest: [0; 32],
            skeleton: Section::default(),
            files: Section::default(),
            digests: Section::default(),
            spans: Section::default(),
            windows: Section::default(),
        };
        let blob = assemble(&mut header, sections, self.spans, &self.windows)?;
        Ok((LayerIndex::from_blob(blob)?, sink))
    }
}

/// Puts the sections behind the header.
fn assemble(
    header: &mut IndexHeader,
    sections: Sections,
    spans: Vec<SpanRecord>,
    windows: &[u8],
) -> Result<Vec<u8>, IndexError> {
    let spans_len = spans.as_slice().as_bytes().len();
    let spans = zstd::bulk::compress(spans.as_slice().as_bytes(), 6).map_err(IndexError::Sink)?;
    let mut offset = HEADER_LEN as u64;
    let mut place = |len: usize, raw: u64| {
        let section = Section { offset: offset.into(), len: (len as u64).into(), raw_len: raw.into() };
        offset += len as u64;
        section
    };
    header.skeleton = place(sections.skeleton.len(), sections.skeleton_raw);
    header.files = place(sections.files.len(), sections.files_raw);
    header.digests = place(sections.digests.len(), sections.digests.len() as u64);
    header.spans = place(spans.len(), spans_len as u64);
    header.windows = place(windows.len(), windows.len() as u64);
    let mut digest = blake3::Hasher::new();
    for part in [&sections.skeleton, &sections.files, &sections.digests, &spans] {
        digest.update(part);
    }
    header.toc_digest = *digest.finalize().as_bytes();
    Ok([header.as_bytes(), &sections.skeleton, &sections.files, &sections.digests, &spans, windows].concat())
}

/// The sections that come from the tar.
struct Sections {
    skeleton: Vec<u8>,
    skeleton_raw: u64,
    files: Vec<u8>,
    files_raw: u64,
    digests: Vec<u8>,
}

/// Files, chunks and skeleton of the tar that passes.
struct Contents<S> {
    sink: S,
    layout: Layout,
    chunk_size: u32,
    skeleton: zstd::stream::write::Encoder<'static, Vec<u8>>,
    skeleton_raw: u64,
    files: Vec<u8>,
    digests: Vec<u8>,
    known: HashMap<[u8; 32], u64>,
    open: Option<OpenFile>,
    entries: u64,
}

impl<S> std::fmt::Debug for Contents<S> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Contents").field("entries", &self.entries).finish_non_exhaustive()
    }
}

/// The file whose content passes.
struct OpenFile {
    content: Content,
    store_offset: u64,
    /// Bytes of the file that are in finished chunks.
    done: u64,
    chunk: Vec<u8>,
    first_digest: usize,
    written: bool,
}

impl<S: ContentSink> Contents<S> {
    fn new(chunk_size: u32, sink: S) -> Result<Self, IndexError> {
        Ok(Self {
            sink,
            layout: Layout::default(),
            chunk_size,
            skeleton: zstd::stream::write::Encoder::new(Vec::new(), 6).map_err(IndexError::Sink)?,
            skeleton_raw: 0,
            files: Vec::new(),
            digests: Vec::new(),
            known: HashMap::new(),
            open: None,
            entries: 0,
        })
    }

    fn parse(&mut self, parser: &mut TarParser, mut tar: &[u8]) -> Result<(), IndexError> {
        while !tar.is_empty() {
            let (consumed, step) = parser.step(tar)?;
            let (bytes, rest) = tar.split_at_checked(consumed).unwrap_or((tar, &[]));
            match step {
                Step::Content { offset } => self.content(offset, bytes)?,
                Step::Skeleton => self.meta(bytes)?,
                Step::Entry(entry) => {
                    self.meta(bytes)?;
                    self.entry(*entry)?;
                }
            }
            tar = rest;
        }
        Ok(())
    }

    fn meta(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.close_when_full()?;
        self.skeleton_raw += bytes.len() as u64;
        self.skeleton.write_all(bytes).map_err(IndexError::Sink)
    }

    fn entry(&mut self, entry: TarEntry) -> Result<(), IndexError> {
        self.entries += 1;
        if let TarKind::File(content) = entry.kind
            && content.size > 0
        {
            // Before a hole of any size is filled with zeros.
            self.layout.check(content.size)?;
            self.open = Some(OpenFile {
                store_offset: self.layout.next(),
                done: 0,
                chunk: Vec::new(),
                first_digest: self.digests.len(),
                written: false,
                content,
            });
            self.close_when_full()?;
        }
        Ok(())
    }

    fn content(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), IndexError> {
        self.fill_hole(offset)?;
        while !bytes.is_empty() {
            let chunk_size = self.chunk_size as usize;
            let Some(open) = &mut self.open else {
                return Err(IndexError::Corrupt("content without a file"));
            };
            let taken = bytes.len().min(chunk_size - open.chunk.len());
            let (now, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
            open.chunk.extend_from_slice(now);
            bytes = rest;
            if open.chunk.len() == chunk_size {
                self.end_chunk()?;
            }
        }
        self.close_when_full()
    }

    /// Zeros up to `offset` of the open file: a hole of a sparse one.
    fn fill_hole(&mut self, offset: u64) -> Result<(), IndexError> {
        loop {
            let chunk_size = self.chunk_size as usize;
            let Some(open) = &mut self.open else { return Ok(()) };
            let gap = offset.saturating_sub(open.done + open.chunk.len() as u64);
            if gap == 0 {
                return Ok(());
            }
            let taken = (chunk_size - open.chunk.len()).min(usize::try_from(gap).unwrap_or(usize::MAX));
            open.chunk.resize(open.chunk.len() + taken, 0);
            if open.chunk.len() == chunk_size {
                self.end_chunk()?;
            }
        }
    }

    fn end_chunk(&mut self) -> Result<(), IndexError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        self.digests.extend_from_slice(&DigestAlgorithm::Blake3.digest(&open.chunk));
        let at = open.store_offset + open.done;
        open.done += open.chunk.len() as u64;
        // A file of one chunk is written only once it is known to be new.
        let only = open.done == open.content.size && open.first_digest + 32 == self.digests.len();
        if !only {
            open.written = true;
            self.sink.write(at, &open.chunk).map_err(IndexError::Sink)?;
            open.chunk.clear();
        }
        Ok(())
    }

    /// Ends the open file if all its stored bytes have passed.
    fn close_when_full(&mut self) -> Result<(), IndexError> {
        let Some(open) = &self.open else { return Ok(()) };
        let last_stored = open.content.segments().last().map_or(0, |(offset, len)| offset + len);
        let passed = open.done + if open.done == open.content.size { 0 } else { open.chunk.len() as u64 };
        if passed < last_stored {
            return Ok(());
        }
        let size = open.content.size;
        self.fill_hole(size)?;
        if self.open.as_ref().is_some_and(|open| open.done < size) {
            self.end_chunk()?;
        }
        let Some(open) = self.open.take() else { return Ok(()) };
        let mut key = blake3::Hasher::new();
        key.update(&size.to_le_bytes());
        key.update(self.digests.get(open.first_digest..).unwrap_or(&[]));
        let key = *key.finalize().as_bytes();
        if let Some(number) = self.known.get(&key) {
            put_varint(&mut self.files, number + 1);
            self.digests.truncate(open.first_digest);
            if open.written {
                self.sink.rewind(open.store_offset).map_err(IndexError::Sink)?;
            }
            return Ok(());
        }
        put_varint(&mut self.files, 0);
        self.known.insert(key, self.layout.own_count());
        debug_assert_eq!(
            chunks(size, 0, self.chunk_size).count() * 32,
            self.digests.len() - open.first_digest
        );
        if !open.written {
            self.sink.write(open.store_offset, &open.chunk).map_err(IndexError::Sink)?;
        }
        self.layout.place(size)?;
        Ok(())
    }

    fn finish(self) -> Result<(Sections, S), IndexError> {
        let skeleton = self.skeleton.finish().map_err(IndexError::Sink)?;
        let files = zstd::bulk::compress(&self.files, 6).map_err(IndexError::Sink)?;
        let sections = Sections {
            skeleton,
            skeleton_raw: self.skeleton_raw,
            files_raw: self.files.len() as u64,
            files,
            digests: self.digests,
        };
        Ok((sections, self.sink))
    }
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes handed to the digest thread at a time.
const HASH_PIECE: usize = 256 * 1024;

/// The digest thread and its queue.
#[derive(Debug)]
struct Hashing {
    compressed: Vec<u8>,
    tar: Vec<u8>,
    queue: Option<SyncSender<(bool, Vec<u8>)>>,
    spare: Receiver<Vec<u8>>,
    thread: std::thread::JoinHandle<LayerDigests>,
}

/// SHA-256 of the blob and of the tar.
#[derive(Debug, Default)]
struct LayerDigests {
    compressed: [u8; 32],
    tar: [u8; 32],
}

impl Hashing {
    fn start() -> Result<Self, IndexError> {
        let (queue, pieces) = sync_channel::<(bool, Vec<u8>)>(8);
        let (give_back, spare) = sync_channel(8);
        let digests = move || {
            let mut contexts = [
                ring::digest::Context::new(&ring::digest::SHA256),
                ring::digest::Context::new(&ring::digest::SHA256),
            ];
            for (is_tar, mut piece) in pieces {
                if let Some(context) = contexts.get_mut(usize::from(is_tar)) {
                    context.update(&piece);
                }
                piece.clear();
                // Nobody may want the buffer back any more.
                drop(give_back.try_send(piece));
            }
            let [compressed, tar] = contexts.map(|context| {
                let mut digest = [0; 32];
                digest.copy_from_slice(context.finish().as_ref());
                digest
            });
            LayerDigests { compressed, tar }
        };
        let thread = std::thread::Builder::new().name("layer-digests".to_owned()).spawn(digests);
        let thread = thread.map_err(IndexError::Thread)?;
        Ok(Self { compressed: Vec::new(), tar: Vec::new(), queue: Some(queue), spare, thread })
    }

    fn compressed(&mut self, bytes: &[u8]) {
        self.compressed.extend_from_slice(bytes);
        if self.compressed.len() >= HASH_PIECE {
            let spare = self.spare();
            let piece = std::mem::replace(&mut self.compressed, spare);
            self.send(false, piece);
        }
    }

    fn tar(&mut self, bytes: &[u8]) {
        self.tar.extend_from_slice(bytes);
        if self.tar.len() >= HASH_PIECE {
            let spare = self.spare();
            let piece = std::mem::replace(&mut self.tar, spare);
            self.send(true, piece);
        }
    }

    fn spare(&self) -> Vec<u8> {
        self.spare.try_recv().unwrap_or_default()
    }

    fn send(&self, is_tar: bool, piece: Vec<u8>) {
        if let Some(queue) = &self.queue {
            // The thread ends only when the queue is dropped, or by a panic, which `finish` passes on.
            drop(queue.send((is_tar, piece)));
        }
    }

    fn finish(mut self) -> LayerDigests {
        let (compressed, tar) = (std::mem::take(&mut self.compressed), std::mem::take(&mut self.tar));
        self.send(false, compressed);
        self.send(true, tar);
        self.queue = None;
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_digest_thread_is_not_taken_for_digests() {
        let (queue, pieces) = sync_channel(8);
        let (_give_back, spare) = sync_channel(8);
        let thread = std::thread::spawn(move || -> LayerDigests {
            drop(pieces);
            panic!("the digest thread is broken")
        });
        let mut hashing =
            Hashing { compressed: Vec::new(), tar: Vec::new(), queue: Some(queue), spare, thread };
        hashing.tar(&[1; 2 * HASH_PIECE]);
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hashing.finish()));
        assert!(finished.is_err(), "{finished:?}");
    }
}
