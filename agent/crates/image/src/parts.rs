//! Parts of a chunk, proved by its digest without the rest of it.
//!
//! BLAKE3 is the root of a binary tree over leaves of 1024 bytes, whose left subtrees hold a power of two of them (BLAKE3 paper,
//! section 2.1). So each aligned part of 4 KiB, which is a page and a block of the store, is a subtree, and the chaining values of the
//! subtrees that are missing prove those that are there.

use std::ops::Range;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

/// Bytes of a part; the last one of a chunk may be shorter.
pub const PART_SIZE: u32 = 4 << 10;
/// Parts of the longest chunk that is taken apart: of the default size.
pub const MAX_PARTS: u32 = u64::BITS;

/// A part that is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'a> {
    /// Of its first byte in the chunk.
    pub offset: u32,
    /// All of it.
    pub bytes: &'a [u8],
    /// What [`part_value`] gives.
    pub value: ChainingValue,
}

/// Which parts have bytes of a range of a chunk of `len` bytes: bit 0 is the first. None if the chunk is not taken apart, being
/// too short or too long.
pub fn parts_of(len: u32, range: Range<u64>) -> Option<u64> {
    let count = len.div_ceil(PART_SIZE);
    if !(2..=MAX_PARTS).contains(&count) {
        return None;
    }
    let (first, last) = (range.start / u64::from(PART_SIZE), range.end.div_ceil(u64::from(PART_SIZE)));
    Some((0..count).filter(|part| (first..last).contains(&u64::from(*part))).map(|part| 1 << part).sum())
}

/// The bytes in a chunk of `len` bytes that each of `parts` has.
pub fn ranges_of(len: u32, parts: u64) -> impl Iterator<Item = Range<u32>> {
    let starts = (0..MAX_PARTS).filter(move |part| parts & (1 << part) != 0).map(|part| part * PART_SIZE);
    starts.take_while(move |start| *start < len).map(move |start| start..len.min(start + PART_SIZE))
}

/// The chaining value of a part that begins at `offset` of its chunk.
pub fn part_value(offset: u32, bytes: &[u8]) -> ChainingValue {
    blake3::Hasher::new().set_input_offset(offset.into()).update(bytes).finalize_non_root()
}

/// The chaining values that prove `parts` of a chunk.
pub fn prove(chunk: &[u8], parts: u64) -> Vec<ChainingValue> {
    fn walk(chunk: &[u8], node: Range<u32>, parts: u64, proof: &mut Vec<ChainingValue>) -> ChainingValue {
        let bytes = chunk.get(node.start as usize..node.end as usize).unwrap_or_default();
        if !is_in(&node, parts) {
            let value = part_value(node.start, bytes);
            proof.push(value);
            return value;
        }
        match halves(&node) {
            None => part_value(node.start, bytes),
            Some((left, right)) => {
                let left = walk(chunk, left, parts, proof);
                merge_subtrees_non_root(&left, &walk(chunk, right, parts, proof), Mode::Hash)
            }
        }
    }
    let mut proof = Vec::new();
    let Some((left, right)) = u32::try_from(chunk.len()).ok().and_then(|len| halves(&(0..len))) else {
        return proof;
    };
    walk(chunk, left, parts, &mut proof);
    walk(chunk, right, parts, &mut proof);
    proof
}

/// The parts of a chunk of `len` bytes whose bytes are `bytes`, one behind the other, if they and `proof` have the chunk's `digest`.
pub fn check<'a>(
    len: u32,
    parts: u64,
    bytes: &'a [u8],
    proof: &[ChainingValue],
    digest: &[u8; 32],
) -> Option<Vec<Part<'a>>> {
    let known = parts_of(len, 0..u64::from(len))?;
    let (left, right) = halves(&(0..len))?;
    if parts == 0 || parts & !known != 0 {
        return None;
    }
    let mut checked = Checked { parts, bytes, proof, found: Vec::new() };
    let root = merge_subtrees_root(&checked.value(left)?, &checked.value(right)?, Mode::Hash);
    // Hashes are compared in constant time; nothing may be left over.
    (root == *digest && checked.bytes.is_empty() && checked.proof.is_empty()).then_some(checked.found)
}

struct Checked<'a, 'p> {
    parts: u64,
    bytes: &'a [u8],
    proof: &'p [ChainingValue],
    found: Vec<Part<'a>>,
}

