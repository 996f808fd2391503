//! What several starts of the same image and entry point touched, and the order in which to fetch it.
//!
//! A profile is a set of samples, at most [`MAX_SAMPLES`]; everything else follows from them. So two profiles are merged by uniting
//! their samples, in any order, any number of times, with the same outcome: nodes that publish at the same time lose nothing.

use std::collections::{BTreeMap, HashMap};

use crate::sample::{ContentKey, FileFacts, MAX_RANGES, Sample, SampleRange};
use crate::varint::{Input, Malformed, put, put_bytes, put_signed};

const MAGIC: [u8; 8] = *b"SLUICEPF";
/// Version of the format.
pub const PROFILE_VERSION: u16 = 1;
/// Samples that a profile keeps.
pub const MAX_SAMPLES: usize = 16;
/// Longest encoded profile accepted.
const MAX_ENCODED: usize = 16 << 20;
/// Longest profile accepted before compression.
const MAX_PLAIN: usize = 64 << 20;
const MAX_TEXT: usize = 4096;
const MAX_FILES: u64 = 1 << 20;
const ZSTD_LEVEL: i32 = 12;
const PAGE: u64 = 4096;

/// Why a profile cannot be read or merged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProfileError {
    /// It does not begin as profiles do.
    #[error("this is no profile")]
    NotAProfile,
    /// Another version of the format.
    #[error("the profile has version {0}, and this program reads version {PROFILE_VERSION}")]
    Version(u16),
    /// Longer than any that is accepted.
    #[error("the profile is too long")]
    TooLong,
    /// Something in it is not as the format has it.
    #[error("the profile is damaged: {0}")]
    Damaged(&'static str),
    /// Profiles of different things cannot be merged.
    #[error("a profile of {other:?} cannot be merged into one of {own:?}")]
    OtherKey {
        /// What this profile is about.
        own: Box<ProfileKey>,
        /// What the other is about.
        other: Box<ProfileKey>,
    },
}

impl From<Malformed> for ProfileError {
    fn from(_: Malformed) -> Self {
        Self::Damaged("a number or text is malformed")
    }
}

/// What a profile is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProfileKey {
    /// Digest of the image's manifest.
    pub image: String,
    /// Class of the entry point, [`crate::entry_class`].
    pub entry: String,
}

/// Samples of one image and entry point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// What it is about.
    pub key: ProfileKey,
    /// When it last helped a start: seconds since 1970.
    pub last_used: u64,
    /// By rank: those of this image first, then the latest.
    samples: BTreeMap<Rank, Sample>,
}

/// Whether inherited, seconds before the end of time, digest of the sample.
type Rank = (bool, u64, [u8; 16]);

/// Bytes to fetch, as the profile orders them.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The file.
    pub file: FileFacts,
    /// First byte.
    pub offset: u64,
    /// Bytes; not beyond the file's end.
    pub len: u64,
    /// In how many of the samples it was touched, 0 to 1.
    pub weight: f64,
}

impl Profile {
    /// One without samples.
    pub fn new(key: ProfileKey) -> Self {
        Self { key, last_used: 0, samples: BTreeMap::new() }
    }

    /// Adds a start. The oldest go when there are too many.
    pub fn add(&mut self, sample: Sample) {
        if sample.ranges.is_empty() {
            return;
        }
        self.last_used = self.last_used.max(sample.recorded_at);
        self.samples.insert(rank(&sample), sample);
        while self.samples.len() > MAX_SAMPLES {
            self.samples.pop_last();
        }
    }

    /// Unites two profiles of the same image and entry point.
    pub fn merge(&mut self, other: Self) -> Result<(), ProfileError> {
        if self.key != other.key {
            let (own, other) = (Box::new(self.key.clone()), Box::new(other.key));
            return Err(ProfileError::OtherKey { own, other });
        }
        other.samples.into_values().for_each(|sample| self.add(sample));
        self.last_used = self.last_used.max(other.last_used);
        Ok(())
    }

