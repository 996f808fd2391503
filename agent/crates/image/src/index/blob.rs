//! Puts the sections of an index together, whoever made them.

use std::io::Write;

use zerocopy::IntoBytes;

use super::IndexError;
use super::header::{HEADER_LEN, IndexHeader, MAGIC, Section, VERSION, VERSION_LISTED};
use crate::decode::Compression;
use crate::records::{DigestAlgorithm, LAYOUT_VERSION, SpanRecord};

/// zstd level of the sections.
const LEVEL: i32 = 6;

/// The sections that come from the tar.
pub(super) struct Parts {
    skeleton: zstd::stream::write::Encoder<'static, Vec<u8>>,
    skeleton_raw: u64,
    /// Not compressed yet.
    pub(super) files: Vec<u8>,
    pub(super) digests: Vec<u8>,
}

impl Parts {
    pub(super) fn new() -> Result<Self, IndexError> {
        let skeleton = zstd::stream::write::Encoder::new(Vec::new(), LEVEL).map_err(IndexError::Sink)?;
        Ok(Self { skeleton, skeleton_raw: 0, files: Vec::new(), digests: Vec::new() })
    }

    /// The next bytes of the skeleton.
    pub(super) fn skeleton(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.skeleton_raw += bytes.len() as u64;
        self.skeleton.write_all(bytes).map_err(IndexError::Sink)
    }
}

/// What the header says besides the sections.
pub(super) struct Blob {
    /// The files section lists the chunks of each file; the tar is a stand-in.
    pub(super) listed_chunks: bool,
    pub(super) compression: Compression,
    pub(super) algorithm: DigestAlgorithm,
    pub(super) random_access: bool,
    pub(super) chunk_size: u32,
    pub(super) layer_size: u64,
    pub(super) tar_size: u64,
    pub(super) store_size: u64,
    pub(super) layer_digest: [u8; 32],
    pub(super) diff_id: [u8; 32],
    pub(super) entry_count: u64,
}

impl Blob {
    /// Header, sections, windows.
    pub(super) fn assemble(
        &self,
        parts: Parts,
        spans: &[SpanRecord],
        windows: &[u8],
    ) -> Result<Vec<u8>, IndexError> {
        let compress = |raw: &[u8]| zstd::bulk::compress(raw, LEVEL).map_err(IndexError::Sink);
        let (skeleton_raw, files_raw) = (parts.skeleton_raw, parts.files.len() as u64);
        let spans_raw = spans.as_bytes().len() as u64;
        let skeleton = parts.skeleton.finish().map_err(IndexError::Sink)?;
        let (files, digests, spans) = (compress(&parts.files)?, parts.digests, compress(spans.as_bytes())?);
        let mut offset = HEADER_LEN as u64;
        let mut place = |len: usize, raw: u64| {
            let section = Section { offset: offset.into(), len: (len as u64).into(), raw_len: raw.into() };
            offset += len as u64;
            section
        };
        let mut toc_digest = blake3::Hasher::new();
        for part in [&skeleton, &files, &digests, &spans] {
            toc_digest.update(part);
        }
        let header = IndexHeader {
            magic: MAGIC,
            version: if self.listed_chunks { VERSION_LISTED } else { VERSION }.into(),
            layout_version: LAYOUT_VERSION.into(),
            compression: self.compression as u8,
            digest_algorithm: self.algorithm as u8,
            random_access: u8::from(self.random_access),
            reserved: 0,
            chunk_size: self.chunk_size.into(),
            reserved2: 0.into(),
            layer_size: self.layer_size.into(),
            tar_size: self.tar_size.into(),
            store_size: self.store_size.into(),
            layer_digest: self.layer_digest,
            diff_id: self.diff_id,
            entry_count: self.entry_count.into(),
            chunk_count: (digests.len() as u64 / 32).into(),
            toc_digest: *toc_digest.finalize().as_bytes(),
            skeleton: place(skeleton.len(), skeleton_raw),
            files: place(files.len(), files_raw),
            digests: place(digests.len(), digests.len() as u64),
            spans: place(spans.len(), spans_raw),
            windows: place(windows.len(), windows.len() as u64),
        };
        Ok([header.as_bytes(), &skeleton, &files, &digests, &spans, windows].concat())
    }
}

/// What two files with the same content have in common.
pub(super) fn content_key(size: u64, digests: &[u8]) -> [u8; 32] {
    let mut key = blake3::Hasher::new();
    key.update(&size.to_le_bytes());
    key.update(digests);
    *key.finalize().as_bytes()
}
