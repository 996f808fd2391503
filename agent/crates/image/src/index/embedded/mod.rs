//! Tables of contents that layers bring themselves: eStargz and zstd:chunked, made into an index without reading the layer.
//!
//! eStargz (`stargz-snapshotter/docs/estargz.md`): a gzip layer whose last but one member is a tar with `stargz.index.json`, and
//! whose last, 51 bytes long, says where that begins. zstd:chunked (`containers/storage/pkg/chunked`): a zstd layer with
//! the same table in a skippable frame; annotations say where. Nothing here is trusted: the table's digest must stand in the
//! image's manifest, everything is bounded, and contents are verified by the SHA-256 digests that the table gives.
//!
//! Such a table lacks the tar's own headers. So the index has a *stand-in tar* made from it (index version 2), whose digest
//! says nothing: a complete layer is verified by its chunks alone, up to the manifest that names the table's digest.

mod build;
mod json;
mod stand_in;

use std::io::Read;
use std::ops::Range;

use super::{IndexError, LayerIndex};
use crate::decode::Compression;
use crate::records::DigestAlgorithm;

/// Bytes of the layer's end that [`EmbeddedToc::find`] wants to see.
pub const TAIL_LEN: u64 = 51;
/// Largest table accepted, in bytes, as it stands in the layer.
pub const MAX_TABLE: u64 = 64 << 20;
/// Largest table accepted, in bytes, decompressed.
pub const MAX_TABLE_RAW: u64 = 256 << 20;

const STARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
const STARGZ_FILE: &[u8] = b"stargz.index.json";
/// The prefix that `containers/storage` uses, and the one it used before.
const CHUNKED: [&str; 2] = ["io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."];

/// Where a layer's own table of contents stands, and what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedToc {
    compression: Compression,
    offset: u64,
    len: u64,
    layer_size: u64,
    /// SHA-256: of the JSON text (eStargz), or of the compressed table (zstd:chunked).
    digest: [u8; 32],
    /// zstd:chunked: bytes of the JSON text.
    raw_len: Option<u64>,
}

impl EmbeddedToc {
    /// Tells by the layer's annotations in the manifest and the last [`TAIL_LEN`] bytes of the layer (which only eStargz
    /// needs) whether there is a table whose digest the manifest has.
    pub fn find<'a>(
        annotation: impl Fn(&str) -> Option<&'a str>,
        layer_size: u64,
        tail: &[u8],
    ) -> Result<Option<Self>, IndexError> {
        let wrong = || IndexError::Corrupt("the layer's annotations about its table of contents are wrong");
        for prefix in CHUNKED {
            let (Some(position), Some(checksum)) = (
                annotation(&format!("{prefix}manifest-position")),
                annotation(&format!("{prefix}manifest-checksum")),
            ) else {
                continue;
            };
            let [offset, len, raw_len, kind] = numbers(position).ok_or_else(wrong)?;
            // The only type there is: the JSON table of CRFS.
            if kind != 1 {
                return Ok(None);
            }
            let toc = Self {
                compression: Compression::Zstd,
                offset,
                len,
                layer_size,
                digest: sha256(checksum).ok_or_else(wrong)?,
                raw_len: Some(raw_len),
            };
            return toc.checked().map(Some);
        }
        let Some(digest) = annotation(STARGZ_DIGEST) else { return Ok(None) };
        let Some(offset) = footer(tail) else { return Ok(None) };
        let toc = Self {
            compression: Compression::Gzip,
            offset,
            len: layer_size.saturating_sub(TAIL_LEN).saturating_sub(offset),
            layer_size,
            digest: sha256(digest).ok_or_else(wrong)?,
            raw_len: None,
        };
        toc.checked().map(Some)
    }

    /// Bytes of the layer that [`Self::index`] wants.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }

    /// The index of the layer, from the bytes at [`Self::range`]. `layer_digest` stands in the manifest, `diff_id` in the
    /// configuration (both `sha256:…`).
    pub fn index(&self, bytes: &[u8], layer_digest: &str, diff_id: &str) -> Result<LayerIndex, IndexError> {
        let text = self.text(bytes)?;
        let digests = [layer_digest, diff_id].map(sha256);
        let [Some(layer_digest), Some(diff_id)] = digests else {
            return Err(IndexError::Corrupt("the layer's digests are not SHA-256"));
        };
        let files = json::read(&text, self.offset)?;
        build::index(self, files, layer_digest, diff_id)
    }

    fn checked(self) -> Result<Self, IndexError> {
        let end = self.offset.checked_add(self.len);
        if end.is_none_or(|end| end > self.layer_size) || self.len == 0 {
            return Err(IndexError::Corrupt("the layer's table of contents lies outside the layer"));
        }
        if self.len > MAX_TABLE || self.raw_len.is_some_and(|len| len > MAX_TABLE_RAW) {
            return Err(IndexError::Limit("its table of contents is too large"));
        }
        Ok(self)
    }

    /// The table's JSON text, verified.
    fn text(&self, bytes: &[u8]) -> Result<Vec<u8>, IndexError> {
        let damaged = || IndexError::Corrupt("the layer's table of contents does not decompress");
        let mismatch = IndexError::Corrupt("the layer's table of contents is not the one the manifest names");
        let digest = |bytes: &[u8]| DigestAlgorithm::Sha256.digest(bytes);
        let mut text = Vec::new();
        if self.compression == Compression::Zstd {
            if digest(bytes) != self.digest {
                return Err(mismatch);
            }
            let decoder = zstd::stream::read::Decoder::new(bytes).map_err(|_io| damaged())?;
            let limit = self.raw_len.unwrap_or(MAX_TABLE_RAW);
            decoder.take(limit + 1).read_to_end(&mut text).map_err(|_io| damaged())?;
            return if text.len() as u64 == limit { Ok(text) } else { Err(damaged()) };
        }
        text = build::tar_file(bytes, STARGZ_FILE, MAX_TABLE_RAW)?.ok_or_else(damaged)?;
        if digest(&text) == self.digest { Ok(text) } else { Err(mismatch) }
    }
}

/// Where the table begins, from an eStargz footer: an empty gzip member with the offset in its extra field.
fn footer(tail: &[u8]) -> Option<u64> {
    let at = tail.len().checked_sub(usize::try_from(TAIL_LEN).ok()?)?;
    let rest = tail.get(at..)?.strip_prefix(&[0x1f, 0x8b, 8, 4])?;
    // Time, flags and system; then 26 bytes of extra field: subfield `SG` of 22 bytes.
    let extra = rest.get(6..)?.strip_prefix(&[26, 0, b'S', b'G', 22, 0])?;
    let (digits, rest) = extra.split_at_checked(16)?;
    if !rest.starts_with(b"STARGZ") {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

fn numbers(position: &str) -> Option<[u64; 4]> {
    let numbers: Vec<u64> = position.split(':').map(|text| text.parse().ok()).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

fn sha256(digest: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    hex::decode_to_slice(digest.strip_prefix("sha256:")?, &mut out).ok()?;
    Some(out)
}
