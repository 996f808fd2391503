//! Tables of contents that layers bring: the JSON text, the footer and annotations, and the lists of pieces that spans get.

use crate::decode::members;
use crate::index::{sha256, walk};
use sluice_image::index::embedded::EmbeddedToc;

/// Where contents of a layer end, as these tables have it.
const END: u64 = 1 << 20;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    match mode % 3 {
        0 => table(bytes),
        1 => found(bytes),
        _ => members(bytes),
    }
}

/// A zstd:chunked table whose digest is right.
fn table(text: &[u8]) {
    let bytes = zstd::bulk::compress(text, 1).expect("compress");
    let checksum = sha256(&bytes);
    let position = format!("{END}:{}:{}:1", bytes.len(), text.len());
    let annotation = |key: &str| match key {
        "io.github.containers.zstd-chunked.manifest-position" => Some(position.as_str()),
        "io.github.containers.zstd-chunked.manifest-checksum" => Some(checksum.as_str()),
        _ => None,
    };
    let toc = EmbeddedToc::find(annotation, END + bytes.len() as u64, &[]);
    let toc = toc.expect("right annotations").expect("a table");
    if let Ok(index) = toc.index(&bytes, &checksum, &checksum) {
        assert!(!index.has_own_tar());
        walk(&index);
        index.toc().expect("an index of ours").for_each(|item| drop(item.expect("an index of ours")));
    }
}

/// Any annotations, any tail, any table.
fn found(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.splitn(3, '\n');
    let (first, second) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    for names in [["manifest-position", "manifest-checksum"], ["toc.digest", "nothing"]] {
        let annotation = |key: &str| {
            let number = names.iter().position(|name| key.ends_with(name))?;
            [first, second].get(number).copied()
        };
        let size = bytes.len() as u64;
        if let Ok(Some(toc)) = EmbeddedToc::find(annotation, size, bytes) {
            let range = toc.range();
            assert!(range.end <= size && range.start < range.end);
            drop(toc.index(&bytes[range.start as usize..range.end as usize], second, second));
        }
    }
}