    /// What a new version of the image can make use of: `find` gives the facts of a file of that image with this content.
    /// `None`: nothing.
    pub fn inherited_by(
        &self,
        key: ProfileKey,
        find: impl Fn(&ContentKey) -> Option<FileFacts>,
    ) -> Option<Self> {
        let mut heir = Self::new(key);
        self.samples.values().filter_map(|sample| sample.inherited_by(&find)).for_each(|one| heir.add(one));
        heir.last_used = self.last_used;
        (!heir.samples.is_empty()).then_some(heir)
    }

    /// The starts that it was learned from, own ones first, then the latest.
    pub fn samples(&self) -> impl ExactSizeIterator<Item = &Sample> {
        self.samples.values()
    }

    /// Whether all of it comes from another version of the image.
    pub fn is_inherited(&self) -> bool {
        self.samples.values().all(|sample| sample.inherited)
    }

    /// Whether it has not helped for so long. Times are seconds.
    pub fn is_expired(&self, now: u64, unused_for: u64) -> bool {
        now.saturating_sub(self.last_used) > unused_for
    }

    /// What to fetch, in order: first what at least half of the starts touched, in the order in which they touched it (the
    /// median of the places it had); then what fewer touched, the most frequent first. Inherited samples count only while there
    /// are no own ones. No byte is planned twice.
    pub fn plan(&self) -> Vec<Planned> {
        let own = self.samples.values().filter(|sample| !sample.inherited || self.is_inherited());
        let samples: Vec<&Sample> = own.collect();
        let mut touches: BTreeMap<ContentKey, (&FileFacts, Vec<Touch>)> = BTreeMap::new();
        for (number, sample) in samples.iter().enumerate() {
            let total = sample.bytes().max(1) as f64;
            let mut before = 0_u64;
            for range in &sample.ranges {
                let Some(facts) = sample.files.get(range.file as usize) else { continue };
                let place = before as f64 / total;
                before += u64::from(range.pages) * PAGE;
                let end = range.first_page.saturating_add(range.pages);
                let entry = touches.entry(facts.content).or_insert((facts, Vec::new()));
                // Of several paths of a content the first in order, so that the order of samples does not matter.
                entry.0 = entry.0.min(facts);
                entry.1.push(Touch { sample: number, first: range.first_page, end, place });
            }
        }
        let mut segments: Vec<Segment<'_>> = Vec::new();
        for (facts, touches) in touches.into_values() {
            split(facts, &touches, samples.len(), &mut segments);
        }
        segments.sort_by(|one, other| {
            one.order().partial_cmp(&other.order()).unwrap_or(std::cmp::Ordering::Equal)
        });
        let mut plan: Vec<Planned> = Vec::new();
        for next in segments.iter().filter_map(|segment| segment.planned(samples.len())) {
            match plan.last_mut() {
                Some(last)
                    if last.file == next.file
                        && last.weight == next.weight
                        && last.offset.checked_add(last.len) == Some(next.offset) =>
                {
                    last.len += next.len;
                }
                _ => plan.push(next),
            }
        }
        plan
    }

    /// Encodes it.
    pub fn encode(&self) -> Result<Vec<u8>, std::io::Error> {
        let mut plain = Vec::new();
        put_bytes(&mut plain, self.key.image.as_bytes());
        put_bytes(&mut plain, self.key.entry.as_bytes());
        put(&mut plain, self.last_used);
        let mut files: Vec<&FileFacts> = self.samples.values().flat_map(|sample| &sample.files).collect();
        files.sort();
        files.dedup();
        put(&mut plain, files.len() as u64);
        for file in &files {
            let ContentKey(content) = file.content;
            plain.extend_from_slice(&content);
            put(&mut plain, file.size);
            put_bytes(&mut plain, file.path.get(..MAX_TEXT).unwrap_or(&file.path));
        }
        let numbers: HashMap<&FileFacts, u64> = files.iter().copied().zip(0..).collect();
        put(&mut plain, self.samples.len() as u64);
        self.samples.values().for_each(|sample| put_sample(&mut plain, sample, &numbers));
        let mut out = Vec::from(MAGIC);
        out.extend_from_slice(&PROFILE_VERSION.to_le_bytes());
        out.extend_from_slice(&zstd::bulk::compress(&plain, ZSTD_LEVEL)?);
        Ok(out)
    }

