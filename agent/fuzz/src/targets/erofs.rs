//! The EROFS reader over any image.

use sluice_image::erofs::reader::Reader;

/// Names looked at per image: directories that lead to each other can be walked for very long.
const NAMES: usize = 64;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(reader) = Reader::new(data.to_vec(), &[Some(1 << 16), None, Some(1 << 20)]) else { return };
    let mut left = vec![reader.root()];
    let mut seen = Vec::new();
    while let Some(nid) = left.pop() {
        if seen.len() >= NAMES {
            break;
        }
        seen.push(nid);
        if let Ok(names) = reader.directory(nid) {
            left.extend(names.iter().take(NAMES).map(|(_, child)| *child));
            for (name, _) in names.iter().take(4) {
                drop(reader.lookup(name));
            }
        }
        drop(reader.location(nid));
        drop(reader.symlink(nid));
    }
    drop(reader.walk(&mut |_, _| {}));
}
