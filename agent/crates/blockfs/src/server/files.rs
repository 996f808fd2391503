//! The operations on block files, whichever way they come: what there is, what it is made of, what of it is local.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::protocol::FileRecord;

/// The inode number of the one directory (`FUSE_ROOT_ID`).
pub(crate) const ROOT: u64 = 1;
/// For how long the kernel may keep names and attributes: for ever. They never change: a layer's file has its final size from the
/// start. And `LOOP_CHANGE_FD` asks for the former file's attributes (Linux 6.18), which must not need a server: it may be dead.
pub(crate) const VALID_SECONDS: u64 = 1 << 30;
const BLOCK: u64 = 4096;
const ESTALE: i32 = 116;
const ENOENT: i32 = 2;
const EIO: i32 = 5;

/// How a read is answered.
#[derive(Debug)]
pub(crate) enum Read {
    /// With `len` bytes of a file at the same offset.
    InFile { file: Arc<File>, len: u32 },
    /// With `len` bytes that the agent must be asked for.
    Ask { len: u32 },
    /// With nothing: the end of the file.
    Nothing,
}

/// One block file.
#[derive(Debug)]
pub(crate) struct BlockFile {
    name: String,
    pub(crate) size: u64,
    disk: RwLock<Option<Disk>>,
}

#[derive(Debug, Clone)]
struct Disk {
    file: Arc<File>,
    local: Arc<LocalMap>,
}

/// Which blocks are in the local file: a bit each.
#[derive(Debug)]
struct LocalMap(Vec<AtomicU64>);

