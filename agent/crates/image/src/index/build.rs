//! Makes an index in one pass over a layer, and hands the contents to a sink on the way.

use super::blob::Blob;
use super::contents::{ContentSink, Contents};
use super::hashing::Hashing;
use super::window::OpenWindow;
use super::{IndexError, LayerIndex};
use crate::decode::{Checkpoint, Compression, Decoder, MAX_SPAN};
use crate::records::{CHUNK_SIZE, DigestAlgorithm, SpanKind, SpanRecord};
use crate::tar::TarParser;

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
    /// A read of one byte brings a span: half a MiB takes about as long on the wire as the request for it (1 Gbit/s and 2 ms,
    /// 200 Mbit/s and 20 ms). An index takes 0.7 % of Debian's layers then; half the spacing took 1.1 %, and a tenth longer to make.
    fn default() -> Self {
        Self { chunk_size: CHUNK_SIZE, span_compressed_bytes: 512 << 10, span_tar_bytes: 1280 << 10 }
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
    /// Windows of the last spans, until it is known what of them is used.
    open_windows: Vec<OpenWindow>,
    /// The last byte that was decoded.
    last: u8,
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
            open_windows: Vec::new(),
            last: 0,
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
            let (consumed, rest) = input.split_at_checked(step.consumed).unwrap_or((input, &[]));
            input = rest;
            let output = decoder.output();
            self.follow_windows(consumed, output.len())?;
            self.last = consumed.last().copied().unwrap_or(self.last);
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
            self.take_checkpoint(checkpoint);
        }
        Ok(())
    }

    fn take_checkpoint(&mut self, mut checkpoint: Checkpoint) {
        self.spans.push(SpanRecord {
            compressed_offset: checkpoint.compressed_offset.into(),
            tar_offset: self.tar.into(),
            window_offset: 0.into(),
            window_len: 0.into(),
            bits: checkpoint.bits,
            kind: checkpoint.kind as u8,
            reserved: [0; 2],
        });
        if let Some(window) = checkpoint.window.take() {
            let span = self.spans.len() - 1;
            self.open_windows.push(OpenWindow::new(span, &checkpoint, window, self.last));
        }
    }

    fn follow_windows(&mut self, consumed: &[u8], produced: usize) -> Result<(), IndexError> {
        let mut left = Vec::new();
        for mut window in std::mem::take(&mut self.open_windows) {
            if window.follow(consumed, produced) { self.close_window(window)? } else { left.push(window) }
        }
        self.open_windows = left;
        Ok(())
    }

    fn close_window(&mut self, window: OpenWindow) -> Result<(), IndexError> {
        let Some(span) = self.spans.get_mut(window.span) else { return Ok(()) };
        let frame = zstd::bulk::compress(&window.close(), 6).map_err(IndexError::Sink)?;
        span.window_offset = (self.windows.len() as u64).into();
        span.window_len = (frame.len() as u32).into();
        self.windows.extend_from_slice(&frame);
        Ok(())
    }

    /// Ends the layer. `expected` is its digest in the manifest, `sha256:…`.
    pub fn finish(mut self, expected: &str) -> Result<(LayerIndex, S), IndexError> {
        if self.decoder.is_none() && !self.head.is_empty() {
            self.begin()?;
        }
        for window in std::mem::take(&mut self.open_windows) {
            self.close_window(window)?;
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
        let blob = Blob {
            listed_chunks: false,
            compression: self.compression,
            algorithm: DigestAlgorithm::Blake3,
            random_access,
            chunk_size: self.options.chunk_size,
            layer_size: self.compressed,
            tar_size: self.tar,
            store_size: contents.layout.next(),
            layer_digest: digests.compressed,
            diff_id: digests.tar,
            entry_count: contents.entries,
        };
        let (parts, sink) = contents.finish();
        let blob = blob.assemble(parts, &self.spans, &self.windows)?;
        Ok((LayerIndex::from_blob(blob)?, sink))
    }
}
