//! Layers for the store's tests: an index, and the chunks that belong to it.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::print_stdout, reason = "the verdicts of tests without a harness")]

pub(crate) mod served;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use bytes::Bytes;
use sluice_image::index::{ContentSink, IndexOptions, LayerIndex, LayerIndexer};
use sluice_image::records::ChunkRecord;
use sluice_store::Layer;

pub(crate) const CHUNK: u32 = 65536;

/// A layer's local file in memory.
#[derive(Debug, Default)]
pub(crate) struct Memory(pub(crate) Vec<u8>);

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

pub(crate) struct Sample {
    pub(crate) index: LayerIndex,
    pub(crate) data: Vec<u8>,
    pub(crate) chunks: Vec<ChunkRecord>,
}

/// Bytes that do not repeat, another sequence for each `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// A layer of these files.
pub(crate) fn sample(files: &[Vec<u8>]) -> Sample {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, content) in files.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("file{number}"), content.as_slice()).expect("append");
    }
    let tar = builder.into_inner().expect("tar");
    let digest = format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, &tar)));
    let options = IndexOptions { chunk_size: CHUNK, span_compressed_bytes: 100_000, span_tar_bytes: 200_000 };
    let mut indexer = LayerIndexer::new(options, Memory::default()).expect("indexer");
    indexer.push(&tar).expect("push");
    let (index, memory) = indexer.finish(&digest).expect("finish");
    let mut data = memory.0;
    data.resize(index.header().store_size.get() as usize, 0);
    let chunks = index.toc().expect("toc").flat_map(|item| item.expect("item").chunks).collect();
    Sample { index, data, chunks }
}

impl Sample {
    pub(crate) fn digest(&self) -> String {
        self.index.header().layer_digest_text()
    }

    pub(crate) fn bytes(&self, chunk: &ChunkRecord) -> Bytes {
        let start = chunk.store_offset.get() as usize;
        Bytes::copy_from_slice(&self.data[start..start + chunk.len.get() as usize])
    }

    /// Puts chunks into the layer; how many were kept.
    pub(crate) fn insert(&self, layer: &Layer, chunks: &[ChunkRecord], urgent: bool) -> usize {
        chunks.iter().filter(|chunk| layer.insert_verified(chunk, &self.bytes(chunk), urgent)).count()
    }

    /// Reads a chunk back and compares it; whether it was there.
    pub(crate) fn check(&self, layer: &Layer, chunk: &ChunkRecord) -> bool {
        let mut buffer = vec![0xAA; chunk.len.get() as usize];
        let here = layer.try_read(chunk.store_offset.get(), &mut buffer).expect("read");
        assert!(!here || buffer == self.bytes(chunk), "wrong bytes at {}", chunk.store_offset.get());
        here
    }
}

/// A file system of its own in a file, unmounted when dropped.
pub(crate) struct Disk {
    pub(crate) dir: PathBuf,
    _files: tempfile::TempDir,
}

impl Disk {
    /// ext4, of so many bytes.
    pub(crate) fn ext4(bytes: u64) -> Self {
        let files = tempfile::tempdir().expect("dir");
        let (image, dir) = (files.path().join("image"), files.path().join("mnt"));
        std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("image");
        std::fs::create_dir(&dir).expect("dir");
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0", "-b", "4096", "-J", "size=4"])
            .arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir));
        Self { dir, _files: files }
    }

    /// tmpfs, of so many bytes.
    pub(crate) fn tmpfs(bytes: u64) -> Self {
        let files = tempfile::tempdir().expect("dir");
        let dir = files.path().join("mnt");
        std::fs::create_dir(&dir).expect("dir");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "none"]).arg(&dir));
        Self { dir, _files: files }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.dir));
    }
}

pub(crate) fn run(command: &mut Command) {
    output(command);
}

/// What a command says, without the last line's end.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().expect("started");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
}

/// The tests of a program without a harness: those whose names hold one of the arguments, all without arguments.
pub(crate) fn run_cases(cases: &[(&str, fn())]) -> ExitCode {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, case) in cases {
        if wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str())) {
            case();
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}
