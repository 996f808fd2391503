//! What one start touched, in order: a trace reduced to what a profile needs.
//!
//! Files are known by their content, so that what was learned holds on every node, and for every image that has the file.

use std::collections::{BTreeMap, HashMap};

use crate::record::What;
use crate::{Capability, Level, Levels, Record};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Most ranges of one start. More are no start's working set.
pub(crate) const MAX_RANGES: usize = 200_000;

/// Identifies a file's content: the first 16 bytes of a digest. Collisions would cost a useless fetch, nothing else, since
/// whatever is fetched is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentKey(pub [u8; 16]);

/// A file as profiles know it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileFacts {
    /// Its content.
    pub content: ContentKey,
    /// Bytes.
    pub size: u64,
    /// A path of it, relative to the image's root; for people.
    pub path: Vec<u8>,
}

/// Finds files of an image.
pub trait Resolve {
    /// The regular file with this inode number; `None`: there is none, or it is empty.
    fn inode(&self, inode: u64) -> Option<FileFacts>;

    /// What stands in `len` bytes at `offset` of the local file of layer number `layer`: files, first byte and bytes in each.
    fn served(&self, layer: u32, offset: u64, len: u64) -> Vec<(FileFacts, u64, u64)>;
}

/// Pages of a file, in the order in which they were first touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SampleRange {
    /// Index into [`Sample::files`].
    pub file: u32,
    /// First page of 4096 bytes.
    pub first_page: u32,
    /// How many.
    pub pages: u32,
    /// When, since the beginning of the start.
    pub at_ms: u32,
}

/// One start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// When it was: seconds since 1970.
    pub recorded_at: u64,
    /// Learned from another version of the image.
    pub inherited: bool,
    /// Its files; each is in some range.
    pub files: Vec<FileFacts>,
    /// What was touched, in order.
    pub ranges: Vec<SampleRange>,
}

impl Sample {
    /// Reduces records, in order of time, to what was touched until the container was ready (if that is among them).
    ///
    /// `began_ns` is the header's. Accesses count, and what came into the page cache for them: what is read ahead too, since a
    /// reader waits for a whole request. Where the trace's `levels` have neither, what the agent served. Of what cannot be
    /// resolved nothing is kept.
    pub fn from_records<E>(
        records: impl Iterator<Item = Result<Record, E>>,
        levels: &Levels,
        (recorded_at, began_ns): (u64, u64),
        image: &impl Resolve,
    ) -> Result<Self, E> {
        let source = Source::of(levels);
        let mut gatherer = Gatherer::default();
        for record in records {
            let record = record?;
            let at_ms = record.time_ns.saturating_sub(began_ns) / 1_000_000;
            let at_ms = u32::try_from(at_ms).unwrap_or(u32::MAX);
            match &record.what {
                What::Ready => break,
                What::Access { inode, offset, len, .. } if source == Source::Accesses => {
                    let known = gatherer.inodes.get(inode).cloned();
                    let file = known.unwrap_or_else(|| {
                        let found = image.inode(*inode).map(|facts| gatherer.file(facts));
                        gatherer.inodes.insert(*inode, found);
                        found
                    });
                    if let Some(file) = file {
                        gatherer.touch(file, *offset, *len, at_ms);
                    }
                }
                What::Served { layer, offset, len, .. } if source == Source::Served => {
                    for (facts, offset, len) in image.served(*layer, *offset, *len) {
                        let file = gatherer.file(facts);
                        gatherer.touch(file, offset, len, at_ms);
                    }
                }
                _ => {}
            }
        }
        let mut sample =
            Self { recorded_at, inherited: false, files: gatherer.files, ranges: gatherer.ranges };
        sample.drop_unused_files();
        Ok(sample)
    }

