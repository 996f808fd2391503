//! Sets of bytes, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds bytes.
    pub fn add(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        if let Some((from, to)) = self.0.range(..=start).next_back().map(|(from, to)| (*from, *to))
            && to >= start
        {
            (start, end) = (from, end.max(to));
        }
        while let Some((from, to)) = self.0.range(start..=end).next().map(|(from, to)| (*from, *to)) {
            self.0.remove(&from);
            end = end.max(to);
        }
        self.0.insert(start, end);
    }

    /// How many.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(from, to)| to - from).sum()
    }

    /// How many of `range` are in it.
    pub fn bytes_in(&self, range: &Range<u64>) -> u64 {
        let before = self.0.range(..=range.start).next_back();
        let first = before.map_or(range.start, |(from, _)| *from);
        self.0
            .range(first..range.end.max(first))
            .map(|(from, to)| (*to).min(range.end).saturating_sub((*from).max(range.start)))
            .sum()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(from, to)| *from..*to)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_are_a_set(
            added in proptest::collection::vec((0..60_u64, 0..20_u64), 0..20),
            asked in (0..70_u64, 0..30_u64),
        ) {
            let mut ranges = Ranges::default();
            let mut expected = BTreeSet::new();
            for (start, len) in added {
                ranges.add(start..start + len);
                expected.extend(start..start + len);
            }
            let asked = asked.0..asked.0 + asked.1;
            prop_assert_eq!(ranges.bytes(), expected.len() as u64);
            prop_assert_eq!(ranges.bytes_in(&asked), expected.range(asked).count() as u64);
            let all: Vec<Range<u64>> = ranges.iter().collect();
            prop_assert!(all.windows(2).all(|two| two[0].end < two[1].start));
        }
    }
}
