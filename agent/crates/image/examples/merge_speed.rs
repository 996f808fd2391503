//! Prints how long merging and writing a million entries takes, and how much memory: `cargo run --release --example merge_speed`.
#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::io::BufWriter;
use std::time::Instant;

use sluice_image::entry::{Entry, EntryKind, Timestamp};
use sluice_image::erofs::{self, Form, reader::Reader};
use sluice_image::merge::{MergeError, Tree};

const LAYERS: u64 = 10;
const FILES_PER_LAYER: u64 = 100_000;

fn file(layer: u64, number: u64) -> Result<Entry, MergeError> {
    Ok(Entry {
        path: format!("usr/share/package-{}/part-{}/file-{layer}-{number}.txt", number % 997, number % 13)
            .into_bytes(),
        kind: EntryKind::File { size: 4000, store_offset: number * 4096 },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 5 },
        xattrs: Vec::new(),
    })
}

fn peak_kib() -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let mut tree = Tree::new();
    for layer in 0..LAYERS {
        tree.apply::<MergeError>((0..FILES_PER_LAYER).map(|number| file(layer, number)))?;
    }
    let merged = start.elapsed();
    let target =
        std::env::args_os().nth(1).map_or_else(|| std::env::temp_dir().join("merge_speed.erofs"), Into::into);
    let blocks = vec![FILES_PER_LAYER; LAYERS as usize];
    let out = std::fs::File::create(&target)?;
    let written = erofs::write(&tree, &blocks, Form::Devices, &mut BufWriter::new(out))?;
    let all = start.elapsed();
    println!(
        "{} inodes, {} MiB: merged in {merged:.2?}, written in {:.2?}, together {all:.2?}; peak {} MiB",
        written.inodes,
        written.bytes >> 20,
        all - merged,
        peak_kib()? / 1024,
    );
    let start = Instant::now();
    let mut names = 0_u64;
    Reader::new(std::fs::File::open(&target)?, &written.layer_offsets)?.walk(&mut |_, _| names += 1)?;
    println!("{names} names walked by the reader in {:.2?}", start.elapsed());
    Ok(())
}
