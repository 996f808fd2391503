//! The files that are read: made once, kept between runs, and packed as an image of two layers.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::image_maker;
use crate::run::{script, target};

const LARGE_FILES: usize = 16;
const LARGE_BYTES: f64 = (32 << 20) as f64;
const SMALL_FILES: f64 = 10_000.0;
const SMALL_BYTES: usize = 2000;
const ENTRIES: f64 = 50_000.0;
const PER_DIRECTORY: usize = 100;

/// See the module text.
#[derive(Debug)]
pub(crate) struct Tree {
    /// Where the files are, on the disk's own file system.
    pub(crate) root: PathBuf,
    /// The directory of layouts with the image, and its name there.
    pub(crate) image: (PathBuf, String),
    /// Paths below the root: files to be read in sequence and at random.
    pub(crate) large: Vec<PathBuf>,
    /// Bytes of each of them.
    pub(crate) large_bytes: u64,
    /// Small files, in directory order.
    pub(crate) small: Vec<PathBuf>,
}

/// Makes what is not there yet.
pub(crate) fn make(scale: f64) -> Result<Tree> {
    let name = format!("read-{scale}");
    let dir = target().join("sluice-bench").join(&name);
    let large_bytes = ((LARGE_BYTES * scale) as u64).next_multiple_of(1 << 20);
    let small_files = ((SMALL_FILES * scale) as usize).max(PER_DIRECTORY);
    let many_files = ((ENTRIES * scale) as usize).saturating_sub(small_files);
    let tree = Tree {
        root: dir.join("tree"),
        image: (dir.join("images"), name),
        large: (0..LARGE_FILES).map(|number| format!("large/{number:02}").into()).collect(),
        large_bytes,
        small: (0..small_files).map(|number| in_directory("small", number)).collect(),
    };
    if tree.image.0.join(&tree.image.1).join("index.json").exists() {
        return Ok(tree);
    }
    println!("making {} files", LARGE_FILES + small_files + many_files);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    let mut noise = Noise(1);
    for path in &tree.large {
        let mut file = fs::File::create(ready(&tree.root.join(path))?)?;
        for _ in 0..large_bytes >> 20 {
            file.write_all(&noise.bytes(1 << 20))?;
        }
    }
    for path in &tree.small {
        fs::write(ready(&tree.root.join(path))?, noise.bytes(SMALL_BYTES))?;
    }
    for number in 0..many_files {
        fs::write(ready(&tree.root.join(in_directory("many", number)))?, number.to_string())?;
    }
    // Pages that are still to be written could not be dropped.
    script("sync -f \"$1\"", &[&tree.root])?;
    image_maker::pack_members(&tree.image.0, &tree.image.1, &tree.root, &[&["large"], &["small", "many"]])?;
    Ok(tree)
}

fn in_directory(kind: &str, number: usize) -> PathBuf {
    format!("{kind}/{:04}/{:03}", number / PER_DIRECTORY, number % PER_DIRECTORY).into()
}

/// `path`, whose directory is there.
fn ready(path: &Path) -> Result<&Path> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    Ok(path)
}

/// Numbers that look random and are the same each time (xorshift).
#[derive(Debug)]
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}