impl LocalMap {
    fn new(size: u64) -> Self {
        let words = size.div_ceil(BLOCK).div_ceil(64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// The words that hold the blocks from `start` to `end`, and their bits in each.
    fn words(&self, start: u64, end: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let range = if start < end { start / 64..(end - 1) / 64 + 1 } else { 0..0 };
        range.filter_map(move |word| {
            let low = start.saturating_sub(word * 64);
            let high = (end - word * 64).min(64);
            let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
            Some((self.0.get(usize::try_from(word).ok()?)?, mask))
        })
    }

    /// Marks the blocks that lie wholly between two offsets; `size` ends the last one.
    fn set(&self, from: u64, to: u64, size: u64) {
        let end = if to >= size { size.div_ceil(BLOCK) } else { to / BLOCK };
        for (word, mask) in self.words(from.div_ceil(BLOCK), end) {
            // The file's bytes were there before the agent said so, and a socket lay between.
            word.fetch_or(mask, Ordering::Release);
        }
    }

    /// Takes back the blocks that lie partly or wholly between two offsets.
    fn clear(&self, from: u64, to: u64) {
        for (word, mask) in self.words(from / BLOCK, to.div_ceil(BLOCK)) {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    fn covers(&self, from: u64, to: u64) -> bool {
        let blocks = from / BLOCK..to.div_ceil(BLOCK);
        let inside = blocks.end.div_ceil(64) <= self.0.len() as u64;
        inside
            && self
                .words(blocks.start, blocks.end)
                .all(|(word, mask)| word.load(Ordering::Acquire) & mask == mask)
    }
}

/// All block files, by inode number.
#[derive(Debug, Default)]
pub(crate) struct Files {
    by_inode: RwLock<BTreeMap<u64, Arc<BlockFile>>>,
    /// Numbers below this were given away.
    next: AtomicU64,
}

impl Files {
    /// Makes file `inode`, or gives it a new source. Nothing of it is local yet: what an earlier agent, or the same one, said before may
    /// have been lost since.
    pub(crate) fn add(&self, inode: u64, name: String, size: u64, file: Option<File>) {
        self.next.fetch_max(inode.saturating_add(1), Ordering::Relaxed);
        let disk = file.map(|file| Disk::new(file, size));
        let mut files = self.by_inode.write().unwrap_or_else(PoisonError::into_inner);
        match files.get(&inode).filter(|known| known.size == size) {
            Some(known) => *known.disk.write().unwrap_or_else(PoisonError::into_inner) = disk,
            None => drop(files.insert(inode, Arc::new(BlockFile { name, size, disk: RwLock::new(disk) }))),
        }
    }

    pub(crate) fn remove(&self, inode: u64) {
        self.by_inode.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
    }

    /// Bytes from `from` to `to` of file `inode` are in its local file.
    pub(crate) fn set_local(&self, inode: u64, from: u64, to: u64) {
        if let Ok(file) = self.get(inode)
            && let Some(disk) = file.disk()
        {
            disk.local.set(from, to, file.size);
        }
    }

    /// Bytes from `from` to `to` of file `inode` cannot be read from its local file, whatever was said before.
    pub(crate) fn not_local(&self, inode: u64, from: u64, to: u64) {
        if let Ok(file) = self.get(inode)
            && let Some(disk) = file.disk()
        {
            disk.local.clear(from, to);
        }
    }

    /// The local file, if there is one.
    pub(crate) fn disk(&self, inode: u64) -> Option<Arc<File>> {
        self.get(inode).ok()?.disk().map(|disk| disk.file)
    }

    /// The first number that was never given away.
    pub(crate) fn next_inode(&self) -> u64 {
        self.next.load(Ordering::Relaxed).max(ROOT + 1)
    }

    /// File `inode`, or the errno that the kernel gets.
    pub(crate) fn get(&self, inode: u64) -> Result<Arc<BlockFile>, i32> {
        let files = self.by_inode.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&inode).cloned().ok_or(ESTALE)
    }

    /// The file of that name in directory `parent`.
    pub(crate) fn lookup(&self, parent: u64, name: &[u8]) -> Result<(u64, Arc<BlockFile>), i32> {
        let name = std::str::from_utf8(name).map_err(|_not_ours| ENOENT)?;
        let inode = name.split_once('-').and_then(|(inode, _)| inode.parse().ok()).ok_or(ENOENT)?;
        let found = self.get(inode).map_err(|_stale| ENOENT)?;
        if parent == ROOT && found.file_name(inode) == name { Ok((inode, found)) } else { Err(ENOENT) }
    }

    /// What a read of `size` bytes at `offset` gets.
    pub(crate) fn read(&self, inode: u64, offset: u64, size: u32) -> Result<Read, i32> {
        let found = self.get(inode)?;
        let len = found.size.saturating_sub(offset).min(size.into());
        let len = u32::try_from(len).map_err(|_range| EIO)?;
        if len == 0 {
            return Ok(Read::Nothing);
        }
        Ok(match found.disk() {
            Some(disk) if disk.local.covers(offset, offset + u64::from(len)) => {
                Read::InFile { file: disk.file, len }
            }
            _ => Read::Ask { len },
        })
    }

    /// The files, in order.
    pub(crate) fn list(&self) -> Vec<FileRecord> {
        let files = self.by_inode.read().unwrap_or_else(PoisonError::into_inner);
        let record = |(inode, file): (&u64, &Arc<BlockFile>)| FileRecord {
            inode: *inode,
            size: file.size,
            name: file.name.clone(),
        };
        files.iter().map(record).collect()
    }
}

impl BlockFile {
    /// The name in the directory: it holds the inode number, so that a name that comes back is another file and no cached
    /// entry is wrong.
    pub(crate) fn file_name(&self, inode: u64) -> String {
        file_name(inode, &self.name)
    }

    fn disk(&self) -> Option<Disk> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Disk {
    fn new(file: File, size: u64) -> Self {
        Self { file: Arc::new(file), local: Arc::new(LocalMap::new(size)) }
    }
}

/// See [`BlockFile::file_name`].
pub(crate) fn file_name(inode: u64, name: &str) -> String {
    format!("{inode}-{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_become_local_and_no_others() {
        let size = 300 * BLOCK;
        let map = LocalMap::new(size);
        map.set(BLOCK + 1, 200 * BLOCK + 5, size);
        for (from, to, expected) in [
            (2 * BLOCK, 200 * BLOCK, true),
            (2 * BLOCK + 7, 2 * BLOCK + 8, true),
            (BLOCK, 3 * BLOCK, false),
            (BLOCK + 1, 2 * BLOCK, false),
            (199 * BLOCK, 200 * BLOCK + 1, false),
            (63 * BLOCK, 65 * BLOCK, true),
            (0, 1, false),
            (299 * BLOCK, size, false),
            (0, size + BLOCK * 64, false),
        ] {
            assert_eq!(map.covers(from, to), expected, "{from} {to}");
        }
        map.set(0, size, size);
        assert!(map.covers(0, size));
        map.clear(70 * BLOCK + 1, 130 * BLOCK + 1);
        assert!(map.covers(0, 70 * BLOCK) && map.covers(131 * BLOCK, size));
        assert!((70..131).all(|block| !map.covers(block * BLOCK, block * BLOCK + 1)));
    }

    #[test]
    fn every_range_agrees_with_a_map_of_bools() {
        let size = 130 * BLOCK;
        for (from, to) in [(0, 130), (63, 64), (64, 128), (1, 2), (5, 5), (127, 130)] {
            let map = LocalMap::new(size);
            map.set(from * BLOCK, to * BLOCK, size);
            for block in 0..130 {
                let local = (from..to).contains(&block);
                assert_eq!(map.covers(block * BLOCK, block * BLOCK + 1), local, "{from} {to} {block}");
            }
        }
    }

    #[test]
    fn a_file_that_is_added_again_has_nothing_local() {
        let files = Files::default();
        let first = tempfile::tempfile().expect("file");
        let again = first.try_clone().expect("cloned");
        let in_file = |files: &Files| matches!(files.read(7, 0, 4096), Ok(Read::InFile { len: 4096, .. }));
        files.add(7, "a".to_owned(), 2 * BLOCK, Some(first));
        assert!(matches!(files.read(7, BLOCK, 1 << 20), Ok(Read::Ask { len: 4096 })));
        files.set_local(7, 0, BLOCK);
        assert!(in_file(&files));
        files.add(7, "a".to_owned(), 2 * BLOCK, Some(again));
        assert!(!in_file(&files), "also if it is the same local file: fsck may have found damage");
        assert!(matches!(files.read(7, 2 * BLOCK, 1), Ok(Read::Nothing)));
        assert_eq!(files.read(8, 0, 1).err(), Some(ESTALE));
        assert!(files.lookup(ROOT, b"7-a").is_ok());
        assert_eq!(files.lookup(ROOT, b"7-b").err(), Some(ENOENT));
        assert_eq!(files.next_inode(), 8);
    }
}