    /// Keeps what `keep` knows in its image; `None`: nothing is left.
    pub(crate) fn inherited_by(&self, keep: &impl Fn(&ContentKey) -> Option<FileFacts>) -> Option<Self> {
        let mut files = Vec::new();
        let numbers: Vec<Option<u32>> = self
            .files
            .iter()
            .map(|old| {
                let facts = keep(&old.content).filter(|facts| facts.size == old.size)?;
                files.push(facts);
                u32::try_from(files.len() - 1).ok()
            })
            .collect();
        let ranges: Vec<SampleRange> = self
            .ranges
            .iter()
            .filter_map(|range| {
                let file = (*numbers.get(range.file as usize)?)?;
                Some(SampleRange { file, ..*range })
            })
            .collect();
        let mut sample = Self { recorded_at: self.recorded_at, inherited: true, files, ranges };
        sample.drop_unused_files();
        (!sample.ranges.is_empty()).then_some(sample)
    }

    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| u64::from(range.pages) * PAGE).sum()
    }

    /// Numbers files in the order of their first range, and drops the others.
    fn drop_unused_files(&mut self) {
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let mut files = Vec::new();
        for range in &mut self.ranges {
            let number = *numbers.entry(range.file).or_insert_with(|| {
                files.extend(self.files.get(range.file as usize).cloned());
                files.len().saturating_sub(1) as u32
            });
            range.file = number;
        }
        self.files = files;
    }
}

/// Which records say what was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Accesses,
    Served,
}

impl Source {
    fn of(levels: &Levels) -> Self {
        // The agent's own log sees what it serves, under another name.
        let sees = |capability| levels.of(capability).is_some_and(|level| level > Level::Log);
        let accesses = sees(Capability::Read) && sees(Capability::Fault) || sees(Capability::Fill);
        if accesses { Self::Accesses } else { Self::Served }
    }
}

#[derive(Default)]
struct Gatherer {
    files: Vec<FileFacts>,
    numbers: HashMap<ContentKey, u32>,
    inodes: HashMap<u64, Option<u32>>,
    ranges: Vec<SampleRange>,
    /// Pages touched before, per file: first page to the page behind the last.
    seen: HashMap<u32, BTreeMap<u32, u32>>,
}

impl Gatherer {
    fn file(&mut self, facts: FileFacts) -> u32 {
        let next = self.files.len() as u32;
        let number = *self.numbers.entry(facts.content).or_insert(next);
        if number == next {
            self.files.push(facts);
        }
        number
    }

    /// Adds what of these bytes was not touched before.
    fn touch(&mut self, file: u32, offset: u64, len: u64, at_ms: u32) {
        let size = self.files.get(file as usize).map_or(0, |facts| facts.size);
        let end = offset.saturating_add(len).min(size);
        if end <= offset {
            return;
        }
        let page = |byte: u64| u32::try_from(byte).unwrap_or(u32::MAX);
        let (first, end) = (page(offset / PAGE), page(end.div_ceil(PAGE)));
        let seen = self.seen.entry(file).or_default();
        for (from, to) in missing(seen, first, end) {
            add(seen, from, to);
            let room = self.ranges.len() < MAX_RANGES;
            match self.ranges.last_mut() {
                // A file that is read on is one range.
                Some(last) if last.file == file && last.first_page.saturating_add(last.pages) == from => {
                    last.pages = last.pages.saturating_add(to - from);
                }
                _ if room => {
                    self.ranges.push(SampleRange { file, first_page: from, pages: to - from, at_ms })
                }
                _ => {}
            }
        }
    }
}

/// The parts of `first..end` that no interval covers.
fn missing(intervals: &BTreeMap<u32, u32>, first: u32, end: u32) -> Vec<(u32, u32)> {
    let before = intervals.range(..=first).next_back().map(|(_, to)| *to);
    let mut at = before.map_or(first, |to| to.max(first));
    let mut found = Vec::new();
    for (from, to) in intervals.range(first.saturating_add(1)..end) {
        if *from > at {
            found.push((at, *from));
        }
        at = at.max(*to);
    }
    if at < end {
        found.push((at, end));
    }
    found
}

