//! Reads back what the writer wrote: probes report inode numbers, and this says which path, layer and bytes they mean.
//!
//! Everything is read from the image when it is asked for; memory does not grow with the number of files. Images are our
//! own, yet are read as outside bytes: a damaged one gives an error, never a panic or an endless walk.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format::{DIRENT, INODE, LAYOUT_INLINE, MAGIC, NID_UNIT, SUPER_OFFSET};
use crate::entry::Timestamp;
use crate::records::BLOCK_SIZE;

/// Deeper than any path the merge makes.
const MAX_DEPTH: usize = 2048;
/// Byte of the superblock at which its number of blocks stands.
const BLOCKS_AT: u64 = 36;
const FORMAT: &str = "mode, layout or table that the writer does not produce";

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Reading the image failed, or it ends early.
    #[error("cannot read the EROFS image at byte {offset}")]
    Read {
        /// Byte of the image.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image is damaged, or not one of ours.
    #[error("inode {nid} of the EROFS image: {what}")]
    Corrupt {
        /// Inode number; 0 is the superblock.
        nid: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// Bytes at offsets.
pub trait ReadAt {
    /// Fills `buffer` from `offset`.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let found = usize::try_from(offset).ok().and_then(|start| self.get(start..)?.get(..buffer.len()));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Where the content of a regular file stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Number of the layer, from 0, in the order they were applied.
    pub layer: usize,
    /// Byte offset in the layer's file.
    pub store_offset: u64,
    /// Bytes.
    pub size: u64,
}

/// What `stat` says of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Type and permission bits, as `st_mode`.
    pub mode: u16,
    /// Bytes.
    pub size: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names.
    pub links: u32,
    /// Modification time.
    pub mtime: Timestamp,
    address: u32,
    inline: bool,
    head: u64,
}

/// A written image.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    root: u64,
    /// Layers with content: first byte in the unified address space, number; ascending.
    layers: Vec<(u64, usize)>,
}

/// Told every name: path and inode number.
type Visit<'v> = &'v mut dyn FnMut(&[u8], u64);

/// A directory being walked: what is left of it (name, inode number, whether a directory), bytes of its path.
type Level = (std::vec::IntoIter<(Vec<u8>, u64, bool)>, usize);

impl<R: ReadAt> Reader<R> {
    /// Opens an image; `layer_offsets` is [`super::Written::layer_offsets`].
    pub fn new(source: R, layer_offsets: &[Option<u64>]) -> Result<Self, ReadError> {
        let mut head = [0; 128];
        read(&source, &mut head, SUPER_OFFSET)?;
        if u32_at(&head, 0)? != MAGIC {
            return Err(ReadError::Corrupt { nid: 0, what: "no EROFS superblock" });
        }
        let root = u16_at(&head, 14)?.into();
        let layers =
            layer_offsets.iter().enumerate().filter_map(|(layer, at)| Some(((*at)?, layer))).collect();
        Ok(Self { source, root, layers })
    }

    /// Opens an image that was written with `layer_blocks`: layers follow it in the unified address space.
    pub fn with_layer_blocks(source: R, layer_blocks: &[u64]) -> Result<Self, ReadError> {
        let mut blocks = [0; 4];
        read(&source, &mut blocks, SUPER_OFFSET + BLOCKS_AT)?;
        let mut next = u64::from(u32::from_le_bytes(blocks)).saturating_mul(BLOCK_SIZE);
        let offsets = layer_blocks.iter().map(|blocks| {
            let at = next;
            next = next.saturating_add(blocks.saturating_mul(BLOCK_SIZE));
            (*blocks > 0).then_some(at)
        });
        let offsets: Vec<Option<u64>> = offsets.collect();
        Self::new(source, &offsets)
    }

