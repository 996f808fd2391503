//! Disk usage of a directory tree, counted as containerd counts it: allocated blocks, each inode once.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Unit of `st_blocks` (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// What a snapshot takes by itself, without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes, directories included.
    pub inodes: u64,
}

impl Usage {
    /// Of everything at and below `dir`. Files that vanish meanwhile are not counted: a container may be at work there.
    pub fn of(dir: &Path) -> io::Result<Self> {
        let mut usage = Self::default();
        let mut seen = HashSet::new();
        let mut waiting = vec![dir.to_path_buf()];
        while let Some(path) = waiting.pop() {
            let Some(meta) = there(path.symlink_metadata())? else { continue };
            if seen.insert((meta.dev(), meta.ino())) {
                usage.inodes += 1;
                usage.bytes += meta.blocks() * STAT_BLOCK_BYTES;
            }
            if meta.is_dir()
                && let Some(entries) = there(path.read_dir())?
            {
                for entry in entries {
                    waiting.push(entry?.path());
                }
            }
        }
        Ok(usage)
    }
}

/// `None` for what is not there.
fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("a");
        std::fs::write(&file, vec![1; 8192]).expect("write");
        let one = Usage::of(dir.path()).expect("usage");
        std::fs::hard_link(&file, dir.path().join("b")).expect("link");
        assert_eq!(Usage::of(dir.path()).expect("usage"), one);
        assert_eq!(one.inodes, 2);
        assert!(one.bytes >= 8192, "{one:?}");
    }
}