/// Adds an interval that overlaps none; joins it with its neighbours.
fn add(intervals: &mut BTreeMap<u32, u32>, from: u32, to: u32) {
    let before =
        intervals.range(..from).next_back().filter(|(_, end)| **end == from).map(|(start, _)| *start);
    let after = intervals.remove(&to);
    intervals.insert(before.unwrap_or(from), after.unwrap_or(to));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::{AccessKind, Origin, Process};

    /// Inode n is a file of 100 pages and 1 byte; inode 0 is none.
    struct Image;

    fn facts(number: u8) -> FileFacts {
        FileFacts { content: ContentKey([number; 16]), size: 100 * PAGE + 1, path: vec![number] }
    }

    impl Resolve for Image {
        fn inode(&self, inode: u64) -> Option<FileFacts> {
            u8::try_from(inode).ok().filter(|number| *number > 0).map(facts)
        }

        fn served(&self, layer: u32, offset: u64, len: u64) -> Vec<(FileFacts, u64, u64)> {
            vec![(facts(layer as u8), offset, len)]
        }
    }

    fn access(time_ms: u64, kind: AccessKind, inode: u64, page: u64, pages: u64) -> Record {
        let what = What::Access { kind, inode, offset: page * PAGE, len: pages * PAGE };
        Record { time_ns: time_ms * 1_000_000, process: Process::default(), what }
    }

    fn levels(capabilities: &[Capability]) -> Levels {
        let reached = capabilities.iter().map(|one| (*one, Level::Tracepoint)).collect();
        Levels { reached, ..Levels::default() }
    }

    fn sample(records: &[Record], capabilities: &[Capability]) -> Sample {
        let records = records.iter().cloned().map(Ok::<_, Infallible>);
        Sample::from_records(records, &levels(capabilities), (7, 0), &Image).expect("no errors")
    }

    const BOTH: [Capability; 3] = [Capability::Read, Capability::Fault, Capability::Fill];

    #[test]
    fn first_touches_in_order() {
        use AccessKind::{Around, Fault, Fill, Read};
        let records = [
            access(1, Read, 1, 0, 4),
            access(2, Read, 1, 4, 4),
            access(3, Fault, 2, 50, 1),
            access(4, Around, 2, 48, 16),
            access(5, Read, 1, 2, 10),
            access(6, Fill, 3, 0, 32),
            access(7, Read, 0, 0, 1),
            access(8, Read, 2, 99, 9),
            Record { time_ns: 9, process: Process::default(), what: What::Ready },
            access(10, Read, 9, 0, 1),
        ];
        let range = |file, first_page, pages, at_ms| SampleRange { file, first_page, pages, at_ms };
        let learned = sample(&records, &BOTH);
        assert_eq!(learned.files, [facts(1), facts(2), facts(3)]);
        let expected = [
            range(0, 0, 8, 1),
            range(1, 50, 1, 3),
            range(1, 48, 2, 4),
            range(1, 51, 13, 4),
            range(0, 8, 4, 5),
            range(2, 0, 32, 6),
            // The file ends one byte behind its 100th page.
            range(1, 99, 2, 8),
        ];
        assert_eq!(learned.ranges, expected);
        assert_eq!(learned.bytes(), 62 * PAGE);
        // Where accesses are not seen, what came into memory counts.
        let fills = sample(&records, &[Capability::Fill]);
        assert!(fills.files.contains(&facts(3)));
        // Where nothing is seen, what was served counts.
        let served = What::Served { layer: 5, offset: 0, len: PAGE, service_ns: 1, from: Origin::Registry };
        let record = Record { time_ns: 0, process: Process::default(), what: served };
        assert_eq!(sample(&[record], &[]).files, [facts(5)]);
    }

    proptest! {
        #[test]
        fn every_touched_page_is_in_exactly_one_range(
            touches in proptest::collection::vec((1..4_u64, 0..100_u64, 1..40_u64), 0..60),
        ) {
            let records: Vec<Record> =
                touches.iter().map(|(inode, page, pages)| access(0, AccessKind::Read, *inode, *page, *pages)).collect();
            let learned = sample(&records, &BOTH);
            let mut expected = BTreeSet::new();
            for (inode, page, pages) in touches {
                expected.extend((page..(page + pages).min(101)).map(|page| (inode, page)));
            }
            let mut found = BTreeSet::new();
            for range in &learned.ranges {
                let facts = learned.files.get(range.file as usize).expect("a range has a file");
                let ContentKey([number, ..]) = facts.content;
                for page in range.first_page..range.first_page + range.pages {
                    prop_assert!(found.insert((u64::from(number), u64::from(page))), "twice");
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
