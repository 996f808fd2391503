//! What a start will probably read, told from what it reads: for starts of which nothing is known.

use std::collections::HashMap;
use std::ops::Range;

use crate::ElfNeeds;

/// Bytes of the rest of a file that are guessed after one read.
const REST: u64 = 4 << 20;
/// Symbolic links on the way to a file: as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FilePlace {
    /// Number of the layer that has it.
    pub layer: u32,
    /// Its first byte in the layer's local file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// The files of an image, as far as they are needed to guess: places of all, names of programs, libraries and links.
#[derive(Debug, Default)]
pub struct ImageTree {
    /// By layer, ascending.
    files: Vec<Vec<FilePlace>>,
    names: HashMap<Vec<u8>, Named>,
    /// The directory of a program or library.
    directories: HashMap<(u32, u64), Vec<u8>>,
}

#[derive(Debug)]
enum Named {
    File(FilePlace),
    Link(Vec<u8>),
}

impl ImageTree {
    /// The next layer's entries follow.
    pub fn layer(&mut self) {
        self.files.push(Vec::new());
    }

    /// The layer has a file; `own`: no earlier one of the layer has the same content.
    pub fn file(&mut self, path: Vec<u8>, executable: bool, own: bool, offset: u64, size: u64) {
        let Some(layer) = self.files.len().checked_sub(1) else { return };
        let place = FilePlace { layer: layer as u32, offset, size };
        if own && let Some(files) = self.files.last_mut() {
            files.push(place);
        }
        let (directory, name) = split(&path);
        if executable || name.windows(3).any(|part| part == b".so") {
            self.directories.insert((place.layer, offset), directory.to_vec());
            self.names.insert(path, Named::File(place));
        } else {
            self.names.remove(&path);
        }
    }

    /// The layer has a symbolic link, or another name of a file.
    pub fn link(&mut self, path: Vec<u8>, target: Vec<u8>) {
        self.names.insert(path, Named::Link(target));
    }

    /// The file that has a byte of a layer's local file.
    pub fn file_at(&self, layer: u32, offset: u64) -> Option<FilePlace> {
        let files = self.files.get(layer as usize)?;
        let number = files.partition_point(|file| file.offset <= offset).checked_sub(1)?;
        files.get(number).filter(|file| offset - file.offset < file.size).copied()
    }

    /// What of a file follows a read that ends at `end`.
    pub fn rest_of(file: FilePlace, end: u64) -> Option<Range<u64>> {
        let last = file.offset.saturating_add(file.size).min(end.saturating_add(REST));
        (end < last).then_some(end..last)
    }

    /// The program or library of a name.
    pub fn find(&self, path: &[u8]) -> Option<FilePlace> {
        let mut links = 0;
        let mut at: Vec<u8> = Vec::new();
        let mut left: Vec<&[u8]> = path.split(|byte| *byte == b'/').rev().collect();
        while let Some(name) = left.pop() {
            let above = at.len();
            match name {
                b"" | b"." => continue,
                b".." => {
                    at.truncate(split(&at).0.len());
                    continue;
                }
                name if at.is_empty() => at.extend(name),
                name => at.extend([b"/", name].concat()),
            }
            if let Some(Named::Link(target)) = self.names.get(&at) {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                at.truncate(if target.starts_with(b"/") { 0 } else { above });
                left.extend(target.split(|byte| *byte == b'/').rev());
            }
        }
        match self.names.get(&at)? {
            Named::File(place) => Some(*place),
            Named::Link(_) => None,
        }
    }

    /// What an ELF file that stands in `place` will have loaded, in the order in which it is.
    pub fn needed(&self, place: FilePlace, needs: &ElfNeeds) -> Vec<FilePlace> {
        let origin = self.directories.get(&(place.layer, place.offset)).map_or(&[][..], Vec::as_slice);
        let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
        let usual = ["lib/", "usr/lib/"].map(|above| format!("{above}{triplet}"));
        let usual = usual.iter().map(String::as_str);
        let usual = usual.chain(["lib64", "usr/lib64", "lib", "usr/lib", "usr/local/lib"]);
        let named = needs.directories.iter().map(|directory| with_origin(directory, origin));
        let all: Vec<Vec<u8>> = named.chain(usual.map(|one| one.as_bytes().to_vec())).collect();
        let library = |name: &Vec<u8>| {
            if name.contains(&b'/') {
                return self.find(name);
            }
            all.iter().find_map(|directory| self.find(&[directory, name.as_slice()].join(&b'/')))
        };
        let interpreter = needs.interpreter.iter().filter_map(|path| self.find(path));
        interpreter.chain(needs.libraries.iter().filter_map(library)).collect()
    }
}

/// Directory and name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let cut = path.iter().rposition(|byte| *byte == b'/');
    cut.and_then(|cut| Some((path.get(..cut)?, path.get(cut + 1..)?))).unwrap_or((&[], path))
}

fn with_origin(directory: &[u8], origin: &[u8]) -> Vec<u8> {
    let rest = [&b"$ORIGIN"[..], b"${ORIGIN}"].iter().find_map(|word| directory.strip_prefix(*word));
    rest.map_or_else(|| directory.to_vec(), |rest| [origin, rest].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> ImageTree {
        let mut tree = ImageTree::default();
        tree.layer();
        tree.link(b"lib".to_vec(), b"usr/lib".to_vec());
        tree.file(b"usr/bin/app1".to_vec(), true, true, 0, 10_000);
        tree.link(b"usr/bin/app".to_vec(), b"/etc/../usr/bin/app1".to_vec());
        tree.file(b"usr/lib/libx.so.1.2".to_vec(), false, true, 12_288, 5 << 20);
        tree.link(b"usr/lib/libx.so.1".to_vec(), b"libx.so.1.2".to_vec());
        tree.link(b"usr/lib/round".to_vec(), b"round".to_vec());
        tree.layer();
        tree.file(b"opt/app/lib/liby.so".to_vec(), false, true, 2 << 20, 50);
        tree
    }

    #[test]
    fn a_read_is_told_to_be_of_a_file_and_what_is_left_of_it() {
        let tree = tree();
        let file = tree.file_at(0, 20_000).expect("a file");
        assert_eq!((file.offset, file.size), (12_288, 5 << 20));
        assert_eq!(ImageTree::rest_of(file, 20_480), Some(20_480..20_480 + REST));
        let end = file.offset + file.size;
        assert_eq!(ImageTree::rest_of(file, end - 10), Some(end - 10..end));
        assert_eq!(ImageTree::rest_of(file, end), None);
        assert_eq!((tree.file_at(1, 1 << 40), tree.file_at(7, 0)), (None, None));
    }

    #[test]
    fn libraries_are_found_by_links_and_by_the_directories_that_a_file_names() {
        let tree = tree();
        let app = tree.find(b"/bin/../usr/bin/app").expect("found");
        assert_eq!(app.size, 10_000);
        assert_eq!((tree.find(b"usr/lib/round"), tree.find(b"usr/lib")), (None, None));
        let needs = ElfNeeds {
            interpreter: Some(b"/lib/libx.so.1".to_vec()),
            libraries: vec![b"liby.so".to_vec(), b"libx.so.1".to_vec(), b"libz.so".to_vec()],
            directories: vec![b"$ORIGIN/../../opt/app/lib".to_vec()],
        };
        let sizes: Vec<u64> = tree.needed(app, &needs).iter().map(|place| place.size).collect();
        assert_eq!(sizes, [5 << 20, 50, 5 << 20]);
    }
}
