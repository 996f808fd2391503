//! The verified map: one bit per 4096-byte block of a layer's file.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a page, the unit in which the map is stored.
pub(crate) const PAGE_BYTES: usize = 4096;
const WORDS_PER_PAGE: usize = PAGE_BYTES / 8;

/// Bits, and which pages of them changed.
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Vec<AtomicU64>,
    dirty: Vec<AtomicU64>,
    len: u64,
    set: AtomicU64,
}

impl Bitmap {
    /// `len` bits, all clear or all set.
    pub(crate) fn new(len: u64, all_set: bool) -> Self {
        let words = len.div_ceil(64) as usize;
        let bitmap = Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            dirty: (0..words.div_ceil(WORDS_PER_PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            len,
            set: AtomicU64::new(0),
        };
        if all_set {
            bitmap.set(0..len);
        }
        bitmap
    }

    /// Puts a stored page in place.
    pub(crate) fn load_page(&self, page: u32, bytes: &[u8]) {
        let first = page as usize * WORDS_PER_PAGE;
        for (at, bytes) in bytes.chunks_exact(8).enumerate() {
            let Some(word) = self.words.get(first + at) else { break };
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            let start = ((first + at) * 64) as u64;
            let valid = self.len.saturating_sub(start).min(64);
            let mask = if valid == 64 { u64::MAX } else { (1 << valid) - 1 };
            let value = u64::from_le_bytes(value) & mask;
            let before = word.swap(value, Ordering::AcqRel);
            self.set.fetch_add(u64::from(value.count_ones()), Ordering::AcqRel);
            self.set.fetch_sub(u64::from(before.count_ones()), Ordering::AcqRel);
        }
    }

    /// Sets a range; what the bits speak of must be readable before.
    pub(crate) fn set(&self, range: Range<u64>) {
        self.each_word(range, |word, at, mask| {
            let before = word.fetch_or(mask, Ordering::AcqRel);
            let new = mask & !before;
            if new != 0 {
                self.set.fetch_add(u64::from(new.count_ones()), Ordering::AcqRel);
                self.mark_dirty(at);
            }
        });
    }

    /// Clears a range.
    pub(crate) fn clear(&self, range: Range<u64>) {
        self.each_word(range, |word, at, mask| {
            let before = word.fetch_and(!mask, Ordering::AcqRel);
            self.set.fetch_sub(u64::from((before & mask).count_ones()), Ordering::AcqRel);
            self.mark_dirty(at);
        });
    }

    /// Clears what `others` has not; gives the runs of bits that were set.
    pub(crate) fn retain(&self, others: &Self) -> Vec<Range<u64>> {
        let mut cleared: Vec<Range<u64>> = Vec::new();
        for (at, word) in self.words.iter().enumerate() {
            let keep = others.words.get(at).map_or(0, |word| word.load(Ordering::Acquire));
            let gone = word.fetch_and(keep, Ordering::AcqRel) & !keep;
            if gone == 0 {
                continue;
            }
            self.set.fetch_sub(u64::from(gone.count_ones()), Ordering::AcqRel);
            self.mark_dirty(at);
            for bit in (0..64).filter(|bit| gone & (1 << bit) != 0).map(|bit| at as u64 * 64 + bit) {
                match cleared.last_mut().filter(|run| run.end == bit) {
                    Some(run) => run.end += 1,
                    None => cleared.push(bit..bit + 1),
                }
            }
        }
        cleared
    }

    /// The runs of clear bits.
    pub(crate) fn clear_runs(&self) -> Vec<Range<u64>> {
        let (mut runs, mut from) = (Vec::new(), self.run(0));
        while from < self.len {
            let to = self.alike(from..self.len, false);
            runs.push(from..to);
            from = self.run(to);
        }
        runs
    }

    /// Whether all bits of a range are set.
    pub(crate) fn all(&self, range: Range<u64>) -> bool {
        let mut all = range.end <= self.len;
        self.each_word(range, |word, _, mask| all &= word.load(Ordering::Acquire) & mask == mask);
        all
    }

    /// Whether any bit of a range is set.
    pub(crate) fn any(&self, range: Range<u64>) -> bool {
        let mut any = false;
        self.each_word(range, |word, _, mask| any |= word.load(Ordering::Acquire) & mask != 0);
        any
    }

    /// The first clear bit at or after `from`.
    pub(crate) fn run(&self, from: u64) -> u64 {
        self.alike(from..self.len, true)
    }

    /// The first run of set bits in a range; empty if there is none.
    pub(crate) fn run_in(&self, range: Range<u64>) -> Range<u64> {
        let start = self.alike(range.clone(), false);
        start..self.alike(start..range.end, true)
    }

    /// The first bit of a range that is not as `set` says; its end if there is none.
    fn alike(&self, range: Range<u64>, set: bool) -> u64 {
        let end = range.end.min(self.len);
        let mut at = range.start.min(end);
        while at < end {
            let word = self.words.get((at / 64) as usize).map_or(0, |word| word.load(Ordering::Acquire));
            let word = if set { word } else { !word };
            let ones = u64::from((word >> (at % 64)).trailing_ones());
            at += ones;
            if ones == 0 || !at.is_multiple_of(64) {
                break;
            }
        }
        at.min(end)
    }

    /// How many bits are set.
    pub(crate) fn count(&self) -> u64 {
        self.set.load(Ordering::Acquire)
    }

    /// How many bits there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Pages changed since the last call, with their present content.
    pub(crate) fn take_dirty(&self) -> Vec<(u32, Vec<u8>)> {
        let mut pages = Vec::new();
        for (at, dirty) in self.dirty.iter().enumerate() {
            let bits = dirty.swap(0, Ordering::AcqRel);
            for bit in (0..64).filter(|bit| bits & (1 << bit) != 0) {
                let page = (at * 64 + bit) as u32;
                pages.push((page, self.page(page)));
            }
        }
        pages
    }

    /// Whether pages were changed since.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.iter().any(|dirty| dirty.load(Ordering::Acquire) != 0)
    }

