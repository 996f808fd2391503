//! Which file a record is about: from the descriptions of files that stand in the trace before it.

use std::collections::{BTreeMap, HashMap};

use crate::What;

/// Most files of one trace that are kept.
const MAX_FILES: usize = 1 << 20;

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Number of its layer.
    pub layer: u32,
    /// First byte in the layer's local file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Path relative to the image's root.
    pub path: Vec<u8>,
}

impl Place {
    /// Byte behind its last block in the layer's local file.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.size.checked_next_multiple_of(4096).unwrap_or(u64::MAX))
    }
}

/// The files that a trace has spoken of so far.
#[derive(Debug, Default)]
pub struct Places {
    files: Vec<Place>,
    inodes: HashMap<u64, usize>,
    offsets: BTreeMap<(u32, u64), usize>,
}

impl Places {
    /// Takes a description of a file; of everything else nothing.
    pub fn see(&mut self, what: &What) {
        let What::File { inode, layer, offset, size, path } = what else { return };
        if self.files.len() >= MAX_FILES {
            return;
        }
        let number = self.files.len();
        self.files.push(Place { layer: *layer, offset: *offset, size: *size, path: path.clone() });
        if *inode != 0 {
            self.inodes.insert(*inode, number);
        }
        self.offsets.entry((*layer, *offset)).or_insert(number);
    }

    /// The file with this inode number.
    pub fn inode(&self, inode: u64) -> Option<&Place> {
        self.files.get(*self.inodes.get(&inode)?)
    }

    /// The file that has, or last before, this byte of a layer's local file.
    pub fn at(&self, layer: u32, offset: u64) -> Option<&Place> {
        let before = self.offsets.range((layer, 0)..=(layer, offset)).next_back()?;
        // Behind its end is the rest of its last block.
        let file = self.files.get(*before.1)?;
        (offset - file.offset < file.end().saturating_sub(file.offset).max(1)).then_some(file)
    }

    /// The first file with a byte among these, and those behind it.
    pub fn among(&self, layer: u32, offset: u64, len: u64) -> impl Iterator<Item = &Place> {
        let first = self.at(layer, offset).map_or(offset, |file| file.offset);
        let range = (layer, first)..(layer, offset.saturating_add(len).max(first));
        self.offsets.range(range).filter_map(|(_, number)| self.files.get(*number))
    }

    /// The file that a record is about, its first one if there are several, and the first byte in it.
    pub fn of(&self, what: &What) -> Option<(&Place, u64)> {
        match what {
            What::Open { inode } | What::Exec { inode, .. } => Some((self.inode(*inode)?, 0)),
            What::Access { inode, offset, .. } | What::Blocked { inode, offset, .. } => {
                Some((self.inode(*inode)?, *offset))
            }
            What::Served { layer, offset, len, .. } | What::Brought { layer, offset, len, .. } => {
                let file = self.among(*layer, *offset, *len).next()?;
                Some((file, offset.saturating_sub(file.offset)))
            }
            _ => None,
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Place> {
        self.files.iter()
    }
}
