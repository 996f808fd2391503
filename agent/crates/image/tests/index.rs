//! The index against plain unpacking by other implementations (`tar`, `flate2`, `zstd`), over generated layers.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use proptest::prelude::*;
use sluice_image::decode::{Compression, DecodeError, Decoder, decode_span};
use sluice_image::entry::EntryKind;
use sluice_image::index::header::{HEADER_LEN, Section};
use sluice_image::index::{ContentSink, IndexError, IndexOptions, LayerIndex, LayerIndexer};
use zerocopy::IntoBytes;

/// A layer's local file in memory.
#[derive(Debug, Default)]
struct Memory(Vec<u8>);

impl ContentSink for Memory {
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let start = store_offset as usize;
        self.0.resize(self.0.len().max(start + bytes.len()), 0);
        self.0[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn rewind(&mut self, store_offset: u64) -> std::io::Result<()> {
        self.0.truncate(store_offset as usize);
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Packing {
    Plain,
    Gzip(u32),
    GzipMembers(usize),
    Zstd,
    ZstdFrames(usize),
}

fn pack(tar: &[u8], packing: Packing) -> Vec<u8> {
    let gzip = |bytes: &[u8], level| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        encoder.write_all(bytes).expect("compress");
        encoder.finish().expect("compress")
    };
    match packing {
        Packing::Plain => tar.to_vec(),
        Packing::Gzip(level) => gzip(tar, level),
        Packing::GzipMembers(len) => tar.chunks(len).flat_map(|part| gzip(part, 6)).collect(),
        Packing::Zstd => zstd::encode_all(tar, 3).expect("compress"),
        Packing::ZstdFrames(len) => {
            tar.chunks(len).flat_map(|part| zstd::encode_all(part, 3).expect("compress")).collect()
        }
    }
}

fn make_tar(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, name, content.as_slice()).expect("append");
    }
    builder.into_inner().expect("finish")
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes)))
}

fn options() -> IndexOptions {
    IndexOptions { chunk_size: 4096, span_compressed_bytes: 8192, span_tar_bytes: 32768 }
}

fn index(layer: &[u8], piece: usize) -> Result<(LayerIndex, Memory), IndexError> {
    let mut indexer = LayerIndexer::new(options(), Memory::default())?;
    for part in layer.chunks(piece) {
        indexer.push(part)?;
    }
    let (index, mut memory) = indexer.finish(&sha256(layer))?;
    memory.0.resize(index.header().store_size.get() as usize, 0);
    Ok((index, memory))
}

/// Everything that must hold of an index of `tar`, packed as `layer`.
fn check(files: &BTreeMap<String, Vec<u8>>, tar: &[u8], layer: &[u8], piece: usize) {
    let (index, memory) = index(layer, piece).expect("index");
    let header = *index.header();
    assert_eq!(header.diff_id_text(), sha256(tar));
    let toc_only = index.blob()[..header.toc_len() as usize].to_vec();
    let index = LayerIndex::from_blob(toc_only).expect("the table of contents is readable by itself");
    let mut seen = BTreeMap::new();
    for item in index.toc().expect("toc") {
        let item = item.expect("item");
        let entry = item.entry.expect("known kind");
        let EntryKind::File { size, store_offset } = entry.kind else { panic!("{entry:?}") };
        let content = memory.0[store_offset as usize..(store_offset + size) as usize].to_vec();
        seen.insert(String::from_utf8(entry.path).expect("utf-8"), content);
        for chunk in item.chunks {
            let start = chunk.store_offset.get() as usize;
            let bytes = &memory.0[start..start + chunk.len.get() as usize];
            assert_eq!(index.digest_algorithm().digest(bytes), chunk.digest);
        }
        for extent in item.extents {
            let (store, at, len) = (
                extent.store_offset.get() as usize,
                extent.tar_offset.get() as usize,
                extent.len.get() as usize,
            );
            assert_eq!(memory.0[store..store + len], tar[at..at + len]);
        }
    }
    assert_eq!(&seen, files);
    let mut again = Vec::new();
    index
        .replay_tar(
            |at, buffer| {
                buffer.copy_from_slice(&memory.0[at as usize..at as usize + buffer.len()]);
                Ok(())
            },
            |bytes| again.extend_from_slice(bytes),
        )
        .expect("replay");
    assert_eq!(again, tar);
    check_spans(tar, layer, piece);
}

fn check_spans(tar: &[u8], layer: &[u8], piece: usize) {
    let (index, _) = index(layer, piece).expect("index");
    let windows = index.header().windows.offset.get() as usize;
    for (number, span) in index.spans().iter().enumerate() {
        let start = span.tar_offset.get() as usize;
        let next = index.spans().get(number + 1);
        let end = next.map_or(tar.len(), |next| next.tar_offset.get() as usize);
        let from = span.compressed_offset.get() as usize;
        let to = next
            .map_or(layer.len(), |next| next.compressed_offset.get() as usize + usize::from(next.bits > 0));
        let window_at = windows + span.window_offset.get() as usize;
        let window = &index.blob()[window_at..window_at + span.window_len.get() as usize];
        let mut out = Vec::new();
        decode_span(span, window, &layer[from..to], (end - start) as u64, &mut out).expect("span");
        assert_eq!(out, tar[start..end], "span {number}");
    }
}

