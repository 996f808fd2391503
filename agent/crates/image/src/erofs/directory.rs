//! Directory blocks: entries at the front, names behind, sorted over the whole directory.

use std::collections::BTreeMap;

use super::format::DIRENT;
use crate::merge::Child;
use crate::records::BLOCK_SIZE;

/// How many of `sizes` (name lengths, in order) fit the first block, and the bytes they take.
fn fill_block(sizes: impl Iterator<Item = usize>) -> (usize, usize) {
    let mut used = 0;
    let mut count = 0;
    for size in sizes {
        if used + DIRENT + size > BLOCK_SIZE as usize {
            break;
        }
        used += DIRENT + size;
        count += 1;
    }
    (count, used)
}

/// Names of a directory in the order EROFS looks them up by, `.` and `..` among them.
pub(super) fn sorted_names(children: &BTreeMap<Box<[u8]>, Child>) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = children.keys().map(|name| &**name).collect();
    for dots in [&b"."[..], b".."] {
        let at = names.partition_point(|name| *name < dots);
        names.insert(at, dots);
    }
    names
}

/// Bytes of a directory with these names.
pub(super) fn directory_size(names: &[&[u8]]) -> u64 {
    let mut rest = names;
    let mut size = 0;
    loop {
        let (count, used) = fill_block(rest.iter().map(|name| name.len()));
        rest = rest.get(count.max(1)..).unwrap_or(&[]);
        if rest.is_empty() {
            return size + used as u64;
        }
        size += BLOCK_SIZE;
    }
}

/// Directory blocks: entries at the front, names behind, sorted over the whole directory.
pub(super) fn encode_directory(names: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        let (count, _) = fill_block(rest.iter().map(|(name, ..)| name.len()));
        let (block, after) = rest.split_at_checked(count.max(1)).unwrap_or((rest, &[]));
        let start = out.len();
        let mut name_offset = block.len() * DIRENT;
        for (name, nid, kind) in block {
            out.extend_from_slice(&nid.to_le_bytes());
            out.extend_from_slice(&(name_offset as u16).to_le_bytes());
            out.extend_from_slice(&[*kind, 0]);
            name_offset += name.len();
        }
        for (name, ..) in block {
            out.extend_from_slice(name);
        }
        if !after.is_empty() {
            out.resize(start + BLOCK_SIZE as usize, 0);
        }
        rest = after;
    }
    out
}
