//! What the formats looked like when they were fixed: a small layer, its index and its EROFS image, in `fixtures/`. A change of
//! either is a new version of the format; `BLESS=1` writes the files anew.

use std::path::{Path, PathBuf};
use std::process::Command;

use sluice_image::erofs::{self, Form};
use sluice_image::index::header::{IndexHeader, Section};
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_image::merge::{MergeError, Tree};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The golden file; `made` becomes it when asked for.
fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(fixture(name), made).expect("write");
    }
    std::fs::read(fixture(name)).expect("a golden file")
}

fn index() -> LayerIndex {
    let layer = std::fs::read(fixture("layer.tar.gz")).expect("layer");
    let options = IndexOptions { chunk_size: 4096, span_compressed_bytes: 4096, span_tar_bytes: 16384 };
    let mut indexer = LayerIndexer::new(options, NoSink).expect("indexer");
    indexer.push(&layer).expect("push");
    let digest = ring::digest::digest(&ring::digest::SHA256, &layer);
    indexer.finish(&format!("sha256:{}", hex::encode(digest))).expect("index").0
}

fn raw(blob: &[u8], section: &Section) -> Vec<u8> {
    let bytes = &blob[section.offset.get() as usize..section.end().expect("end") as usize];
    zstd::bulk::decompress(bytes, section.raw_len.get() as usize).expect("a frame")
}

/// The header without what depends on the version of zstd: where sections stand, and their digest.
fn fixed_part(header: &IndexHeader) -> IndexHeader {
    let mut header = *header;
    header.toc_digest = [0; 32];
    for section in
        [&mut header.skeleton, &mut header.files, &mut header.digests, &mut header.spans, &mut header.windows]
    {
        *section = Section { raw_len: section.raw_len, ..Section::default() };
    }
    header.windows = Section::default();
    header
}

fn windows(index: &LayerIndex) -> Vec<Vec<u8>> {
    let start = index.header().windows.offset.get();
    let window = |at: u64, len: u32| &index.blob()[at as usize..at as usize + len as usize];
    index
        .spans()
        .iter()
        .filter(|span| span.window_len.get() > 0)
        .map(|span| window(start + span.window_offset.get(), span.window_len.get()))
        .map(|frame| zstd::bulk::decompress(frame, 1 << 15).expect("a frame"))
        .collect()
}

#[test]
fn the_stream_index_is_what_it_was() {
    let made = index();
    let golden = LayerIndex::from_blob(golden("layer.index", made.blob())).expect("an index");
    assert_eq!(fixed_part(made.header()), fixed_part(golden.header()));
    assert_eq!(raw(made.blob(), &made.header().skeleton), raw(golden.blob(), &golden.header().skeleton));
    assert_eq!(raw(made.blob(), &made.header().files), raw(golden.blob(), &golden.header().files));
    let spans = |index: &LayerIndex| -> Vec<_> {
        index
            .spans()
            .iter()
            .map(|span| (span.compressed_offset, span.tar_offset, span.bits, span.kind))
            .collect()
    };
    assert_eq!(spans(&made), spans(&golden));
    assert!(spans(&golden).len() > 2);
    // The golden index has windows whole, as the first indexes had them.
    let (made_windows, whole) = (windows(&made), windows(&golden));
    assert_eq!(made_windows.len(), whole.len());
    let fits = |(made, whole): (&u8, &u8)| *made == 0 || made == whole;
    assert!(made_windows.iter().flatten().zip(whole.iter().flatten()).all(fits), "a window differs");
    let toc = |index: &LayerIndex| index.toc().expect("toc").collect::<Result<Vec<_>, _>>().expect("items");
    assert_eq!(toc(&made), toc(&golden));
}

#[test]
fn the_erofs_image_is_what_it_was() {
    let index = index();
    let mut tree = Tree::new();
    let entries = index.entries().expect("entries").map(|entry| Ok(entry.expect("entry")));
    tree.apply::<MergeError>(entries).expect("merges");
    for (form, name) in [(Form::Devices, "layer.erofs"), (Form::OneDevice, "layer.one-device.erofs")] {
        let mut image = Vec::new();
        let blocks = index.header().store_size.get() / 4096;
        erofs::write(&tree, &[blocks], form, &mut image).expect("writes");
        assert!(image == golden(name, &image), "{name} differs");
        let mut command = Command::new("dump.erofs");
        if form == Form::Devices {
            command.arg(format!("--device={}", fixture("layer.tar.gz").display()));
        }
        let out = command.arg("-s").arg(fixture(name)).output().expect("dump.erofs (package erofs-utils)");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && text.contains("0xE0F5E1E2"), "{text}");
    }
}