fn contents() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..3000),
        2 => (any::<u8>(), 0_usize..60_000).prop_map(|(byte, len)| vec![byte; len]),
        1 => (any::<u32>(), 1_usize..90_000).prop_map(|(seed, len)| {
            (0..len as u32).map(|at| (at.wrapping_mul(seed | 1) >> 21) as u8).collect()
        }),
        1 => Just(vec![7; 8192]),
    ]
}

fn packings() -> impl Strategy<Value = Packing> {
    prop_oneof![
        Just(Packing::Plain),
        (0_u32..=9).prop_map(Packing::Gzip),
        (500_usize..40_000).prop_map(Packing::GzipMembers),
        Just(Packing::Zstd),
        (500_usize..40_000).prop_map(Packing::ZstdFrames),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_index_describes_its_layer(
        files in prop::collection::btree_map("[a-z]{1,9}(/[a-z]{1,60}){0,3}x", contents(), 0..12),
        packing in packings(),
        piece in prop_oneof![Just(1_usize << 20), 1_usize..5000],
    ) {
        let tar = make_tar(&files);
        let layer = pack(&tar, packing);
        check(&files, &tar, &layer, piece);
    }

    #[test]
    fn a_damaged_blob_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<bool>()) {
        let files = BTreeMap::from([("a".to_owned(), vec![1; 9000]), ("b".to_owned(), vec![1; 9000])]);
        let (index, _) = index(&pack(&make_tar(&files), Packing::Gzip(6)), 4096).expect("index");
        let mut blob = index.blob().to_vec();
        let at = at.index(blob.len());
        if cut { blob.truncate(at) } else { blob[at] = value }
        if let Ok(index) = LayerIndex::from_blob(blob)
            && let Ok(toc) = index.toc()
        {
            prop_assert!(toc.take(100).count() <= 100);
        }
    }
}

#[test]
fn equal_contents_share_blocks() {
    let files = BTreeMap::from([
        ("a".to_owned(), vec![1; 100_000]),
        ("b".to_owned(), vec![1; 100_000]),
        ("c".to_owned(), vec![2; 5]),
        ("d".to_owned(), vec![2; 5]),
    ]);
    let tar = make_tar(&files);
    let (index, _) = index(&tar, 999).expect("index");
    assert_eq!(index.header().store_size.get(), 25 * 4096 + 4096);
    check(&files, &tar, &tar, 10_000);
}

#[test]
fn sparse_files_of_gnu_tar_are_read() {
    let dir = tempfile::tempdir().expect("dir");
    let file = std::fs::File::create(dir.path().join("sparse")).expect("create");
    std::os::unix::fs::FileExt::write_all_at(&file, b"front", 0).expect("write");
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 5000], 300_000).expect("write");
    file.set_len(500_000).expect("length");
    let want = std::fs::read(dir.path().join("sparse")).expect("read");
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let out = std::process::Command::new("tar")
            .args(["-c", "-S", "-C"])
            .arg(dir.path())
            .args(format)
            .arg("sparse")
            .output()
            .expect("tar");
        assert!(out.status.success(), "{format:?}");
        assert!(out.stdout.len() < 100_000, "{format:?} is not sparse");
        check(
            &BTreeMap::from([("sparse".to_owned(), want.clone())]),
            &out.stdout,
            &pack(&out.stdout, Packing::Gzip(6)),
            4096,
        );
    }
}

#[test]
fn wrong_bytes_are_named() {
    let layer = pack(&make_tar(&BTreeMap::from([("a".to_owned(), vec![3; 50_000])])), Packing::Gzip(6));
    let mut indexer = LayerIndexer::new(options(), Memory::default()).expect("indexer");
    indexer.push(&layer).expect("push");
    let error = indexer.finish("sha256:00").expect_err("accepted");
    assert!(matches!(error, IndexError::LayerDigest { .. }), "{error}");
    let mut damaged = layer.clone();
    let last = damaged.len() - 6;
    damaged[last] ^= 1;
    let mut rest = Vec::new();
    assert!(flate2::read::GzDecoder::new(damaged.as_slice()).read_to_end(&mut rest).is_err());
    let mut indexer = LayerIndexer::new(options(), Memory::default()).expect("indexer");
    assert!(matches!(indexer.push(&damaged), Err(IndexError::Decode(_))));
}

/// All output of a decoder fed with pieces, or its error.
fn unpack(compression: Compression, layer: &[u8], piece: usize) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder::new(compression)?;
    let mut out = Vec::new();
    for mut input in layer.chunks(piece) {
        loop {
            let step = decoder.step(input)?;
            input = &input[step.consumed..];
            out.extend_from_slice(decoder.output());
            if step.consumed == 0 && decoder.output().is_empty() && !step.boundary {
                break;
            }
        }
    }
    decoder.finish()?;
    Ok(out)
}