impl Checked<'_, '_> {
    fn value(&mut self, node: Range<u32>) -> Option<ChainingValue> {
        if !is_in(&node, self.parts) {
            let (value, rest) = self.proof.split_first()?;
            self.proof = rest;
            return Some(*value);
        }
        if let Some((left, right)) = halves(&node) {
            return Some(merge_subtrees_non_root(&self.value(left)?, &self.value(right)?, Mode::Hash));
        }
        let (bytes, rest) = self.bytes.split_at_checked(node.len())?;
        self.bytes = rest;
        let value = part_value(node.start, bytes);
        self.found.push(Part { offset: node.start, bytes, value });
        Some(value)
    }
}

/// Whether any of `parts` is in a node of the tree.
fn is_in(node: &Range<u32>, parts: u64) -> bool {
    ranges_of(node.end, parts).any(|part| part.start >= node.start)
}

/// What a node is made of, if it is more than a part.
fn halves(node: &Range<u32>) -> Option<(Range<u32>, Range<u32>)> {
    let len = node.end.saturating_sub(node.start);
    if len <= PART_SIZE {
        return None;
    }
    let middle = node.start + u32::try_from(left_subtree_len(len.into())).ok()?;
    Some((node.start..middle, middle..node.end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(len: u32) -> Vec<u8> {
        (0..len).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    fn of_parts(chunk: &[u8], parts: u64) -> Vec<u8> {
        let ranges = ranges_of(chunk.len() as u32, parts);
        ranges.flat_map(|range| chunk[range.start as usize..range.end as usize].to_vec()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn parts_are_proved_and_nothing_else(
            len in PART_SIZE + 1..=MAX_PARTS * PART_SIZE, wanted: u64, wrong: proptest::sample::Index,
        ) {
            let chunk = chunk(len);
            let digest = *blake3::hash(&chunk).as_bytes();
            let all = parts_of(len, 0..u64::from(len)).expect("taken apart");
            let parts = if wanted & all == 0 { all } else { wanted & all };
            let (bytes, proof) = (of_parts(&chunk, parts), prove(&chunk, parts));
            let found = check(len, parts, &bytes, &proof, &digest).expect("proved");
            prop_assert_eq!(found.len() as u32, parts.count_ones());
            for part in found {
                let at = part.offset as usize;
                prop_assert_eq!(part.bytes, &chunk[at..at + part.bytes.len()]);
                prop_assert_eq!(part.value, part_value(part.offset, part.bytes));
            }
            let mut other = bytes.clone();
            other[wrong.index(bytes.len())] ^= 1;
            prop_assert_eq!(check(len, parts, &other, &proof, &digest), None);
            prop_assert_eq!(check(len, parts, &bytes, &[proof.as_slice(), &[[0; 32]]].concat(), &digest), None);
            let more = [bytes.as_slice(), &[0]].concat();
            prop_assert_eq!(check(len, parts, &more, &proof, &digest), None);
            if let Some(first) = proof.first().copied() {
                prop_assert_eq!(check(len, parts, &bytes, &proof[1..], &digest), None);
                let mut other = proof.clone();
                other[0] = first.map(|byte| byte ^ 1);
                prop_assert_eq!(check(len, parts, &bytes, &other, &digest), None);
            }
        }
    }

    #[test]
    fn a_range_is_in_parts() {
        assert_eq!(parts_of(PART_SIZE, 0..1), None);
        assert_eq!(parts_of(MAX_PARTS * PART_SIZE + 1, 0..1), None);
        assert_eq!(parts_of(10_000, 0..1), Some(0b1));
        assert_eq!(parts_of(10_000, 4095..4097), Some(0b11));
        assert_eq!(parts_of(10_000, 5000..u64::MAX), Some(0b110));
        assert_eq!(parts_of(MAX_PARTS * PART_SIZE, 0..u64::MAX), Some(u64::MAX));
        assert_eq!(ranges_of(10_000, 0b101).collect::<Vec<_>>(), [0..4096, 8192..10_000]);
        assert_eq!(check(10_000, 0, &[], &[], &[0; 32]), None);
        assert_eq!(check(10_000, 0b1000, &[], &[], &[0; 32]), None);
    }
}
