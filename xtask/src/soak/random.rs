//! Numbers that a seed decides (SplitMix64), and contents made of them.

/// See the module text.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is more than 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(usize::try_from(self.below(of.len() as u64)).unwrap_or_default())
    }

    /// Content of which a compressor takes about half away.
    pub(crate) fn content(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 16);
        while out.len() < len {
            let word = self.next().to_le_bytes();
            out.extend_from_slice(&word);
            out.extend_from_slice(&word);
        }
        out.truncate(len);
        out
    }
}

/// Whether a block begins as [`Random::content`] does: no structure of a file system has the same word twice in front.
pub(crate) fn is_content(block: &[u8]) -> bool {
    block.split_at_checked(16).is_some_and(|(front, _)| {
        let (first, second) = front.split_at(8);
        // Maps of blocks and inodes repeat themselves, too, but with few different bytes.
        first == second && first.iter().collect::<std::collections::BTreeSet<_>>().len() > 4
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_told_from_everything_else() {
        assert!(is_content(&Random::new(7).content(4096)));
        for other in [
            &[0; 4096][..],
            &[0xff; 4096],
            b"short",
            b"0123456789abcdef",
            &[0xf0, 0x0f, 0xff, 0].repeat(1024),
        ] {
            assert!(!is_content(other));
        }
    }
}
