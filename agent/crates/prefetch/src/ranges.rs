//! Between files, as profiles know them, and places in layers' local files.

use std::collections::HashMap;
use std::ops::Range;

use sluice_trace::{ContentKey, FileFacts, Profile};

/// A file's content in a layer's local file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileAt {
    /// Its first byte there.
    pub store_offset: u64,
    /// The file.
    pub facts: FileFacts,
}

/// The files that have content of their own in a layer, by store offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFiles {
    /// `sha256:…` of the layer blob.
    pub digest: String,
    /// Ascending.
    pub files: Vec<FileAt>,
}

/// Bytes of a layer's local file that a start will touch.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedRange {
    /// `sha256:…` of the layer blob.
    pub layer: String,
    /// First byte in the layer's local file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// How many of the starts touched it, 0 to 1.
    pub weight: f64,
}

impl WantedRange {
    /// The bytes.
    pub fn bytes(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len)
    }
}

/// Where in an image's layers stands what a profile wants, in its order. What the image does not have is left out.
pub fn wanted(profile: &Profile, layers: &[LayerFiles]) -> Vec<WantedRange> {
    let mut places: HashMap<ContentKey, (&str, u64, u64)> = HashMap::new();
    for layer in layers {
        for file in &layer.files {
            places.insert(file.facts.content, (&layer.digest, file.store_offset, file.facts.size));
        }
    }
    let mut ranges: Vec<WantedRange> = Vec::new();
    for planned in profile.plan() {
        let Some((layer, start, size)) = places.get(&planned.file.content).copied() else { continue };
        let end = planned.offset.saturating_add(planned.len).min(size);
        let Some(len) = end.checked_sub(planned.offset).filter(|len| *len > 0) else { continue };
        ranges.push(WantedRange {
            layer: layer.to_owned(),
            offset: start + planned.offset,
            len,
            weight: planned.weight,
        });
    }
    ranges
}

/// The files that begin, end or go on in a range of a layer's local file.
pub fn overlapping(layer: &LayerFiles, offset: u64, len: u64) -> impl Iterator<Item = &FileAt> {
    let end = offset.saturating_add(len);
    let first = layer.files.partition_point(|file| file.store_offset + file.facts.size <= offset);
    let files = layer.files.get(first..).unwrap_or(&[]).iter();
    files.take_while(move |file| file.store_offset < end)
}

/// The files that have bytes in a range of a layer's local file: each with the first byte and the number of bytes in it.
pub fn served(layer: &LayerFiles, offset: u64, len: u64) -> Vec<(FileFacts, u64, u64)> {
    let end = offset.saturating_add(len);
    overlapping(layer, offset, len)
        .map(|file| {
            let from = offset.max(file.store_offset);
            let to = end.min(file.store_offset + file.facts.size);
            (file.facts.clone(), from - file.store_offset, to.saturating_sub(from))
        })
        .filter(|(_, _, len)| *len > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use sluice_trace::{ProfileKey, Sample, SampleRange};

    use super::*;

    fn file(number: u8, store_offset: u64, size: u64) -> FileAt {
        let facts = FileFacts { content: ContentKey([number; 16]), size, path: vec![number] };
        FileAt { store_offset, facts }
    }

    fn layer() -> LayerFiles {
        let files = vec![file(1, 0, 5000), file(2, 8192, 100), file(3, 12_288, 4096)];
        LayerFiles { digest: "sha256:a".to_owned(), files }
    }

    #[test]
    fn a_read_of_the_layer_is_a_read_of_its_files() {
        let parts: Vec<_> = served(&layer(), 4096, 8192)
            .into_iter()
            .map(|(facts, from, len)| (facts.content.0[0], from, len))
            .collect();
        assert_eq!(parts, [(1, 4096, 904), (2, 0, 100)]);
        // Padding between files is of no file.
        assert!(served(&layer(), 8292, 1000).is_empty());
        assert!(served(&layer(), 1 << 40, u64::MAX).is_empty());
    }

    #[test]
    fn a_profile_names_places_of_the_image_it_is_asked_for() {
        let mut profile = Profile::new(ProfileKey { image: "sha256:i".to_owned(), entry: "sh".to_owned() });
        let range = |file, first_page, pages| SampleRange { file, first_page, pages, at_ms: 0 };
        let gone = file(9, 0, 4096).facts;
        profile.add(Sample {
            recorded_at: 1,
            inherited: false,
            files: vec![layer().files[2].facts.clone(), gone, layer().files[0].facts.clone()],
            ranges: vec![range(0, 0, 1), range(1, 0, 1), range(2, 1, 1)],
        });
        let found: Vec<_> =
            wanted(&profile, &[layer()]).iter().map(|range| (range.offset, range.len)).collect();
        assert_eq!(found, [(12_288, 4096), (4096, 904)]);
    }
}
