//! Index blobs made of fuzzed sections.

use crate::tar::fix_checksums;
use sluice_image::index::LayerIndex;
use sluice_image::index::header::{HEADER_LEN, IndexHeader, MAGIC, Section, VERSION, VERSION_LISTED};
use sluice_image::records::LAYOUT_VERSION;
use zerocopy::{FromBytes, IntoBytes};

/// Entries looked at per index.
const ENTRIES: usize = 10_000;

/// A blob whose sections are cut out of `data`, with a header that fits them but for the numbers that `data` gives.
///
/// `data`: three 16-bit section lengths (skeleton, files, spans), then sizes (tar, store, chunk count, entries; 32 bits
/// each), then the sections; the rest is digests.
pub fn blob(data: &[u8]) -> Vec<u8> {
    let mut rest = data;
    let mut number = |len: usize| {
        let (now, after) = rest.split_at(rest.len().min(len));
        rest = after;
        now.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let lens = [number(2), number(2), number(2)];
    let (tar_size, blocks, chunks, entries) = (number(4), number(4), number(2), number(4));
    // The highest bit says that chunks are listed.
    let (listed, entries) = (entries >> 31 == 1, entries & 0x7fff_ffff);
    let layer_size = number(4);
    let mut cut = |len: u64| {
        let (now, after) = rest.split_at(rest.len().min(len as usize));
        rest = after;
        now
    };
    let mut raw = lens.map(|len| cut(len).to_vec());
    fix_checksums(&mut raw[0]);
    // Many digests cost much and find nothing.
    let chunks = chunks % 1024;
    let digests: Vec<u8> =
        rest.iter().copied().cycle().take(if rest.is_empty() { 0 } else { chunks as usize * 32 }).collect();
    let frames = raw.clone().map(|raw| zstd::bulk::compress(&raw, 1).expect("compress"));
    let [skeleton_raw, files_raw, spans_raw] = raw.map(|raw| raw.len() as u64);
    let [skeleton, files, spans] = frames;
    let mut header = IndexHeader::read_from_bytes(&[0; HEADER_LEN]).expect("a header of zeros");
    header.magic = MAGIC;
    header.version = if listed { VERSION_LISTED } else { VERSION }.into();
    header.layout_version = LAYOUT_VERSION.into();
    header.compression = 1;
    header.digest_algorithm = 1;
    header.random_access = 1;
    header.chunk_size = 4096.into();
    header.layer_size = layer_size.into();
    header.tar_size = tar_size.into();
    header.store_size = (blocks * 4096).into();
    header.entry_count = entries.into();
    header.chunk_count = (digests.len() as u64 / 32).into();
    let mut offset = HEADER_LEN as u64;
    let mut place = |len: usize, raw_len: u64| {
        let section = Section { offset: offset.into(), len: (len as u64).into(), raw_len: raw_len.into() };
        offset += len as u64;
        section
    };
    header.skeleton = place(skeleton.len(), skeleton_raw);
    header.files = place(files.len(), files_raw);
    header.digests = place(digests.len(), digests.len() as u64);
    header.spans = place(spans.len(), spans_raw);
    header.windows = place(0, 0);
    with_toc_digest([header.as_bytes(), &skeleton, &files, &digests, &spans].concat())
}

/// Puts the right digest of the table of contents into a blob that has a header.
pub fn with_toc_digest(mut blob: Vec<u8>) -> Vec<u8> {
    let Ok((header, _)) = IndexHeader::read_from_prefix(&blob) else { return blob };
    let Some(end) = header.spans.end().and_then(|end| usize::try_from(end).ok()) else { return blob };
    let Some(digest) = blob.get(HEADER_LEN..end).map(blake3::hash) else { return blob };
    if let Ok((header, _)) = IndexHeader::mut_from_prefix(&mut blob) {
        header.toc_digest = *digest.as_bytes();
    }
    blob
}

/// Reads everything; offsets must stay inside what the header says.
pub fn walk(index: &LayerIndex) {
    let header = *index.header();
    let Ok(toc) = index.toc() else { return };
    let (mut store, mut tar) = (0, 0);
    for item in toc.take(ENTRIES) {
        let Ok(item) = item else { return };
        for chunk in item.chunks.iter().take(ENTRIES) {
            assert!(chunk.store_offset.get() >= store, "chunks ascend");
            store = chunk.store_offset.get() + u64::from(chunk.len.get());
            assert!(chunk.len.get() > 0 && chunk.len.get() <= header.chunk_size.get());
        }
        for extent in item.extents.iter().take(ENTRIES) {
            assert!(extent.tar_offset.get() >= tar, "extents ascend");
            tar = extent.tar_offset.get() + extent.len.get();
            assert!(tar <= header.tar_size.get());
        }
    }
}

/// `sha256:…` of `bytes`.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = sluice_image::records::DigestAlgorithm::Sha256.digest(bytes);
    digest.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}