    /// All pages, with their present content.
    pub(crate) fn pages(&self) -> Vec<(u32, Vec<u8>)> {
        let count = self.words.len().div_ceil(WORDS_PER_PAGE) as u32;
        (0..count).map(|page| (page, self.page(page))).collect()
    }

    /// The present content of a page.
    pub(crate) fn page(&self, page: u32) -> Vec<u8> {
        let words = self.words.iter().skip(page as usize * WORDS_PER_PAGE).take(WORDS_PER_PAGE);
        words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Marks pages dirty again that could not be stored.
    pub(crate) fn mark_pages(&self, pages: impl Iterator<Item = u32>) {
        for page in pages {
            self.mark_dirty(page as usize * WORDS_PER_PAGE);
        }
    }

    fn mark_dirty(&self, word: usize) {
        let page = word / WORDS_PER_PAGE;
        if let Some(dirty) = self.dirty.get(page / 64) {
            dirty.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    fn each_word(&self, range: Range<u64>, mut visit: impl FnMut(&AtomicU64, usize, u64)) {
        let mut at = range.start;
        let end = range.end.min(self.len);
        while at < end {
            let word = (at / 64) as usize;
            let low = at % 64;
            let count = (end - at).min(64 - low);
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << low };
            if let Some(bits) = self.words.get(word) {
                visit(bits, word, mask);
            }
            at += count;
        }
    }
}

/// Clears ranges of bits in pages as `take_dirty` gave them; returns the numbers of pages that had any of them set.
pub(crate) fn mask(pages: &mut [(u32, Vec<u8>)], ranges: &[Range<u64>]) -> Vec<u32> {
    let mut masked = Vec::new();
    for (page, bytes) in pages {
        let first = u64::from(*page) * PAGE_BYTES as u64 * 8;
        let mut any = false;
        for bit in ranges.iter().cloned().flatten() {
            let Some(at) = bit.checked_sub(first).and_then(|at| usize::try_from(at).ok()) else { continue };
            if let Some(byte) = bytes.get_mut(at / 8) {
                any |= *byte & (1 << (at % 8)) != 0;
                *byte &= !(1 << (at % 8));
            }
        }
        if any {
            masked.push(*page);
        }
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_plain_vector(
            len in 1_u64..300_000,
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0_u64..5000, any::<bool>()), 0..20),
        ) {
            let bitmap = Bitmap::new(len, false);
            let mut plain = vec![false; len as usize];
            for (start, count, value) in changes {
                let start = start.index(len as usize) as u64;
                let end = (start + count).min(len);
                if value { bitmap.set(start..end) } else { bitmap.clear(start..end) }
                plain[start as usize..end as usize].fill(value);
                prop_assert_eq!(bitmap.all(start..end), value || start == end);
                let run = plain[start as usize..].iter().take_while(|bit| **bit).count() as u64;
                prop_assert_eq!(bitmap.run(start), start + run);
            }
            prop_assert_eq!(bitmap.count() as usize, plain.iter().filter(|bit| **bit).count());
            let again = Bitmap::new(len, false);
            for (page, bytes) in bitmap.take_dirty() {
                again.load_page(page, &bytes);
            }
            prop_assert_eq!(again.count(), bitmap.count());
            prop_assert!(bitmap.take_dirty().is_empty());
            // 33 of every 100 bits stay.
            let (keep, gone, clear) = (Bitmap::new(len, false), Bitmap::new(len, false), Bitmap::new(len, true));
            (0..len).step_by(100).for_each(|bit| keep.set(bit..bit + 33));
            let before = bitmap.count();
            bitmap.clear_runs().into_iter().for_each(|run| clear.clear(run));
            prop_assert_eq!(clear.count(), before);
            bitmap.retain(&keep).into_iter().for_each(|run| gone.set(run));
            prop_assert_eq!(bitmap.count() + gone.count(), before);
            for (bit, was) in plain.iter().enumerate().step_by(31) {
                let range = bit as u64..bit as u64 + 1;
                prop_assert_eq!(bitmap.all(range.clone()), *was && bit % 100 < 33);
                prop_assert_eq!(gone.all(range), *was && bit % 100 >= 33);
            }
            prop_assert!(!bitmap.all(0..len + 1));
        }
    }
}
