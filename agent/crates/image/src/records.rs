//! Fixed-size little-endian records shared by the stream index and the layer store.
//!
//! A store offset is a byte offset in the layer's local file; see ARCHITECTURE.md, "The three address spaces".

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a block, the unit of the verified map and of EROFS addresses.
pub const BLOCK_SIZE: u64 = 4096;
/// Bytes of content that one chunk digest covers at most, by default.
pub const CHUNK_SIZE: u32 = 256 * 1024;
/// Version of the rule that places contents in the layer's file.
pub const LAYOUT_VERSION: u16 = 1;

/// What computes a chunk's digest. BLAKE3 in our own indexes, SHA-256 in eStargz and zstd:chunked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DigestAlgorithm {
    /// BLAKE3, 32 bytes of output.
    Blake3 = 1,
    /// SHA-256.
    Sha256 = 2,
}

impl DigestAlgorithm {
    /// Digest of `bytes`.
    pub fn digest(self, bytes: &[u8]) -> [u8; 32] {
        match self {
            Self::Blake3 => *blake3::hash(bytes).as_bytes(),
            Self::Sha256 => {
                let mut out = [0; 32];
                out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
                out
            }
        }
    }
}

/// One verified unit of content: `len` bytes at `store_offset`, with their digest. Sorted by `store_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkRecord {
    /// Where the content stands in the layer's file; a multiple of [`BLOCK_SIZE`].
    pub store_offset: U64,
    /// Bytes of content (not rounded up to blocks).
    pub len: U32,
    /// Zero.
    pub reserved: U32,
    /// Digest of exactly the `len` bytes.
    pub digest: [u8; 32],
}

/// `len` bytes that stand at `tar_offset` in the tar and at `store_offset` in the layer's file. Sorted by both.
/// Store bytes of a chunk that no extent covers are zero (holes of sparse files).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentRecord {
    /// Byte offset in the layer's file.
    pub store_offset: U64,
    /// Byte offset in the uncompressed tar.
    pub tar_offset: U64,
    /// Bytes.
    pub len: U64,
}

/// A place where decoding can begin. A span ends where the next begins (the last: at the ends of both streams).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SpanRecord {
    /// Byte of the layer blob at which to begin reading. When `bits` is not zero, the byte that holds the first unread bits.
    pub compressed_offset: U64,
    /// Tar offset of the first byte that comes out.
    pub tar_offset: U64,
    /// Where the window's zstd frame stands in the index blob's window section, if `window_len` is not zero.
    pub window_offset: U64,
    /// Bytes of that frame.
    pub window_len: U32,
    /// Deflate: how many low bits of the byte at `compressed_offset` were already consumed, 0–7.
    pub bits: u8,
    /// [`SpanKind`] as a number.
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// How decoding begins at a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SpanKind {
    /// Bytes are the tar's own.
    Plain = 0,
    /// Start of a gzip member (header included).
    GzipMember = 1,
    /// A deflate block inside a gzip member; needs the window.
    DeflateBlock = 2,
    /// Start of a zstd frame.
    ZstdFrame = 3,
    /// gzip members that the window lists ([`crate::decode::members`]); decoding cannot go on into the next span.
    GzipMembers = 4,
    /// zstd frames that the window lists, likewise.
    ZstdFrames = 5,
}