/// What `gzip -dc` makes of `layer`: its exit status (2: a warning) and output.
fn gunzip(layer: &[u8]) -> (Option<i32>, Vec<u8>) {
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), layer).expect("write");
    let input = std::fs::File::open(file.path()).expect("open");
    let out = std::process::Command::new("gzip").arg("-dc").stdin(input).output().expect("gzip");
    (out.status.code(), out.stdout)
}

#[test]
fn after_the_last_gzip_member_only_zeros_may_follow() {
    let member = pack(b"content", Packing::Gzip(6));
    for (tail, accepted) in [
        (vec![], true),
        (vec![0], true),
        (vec![0; 1000], true),
        (member.clone(), true),
        ([member.clone(), vec![0; 5]].concat(), true),
        ([vec![0; 512], member.clone()].concat(), false),
        (vec![0, 1], false),
        (b"garbage".to_vec(), false),
        (vec![0x1f, 0x8b], false),
    ] {
        let layer = [member.clone(), tail.clone()].concat();
        let (status, theirs) = gunzip(&layer);
        assert_eq!(status == Some(0), accepted, "gzip, {tail:02x?}");
        for piece in [1, 3, member.len(), layer.len()] {
            let ours = unpack(Compression::Gzip, &layer, piece);
            assert_eq!(ours.is_ok(), accepted, "{piece} {tail:02x?}: {ours:?}");
            assert!(ours.is_err() || ours == Ok(theirs.clone()), "{piece} {tail:02x?}");
        }
    }
}

/// Replaces a section's frame and its claimed size; the rest of the blob follows.
fn with_files_section(index: &LayerIndex, frame: &[u8], raw_len: u64) -> Vec<u8> {
    let mut header = *index.header();
    let blob = index.blob();
    let part = |section: &Section| {
        blob[section.offset.get() as usize..section.end().expect("end") as usize].to_vec()
    };
    let parts = [
        part(&header.skeleton),
        frame.to_vec(),
        part(&header.digests),
        part(&header.spans),
        part(&header.windows),
    ];
    let mut offset = HEADER_LEN as u64;
    let sections = [
        &mut header.skeleton,
        &mut header.files,
        &mut header.digests,
        &mut header.spans,
        &mut header.windows,
    ];
    for (section, part) in sections.into_iter().zip(&parts) {
        section.offset = offset.into();
        section.len = (part.len() as u64).into();
        offset += part.len() as u64;
    }
    header.files.raw_len = raw_len.into();
    header.toc_digest = *blake3::hash(&parts[..4].concat()).as_bytes();
    [header.as_bytes(), &parts.concat()].concat()
}

#[test]
fn a_files_section_that_expands_far_is_refused_without_the_memory() {
    let files = BTreeMap::from([("a".to_owned(), vec![1; 9000]), ("b".to_owned(), vec![2; 9000])]);
    let (index, _) = index(&make_tar(&files), 4096).expect("index");
    let right = zstd::bulk::compress(&[0, 0], 1).expect("compress");
    for (frame, raw_len, accepted) in [
        (right.clone(), 2, true),
        (right.clone(), 1, false),
        (right.clone(), 3, false),
        // 1 GiB of zeros in some 30 KiB; and a claim of more than any machine has.
        (zstd::stream::encode_all(std::io::repeat(0).take(1 << 30), 1).expect("compress"), 1 << 30, false),
        (right, 8 << 30, false),
        (vec![1, 2, 3], 2, false),
    ] {
        let blob = with_files_section(&index, &frame, raw_len);
        let read = LayerIndex::from_blob(blob)
            .expect("a table")
            .toc()
            .map(|toc| toc.filter_map(Result::err).count());
        assert_eq!(matches!(read, Ok(0)), accepted, "{raw_len} {read:?}");
    }
    let peak = std::fs::read_to_string("/proc/self/status").expect("status");
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("peak");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("number");
    assert!(peak < 700 << 10, "{peak} KiB");
}

/// Found by fuzzing: the library also decodes formats from before zstd 1.0, differently by how the bytes are cut.
#[test]
fn frames_of_old_zstd_versions_are_refused() {
    let frame = zstd::encode_all(&b"content"[..], 3).expect("compress");
    let skippable = [0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9];
    let old = [0x27, 0xb5, 0x2f, 0xfd, 0x00, 0x58, 0x30, 0x00, 0x00];
    for (parts, want) in [
        (vec![&frame[..]], Some(1)),
        (vec![&frame[..], &skippable, &frame], Some(2)),
        (vec![&skippable[..], &frame], Some(1)),
        (vec![&old[..]], None),
        (vec![&frame[..], &old], None),
        (vec![&frame[..], &frame[..3]], None),
        (vec![&frame[..], &[0; 8]], None),
    ] {
        let layer = parts.concat();
        for piece in [1, 2, 5, layer.len()] {
            let ours = unpack(Compression::Zstd, &layer, piece);
            assert_eq!(ours.ok(), want.map(|count| b"content".repeat(count)), "{piece} {layer:02x?}");
        }
    }
}