    /// Decodes what [`Self::encode`] made. What it is given need not be trusted.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProfileError> {
        if bytes.len() > MAX_ENCODED {
            return Err(ProfileError::TooLong);
        }
        let rest = bytes.strip_prefix(&MAGIC).ok_or(ProfileError::NotAProfile)?;
        let (version, packed) = rest.split_first_chunk::<2>().ok_or(ProfileError::NotAProfile)?;
        let version = u16::from_le_bytes(*version);
        if version != PROFILE_VERSION {
            return Err(ProfileError::Version(version));
        }
        let plain = unpack(packed)?;
        let mut input = Input(&plain);
        let mut text = || -> Result<String, ProfileError> {
            let bytes = input.bytes(MAX_TEXT)?.to_vec();
            String::from_utf8(bytes).map_err(|_not_text| ProfileError::Damaged("its key is no text"))
        };
        let key = ProfileKey { image: text()?, entry: text()? };
        let last_used = input.number()?;
        let mut profile = Self::new(key);
        let count = input.at_most(MAX_FILES)?;
        let files: Result<Vec<FileFacts>, Malformed> = (0..count).map(|_| take_file(&mut input)).collect();
        let files = files?;
        for _ in 0..input.at_most(MAX_SAMPLES as u64)? {
            profile.add(take_sample(&mut input, &files)?);
        }
        if !input.is_empty() {
            return Err(ProfileError::Damaged("something follows its end"));
        }
        profile.last_used = last_used;
        Ok(profile)
    }
}

/// Where a sample stands among others: total, and the same on every node.
fn rank(sample: &Sample) -> Rank {
    let mut bytes = Vec::new();
    let numbers: HashMap<&FileFacts, u64> = sample.files.iter().zip(0..).collect();
    put_sample(&mut bytes, sample, &numbers);
    for file in &sample.files {
        bytes.extend_from_slice(&file.content.0);
        put(&mut bytes, file.size);
        put_bytes(&mut bytes, &file.path);
    }
    let mut digest = [0; 16];
    digest.iter_mut().zip(blake3::hash(&bytes).as_bytes()).for_each(|(to, from)| *to = *from);
    (sample.inherited, u64::MAX - sample.recorded_at, digest)
}