    /// Inode number of the root directory.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// What `stat` says of inode `nid`. A number that is no inode gives an error or nonsense, as in the kernel.
    pub fn attributes(&self, nid: u64) -> Result<Attributes, ReadError> {
        let mut inode = [0; INODE as usize];
        read(&self.source, &mut inode, offset_of(nid)?)?;
        let format = u16_at(&inode, 0)?;
        let layout = format >> 1;
        if format & 1 == 0 || (layout != 0 && layout != LAYOUT_INLINE) {
            return Err(ReadError::Corrupt { nid, what: FORMAT });
        }
        let xattrs = match u64::from(u16_at(&inode, 2)?) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        Ok(Attributes {
            mode: u16_at(&inode, 4)?,
            size: u64_at(&inode, 8)?,
            uid: u32_at(&inode, 24)?,
            gid: u32_at(&inode, 28)?,
            links: u32_at(&inode, 44)?,
            mtime: Timestamp { seconds: u64_at(&inode, 32)?.cast_signed(), nanoseconds: u32_at(&inode, 40)? },
            address: u32_at(&inode, 16)?,
            inline: layout == LAYOUT_INLINE,
            head: INODE + xattrs,
        })
    }

    /// Where the content of `nid` stands; `None` if it is no regular file, or empty.
    pub fn location(&self, nid: u64) -> Result<Option<Location>, ReadError> {
        let found = self.attributes(nid)?;
        if found.mode & 0o170_000 != 0o100_000 || found.size == 0 {
            return Ok(None);
        }
        let address = u64::from(found.address) * BLOCK_SIZE;
        let after = self.layers.partition_point(|(start, _)| *start <= address);
        match after.checked_sub(1).and_then(|at| self.layers.get(at)) {
            Some((start, layer)) => {
                Ok(Some(Location { layer: *layer, store_offset: address - start, size: found.size }))
            }
            None => Err(ReadError::Corrupt { nid, what: "its content is in no layer" }),
        }
    }

    /// The text of the symbolic link `nid`; `None` if it is none.
    pub fn symlink(&self, nid: u64) -> Result<Option<Vec<u8>>, ReadError> {
        let found = self.attributes(nid)?;
        if found.mode & 0o170_000 != 0o120_000 {
            return Ok(None);
        }
        if found.size > BLOCK_SIZE {
            return Err(ReadError::Corrupt { nid, what: "its target is too long" });
        }
        self.block(nid, &found, 0).map(Some)
    }

    /// The entries of directory `nid` (name, inode number), sorted by name, without `.` and `..`; none if it is no directory.
    pub fn directory(&self, nid: u64) -> Result<Vec<(Vec<u8>, u64)>, ReadError> {
        let mut all = Vec::new();
        let found = self.attributes(nid)?;
        for number in 0..directory_blocks(&found) {
            each_name(&self.block(nid, &found, number)?, nid, &mut |name, child, _| {
                all.push((name.to_vec(), child));
            })?;
        }
        Ok(all)
    }

