//! The fixed-size header at the front of an index blob.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::IndexError;
use crate::records::DigestAlgorithm;

/// First bytes of an index blob.
pub const MAGIC: [u8; 8] = *b"SLUICEIX";
/// Version of the format.
pub const VERSION: u16 = 1;
/// Version of indexes made from a layer's own table of contents. The files section lists the chunks of each file with content of
/// its own behind its 0: their number, then their lengths, all but the last multiples of the block size, none above
/// `chunk_size`. Spans are of the kinds that list pieces. The tar is a stand-in: see `embedded`.
pub const VERSION_LISTED: u16 = 2;
/// Bytes of the header.
pub const HEADER_LEN: usize = size_of::<IndexHeader>();
/// Largest table of contents accepted, in bytes, compressed.
pub const MAX_TOC: u64 = 512 << 20;
/// Largest section accepted once decompressed.
pub const MAX_SECTION: u64 = 8 << 30;

/// Where a section stands in the blob.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Section {
    /// From the blob's first byte.
    pub offset: U64,
    /// Bytes in the blob.
    pub len: U64,
    /// Bytes once decompressed.
    pub raw_len: U64,
}

impl Section {
    /// The byte after the section.
    pub fn end(&self) -> Option<u64> {
        self.offset.get().checked_add(self.len.get())
    }
}

/// The header. All numbers are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`] or [`VERSION_LISTED`].
    pub version: U16,
    /// [`crate::records::LAYOUT_VERSION`].
    pub layout_version: U16,
    /// [`crate::decode::Compression`].
    pub compression: u8,
    /// [`crate::records::DigestAlgorithm`].
    pub digest_algorithm: u8,
    /// 1 if decoding can begin at every span, 0 if the layer must be streamed in order.
    pub random_access: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes a chunk covers at most.
    pub chunk_size: U32,
    /// Zero.
    pub reserved2: U32,
    /// Bytes of the layer blob.
    pub layer_size: U64,
    /// Bytes of the uncompressed tar.
    pub tar_size: U64,
    /// Bytes of the layer's local file: a multiple of the block size.
    pub store_size: U64,
    /// SHA-256 of the layer blob.
    pub layer_digest: [u8; 32],
    /// SHA-256 of the uncompressed tar.
    pub diff_id: [u8; 32],
    /// Entries of the tar.
    pub entry_count: U64,
    /// Chunks of files with content of their own.
    pub chunk_count: U64,
    /// BLAKE3 of the blob from the header's end to the table of contents' end.
    pub toc_digest: [u8; 32],
    /// The tar without contents.
    pub skeleton: Section,
    /// Which files share content.
    pub files: Section,
    /// Digests of chunks.
    pub digests: Section,
    /// Span records.
    pub spans: Section,
    /// Windows of spans.
    pub windows: Section,
}

impl IndexHeader {
    /// Reads the header at the front of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let (header, _) =
            Self::read_from_prefix(bytes).map_err(|_cast| IndexError::Corrupt("shorter than its header"))?;
        if header.magic != MAGIC {
            return Err(IndexError::Corrupt("it does not begin with SLUICEIX"));
        }
        if ![VERSION, VERSION_LISTED].contains(&header.version.get()) {
            return Err(IndexError::Version { found: header.version.get(), supported: VERSION_LISTED });
        }
        if header.layout_version.get() != crate::records::LAYOUT_VERSION {
            return Err(IndexError::Corrupt("its layout version is not known here"));
        }
        header.check()?;
        Ok(header)
    }

    /// What digests chunks.
    pub fn digest_algorithm(&self) -> DigestAlgorithm {
        if self.digest_algorithm == DigestAlgorithm::Sha256 as u8 {
            DigestAlgorithm::Sha256
        } else {
            DigestAlgorithm::Blake3
        }
    }

    /// Bytes from the blob's front that a mount needs: all but the windows.
    pub fn toc_len(&self) -> u64 {
        self.spans.offset.get() + self.spans.len.get()
    }

    /// `sha256:…` of the layer.
    pub fn layer_digest_text(&self) -> String {
        format!("sha256:{}", hex::encode(self.layer_digest))
    }

    /// `sha256:…` of the uncompressed tar.
    pub fn diff_id_text(&self) -> String {
        format!("sha256:{}", hex::encode(self.diff_id))
    }

    fn check(&self) -> Result<(), IndexError> {
        let mut expected = HEADER_LEN as u64;
        for section in [&self.skeleton, &self.files, &self.digests, &self.spans, &self.windows] {
            if section.offset.get() != expected || section.raw_len.get() > MAX_SECTION {
                return Err(IndexError::Corrupt("its sections do not follow each other"));
            }
            expected = section.end().ok_or(IndexError::Corrupt("its sections overflow"))?;
        }
        if self.toc_len() > MAX_TOC {
            return Err(IndexError::Corrupt("its table of contents is too large"));
        }
        let chunk_size = self.chunk_size.get();
        if !chunk_size.is_power_of_two() || !(4096..=64 << 20).contains(&chunk_size) {
            return Err(IndexError::Corrupt("its chunk size is not a power of two from 4 KiB to 64 MiB"));
        }
        if self.digests.len.get() != self.chunk_count.get().saturating_mul(32) {
            return Err(IndexError::Corrupt("it has not one digest per chunk"));
        }
        if !self.store_size.get().is_multiple_of(crate::records::BLOCK_SIZE)
            || self.store_size.get() > super::layout::MAX_STORE_SIZE
        {
            return Err(IndexError::Corrupt("its store size is not possible"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_documented_size() {
        assert_eq!(HEADER_LEN, 8 + 8 + 8 + 24 + 64 + 16 + 32 + 5 * 24);
    }
}