fn put_sample(out: &mut Vec<u8>, sample: &Sample, numbers: &HashMap<&FileFacts, u64>) {
    put(out, sample.recorded_at);
    out.push(u8::from(sample.inherited));
    put(out, sample.ranges.len() as u64);
    let (mut last_file, mut last_page, mut last_ms) = (0_u64, 0_u32, 0_u32);
    for range in &sample.ranges {
        let facts = sample.files.get(range.file as usize);
        let file = facts.and_then(|facts| numbers.get(facts)).copied().unwrap_or(0);
        put_signed(out, file.wrapping_sub(last_file) as i64);
        put_signed(out, i64::from(range.first_page) - i64::from(last_page));
        put(out, range.pages.into());
        put_signed(out, i64::from(range.at_ms) - i64::from(last_ms));
        (last_file, last_page, last_ms) = (file, range.first_page, range.at_ms);
    }
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, ProfileError> {
    let damaged = |_| ProfileError::Damaged("it does not decompress");
    let size = zstd::zstd_safe::get_frame_content_size(packed)
        .map_err(|_damage| ProfileError::Damaged("it does not decompress"))?
        .ok_or(ProfileError::Damaged("it does not tell its size"))?;
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > MAX_PLAIN {
        return Err(ProfileError::TooLong);
    }
    zstd::bulk::decompress(packed, size).map_err(damaged)
}

fn take_file(input: &mut Input<'_>) -> Result<FileFacts, Malformed> {
    let content = *input.take(16)?.first_chunk::<16>().ok_or(Malformed)?;
    let size = input.number()?;
    Ok(FileFacts { content: ContentKey(content), size, path: input.bytes(MAX_TEXT)?.to_vec() })
}

fn take_sample(input: &mut Input<'_>, all: &[FileFacts]) -> Result<Sample, ProfileError> {
    let recorded_at = input.number()?;
    let inherited = input.byte()? != 0;
    let (mut file, mut page, mut ms) = (0_i64, 0_i64, 0_i64);
    // A file that is there twice is one.
    let mut numbers: HashMap<&FileFacts, u32> = HashMap::new();
    let mut files = Vec::new();
    let mut ranges = Vec::new();
    for _ in 0..input.at_most(MAX_RANGES as u64)? {
        file = file.wrapping_add(input.signed()?);
        page = page.wrapping_add(input.signed()?);
        let pages = input.u32()?;
        ms = ms.wrapping_add(input.signed()?);
        let outside = |_| ProfileError::Damaged("a range is outside its file");
        let index = usize::try_from(file).map_err(outside)?;
        let facts = all.get(index).ok_or(ProfileError::Damaged("a range is of no file"))?;
        let first_page = u32::try_from(page).map_err(outside)?;
        let at_ms = u32::try_from(ms).map_err(outside)?;
        if pages == 0 || (u64::from(first_page) + u64::from(pages) - 1) * PAGE >= facts.size {
            return Err(ProfileError::Damaged("a range is outside its file"));
        }
        let number = *numbers.entry(facts).or_insert_with(|| {
            files.push(facts.clone());
            files.len() as u32 - 1
        });
        ranges.push(SampleRange { file: number, first_page, pages, at_ms });
    }
    Ok(Sample { recorded_at, inherited, files, ranges })
}

/// A range of one sample.
struct Touch {
    sample: usize,
    first: u32,
    end: u32,
    /// How much of the sample's bytes came before, 0 to 1.
    place: f64,
}

/// Pages that the same samples touched.
struct Segment<'a> {
    facts: &'a FileFacts,
    first: u32,
    end: u32,
    seen: usize,
    minority: bool,
    place: f64,
}

impl Segment<'_> {
    fn order(&self) -> (bool, usize, f64, &FileFacts, u32) {
        // Of a minority the most frequent first; of the others the place decides alone.
        let rare = if self.minority { usize::MAX - self.seen } else { 0 };
        (self.minority, rare, self.place, self.facts, self.first)
    }

    fn planned(&self, samples: usize) -> Option<Planned> {
        let offset = u64::from(self.first) * PAGE;
        let len = (u64::from(self.end) * PAGE).min(self.facts.size).checked_sub(offset)?;
        let weight = self.seen as f64 / samples.max(1) as f64;
        Some(Planned { file: self.facts.clone(), offset, len, weight })
    }
}

/// Cuts a file's touched pages into segments.
fn split<'a>(facts: &'a FileFacts, touches: &[Touch], samples: usize, out: &mut Vec<Segment<'a>>) {
    // At each page where something begins or ends: which touches begin (true) or end there.
    let mut edges: BTreeMap<u32, Vec<(bool, usize)>> = BTreeMap::new();
    for (number, touch) in touches.iter().enumerate() {
        edges.entry(touch.first).or_default().push((true, number));
        edges.entry(touch.end).or_default().push((false, number));
    }
    let mut active: BTreeMap<usize, f64> = BTreeMap::new();
    let mut from = 0;
    for (page, changes) in edges {
        if !active.is_empty() && from < page {
            let mut places: Vec<f64> = active.values().copied().collect();
            places.sort_by(f64::total_cmp);
            let seen = places.len();
            let place = places.get(seen / 2).copied().unwrap_or(0.0);
            let minority = seen * 2 < samples;
            out.push(Segment { facts, first: from, end: page, seen, minority, place });
        }
        from = page;
        let touch = |number: usize| touches.get(number);
        for (_, number) in changes.iter().filter(|(begins, _)| !begins) {
            touch(*number).map(|touch| active.remove(&touch.sample));
        }
        for (_, number) in changes.iter().filter(|(begins, _)| *begins) {
            if let Some(touch) = touch(*number) {
                active.insert(touch.sample, touch.place);
            }
        }
    }
}