    /// Inode number of `path` (no symbolic link is followed); `None` if it is not there.
    pub fn lookup(&self, path: &[u8]) -> Result<Option<u64>, ReadError> {
        let mut nid = self.root;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            let found = self.attributes(nid)?;
            let mut next = None;
            for number in 0..directory_blocks(&found) {
                each_name(&self.block(nid, &found, number)?, nid, &mut |name, child, _| {
                    if name == part {
                        next = Some(child);
                    }
                })?;
            }
            let Some(child) = next else { return Ok(None) };
            nid = child;
        }
        Ok(Some(nid))
    }

    /// Tells `visit` every name in the image (path without leading `/`, inode number), depth first.
    /// Memory: the names of one directory per level, and the number of every directory: one that is met twice (no image of
    /// ours has it) would make the walk as good as endless.
    pub fn walk(&self, visit: Visit<'_>) -> Result<(), ReadError> {
        visit(b"", self.root);
        let mut path = Vec::new();
        let mut met = HashSet::from([self.root]);
        let mut stack = vec![self.level(self.root, 0)?];
        while let Some((left, length)) = stack.last_mut() {
            path.truncate(*length);
            let Some((name, child, is_directory)) = left.next() else {
                stack.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            visit(&path, child);
            if is_directory {
                if stack.len() >= MAX_DEPTH || !met.insert(child) {
                    return Err(ReadError::Corrupt {
                        nid: child,
                        what: "it is too deep, or in two directories",
                    });
                }
                stack.push(self.level(child, path.len())?);
            }
        }
        Ok(())
    }

    /// Paths of many inodes in one walk; `wanted` ascending. Of a file with several names the first in the walk.
    pub fn paths(&self, wanted: &[u64]) -> Result<Vec<Option<Vec<u8>>>, ReadError> {
        let mut found = vec![None; wanted.len()];
        self.walk(&mut |path, nid| {
            if let Ok(at) = wanted.binary_search(&nid)
                && let Some(slot @ None) = found.get_mut(at)
            {
                *slot = Some(path.to_vec());
            }
        })?;
        Ok(found)
    }

    fn level(&self, nid: u64, path_length: usize) -> Result<Level, ReadError> {
        let mut all = Vec::new();
        let found = self.attributes(nid)?;
        for number in 0..directory_blocks(&found) {
            each_name(&self.block(nid, &found, number)?, nid, &mut |name, child, kind| {
                all.push((name.to_vec(), child, kind == 2));
            })?;
        }
        Ok((all.into_iter(), path_length))
    }

    /// The `number`th block of an inode's data, shorter at its end.
    fn block(&self, nid: u64, found: &Attributes, number: u64) -> Result<Vec<u8>, ReadError> {
        let length = found.size.saturating_sub(number * BLOCK_SIZE).min(BLOCK_SIZE);
        let offset = if found.inline && number == found.size / BLOCK_SIZE {
            offset_of(nid)? + found.head
        } else {
            (u64::from(found.address) + number) * BLOCK_SIZE
        };
        let mut block = vec![0; length as usize];
        read(&self.source, &mut block, offset)?;
        Ok(block)
    }
}

fn directory_blocks(found: &Attributes) -> u64 {
    if found.mode & 0o170_000 == 0o040_000 { found.size.div_ceil(BLOCK_SIZE) } else { 0 }
}

/// Names of a directory block, without the dots.
fn each_name(block: &[u8], nid: u64, visit: &mut dyn FnMut(&[u8], u64, u8)) -> Result<(), ReadError> {
    let damaged = || ReadError::Corrupt { nid, what: "a directory block is damaged" };
    let head = usize::from(u16_at(block, 8)?);
    let (entries, rest) = block.split_at_checked(head).ok_or_else(damaged)?;
    if head % DIRENT != 0 || head == 0 {
        return Err(damaged());
    }
    let mut entries = entries.chunks_exact(DIRENT).peekable();
    while let Some(entry) = entries.next() {
        let start = usize::from(u16_at(entry, 8)?).checked_sub(head).ok_or_else(damaged)?;
        let name = match entries.peek() {
            Some(next) => {
                let end = usize::from(u16_at(next, 8)?).checked_sub(head).ok_or_else(damaged)?;
                rest.get(start..end)
            }
            // The last name ends with the block or at a zero.
            None => rest.get(start..).and_then(|name| name.split(|byte| *byte == 0).next()),
        };
        let name = name.ok_or_else(damaged)?;
        if name != b"." && name != b".." {
            visit(name, u64_at(entry, 0)?, *entry.get(10).ok_or_else(damaged)?);
        }
    }
    Ok(())
}

fn offset_of(nid: u64) -> Result<u64, ReadError> {
    nid.checked_mul(NID_UNIT).ok_or(ReadError::Corrupt { nid, what: "no such inode" })
}

fn read(source: &impl ReadAt, buffer: &mut [u8], offset: u64) -> Result<(), ReadError> {
    source.read_exact_at(buffer, offset).map_err(|source| ReadError::Read { offset, source })
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ReadError> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or(ReadError::Corrupt { nid: 0, what: "a record is cut short" })
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, ReadError> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, ReadError> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, ReadError> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}
