//! Merges the layers of an image into one tree, by the OCI image specification's rules for whiteouts (`layer.md`).
//!
//! A whiteout hides what lower layers hold, wherever in its own layer it stands. Parents of an entry are followed through
//! symbolic links, inside the root, as unpacking onto a file system does.

use std::collections::BTreeMap;

use self::path::split;
use self::whiteout::{AUFS_META, OPAQUE, WHITEOUT};
pub use self::xattrs::Dropped;
use self::xattrs::Interned;
use crate::entry::{Entry, EntryKind, Timestamp};

mod path;
#[cfg(test)]
mod tests;
mod whiteout;
mod xattrs;

/// Deepest directory accepted.
const MAX_DEPTH: usize = 1024;
const ROOT: u32 = 0;
/// Most layers accepted: a superblock has to name a device for each.
pub const MAX_LAYERS: u16 = 16_000;
/// Largest device numbers there are: Linux keeps 12 and 20 bits (`MINORBITS`), on disk as in memory.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

/// Why layers cannot be merged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MergeError {
    /// A hard link names nothing, or a directory.
    #[error("layer {layer}: hard link `{path}` to `{target}`: {what}")]
    HardLink {
        /// Number of the layer, from 0.
        layer: usize,
        /// The link.
        path: String,
        /// What it names.
        target: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A path leads through a file, or through a loop of symbolic links, or is too deep.
    #[error("layer {layer}: `{path}`: {what}")]
    Path {
        /// Number of the layer, from 0.
        layer: usize,
        /// The path.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
    /// More layers than are accepted.
    #[error("the image has more than {0} layers")]
    TooManyLayers(u16),
    /// More entries than are accepted.
    #[error("the image has more than {0} entries")]
    TooMany(usize),
}

/// A merged image: inodes by number, the root being the first.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    xattrs: Interned,
    layer: u16,
}

/// One inode of the tree.
#[derive(Debug, Clone)]
pub(crate) struct Inode {
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: u32,
    pub(crate) links: u32,
}

/// What an inode is.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory { parent: u32, children: BTreeMap<Box<[u8]>, Child> },
    File { size: u64, layer: u16, store_offset: u64 },
    Symlink(Box<[u8]>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) inode: u32,
    /// The layer that has this name last.
    layer: u16,
}

/// Most entries accepted in an image.
const MAX_INODES: usize = 50_000_000;

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty root directory, 0755, of root.
    pub fn new() -> Self {
        let mut tree = Self { inodes: Vec::new(), xattrs: Interned::default(), layer: 0 };
        tree.xattrs.sets.push(Vec::new());
        tree.inodes.push(Inode::directory(ROOT));
        tree
    }

    /// Puts the next layer on top.
    pub fn apply<E: From<MergeError>>(
        &mut self,
        entries: impl Iterator<Item = Result<Entry, E>>,
    ) -> Result<(), E> {
        if self.layer == MAX_LAYERS {
            return Err(MergeError::TooManyLayers(MAX_LAYERS).into());
        }
        for entry in entries {
            self.entry(entry?)?;
        }
        self.layer += 1;
        Ok(())
    }

    /// What was left out so far.
    pub fn dropped(&self) -> Dropped {
        self.xattrs.dropped
    }

    /// How many inodes there are, those no name leads to included.
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn inode(&self, number: u32) -> Option<&Inode> {
        self.inodes.get(number as usize)
    }

    pub(crate) fn xattrs(&self, set: u32) -> &[(Vec<u8>, Vec<u8>)] {
        self.xattrs.sets.get(set as usize).map_or(&[], Vec::as_slice)
    }

    fn entry(&mut self, entry: Entry) -> Result<(), MergeError> {
        if entry.path.is_empty() {
            if matches!(entry.kind, EntryKind::Directory) {
                self.set_attributes(ROOT, &entry);
            }
            return Ok(());
        }
        let (parent, name) = split(&entry.path);
        if name == OPAQUE {
            if let Some(dir) = self.find(parent, &entry.path)? {
                self.prune(dir);
            }
            return Ok(());
        }
        if name.starts_with(AUFS_META) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if let Some(dir) = self.find(parent, &entry.path)? {
                self.hide(dir, hidden);
            }
            return Ok(());
        }
        let dir = self.make_dirs(parent, &entry.path)?;
        self.add(dir, name, entry.clone())
    }

    fn add(&mut self, dir: u32, name: &[u8], entry: Entry) -> Result<(), MergeError> {
        let existing = self.child(dir, name);
        if matches!(entry.kind, EntryKind::Directory)
            && let Some(child) = existing
            && self.is_directory(child.inode)
        {
            self.set_attributes(child.inode, &entry);
            self.link(dir, name, child.inode);
            return Ok(());
        }
        if let EntryKind::HardLink { target } = &entry.kind {
            let inode = self.link_target(target, &entry.path)?;
            if existing.is_some_and(|child| child.inode == inode) {
                self.link(dir, name, inode);
                return Ok(());
            }
            self.unlink(dir, name);
            self.link(dir, name, inode);
            if let Some(inode) = self.inodes.get_mut(inode as usize) {
                inode.links += 1;
            }
            return Ok(());
        }
        self.unlink(dir, name);
        let number = u32::try_from(self.inodes.len()).ok().filter(|_| self.inodes.len() < MAX_INODES);
        let number = number.ok_or(MergeError::TooMany(MAX_INODES))?;
        let kind = match entry.kind.clone() {
            EntryKind::File { size, store_offset } => Kind::File { size, layer: self.layer, store_offset },
            EntryKind::Directory | EntryKind::HardLink { .. } => {
                // Counted in the tree, not in the path: symbolic links can lead from one deep place to the next.
                if self.depth(dir) >= MAX_DEPTH {
                    return Err(self.path_error(&entry.path, "it is too deep"));
                }
                Kind::Directory { parent: dir, children: BTreeMap::new() }
            }
            EntryKind::Symlink { target } => Kind::Symlink(target.into_boxed_slice()),
            EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor }
                if major > MAX_MAJOR || minor > MAX_MINOR =>
            {
                return Err(self.path_error(&entry.path, "its device number is above Linux's 4095:1048575"));
            }
            EntryKind::CharDevice { major, minor } => Kind::CharDevice(major, minor),
            EntryKind::BlockDevice { major, minor } => Kind::BlockDevice(major, minor),
            EntryKind::Fifo => Kind::Fifo,
        };
        self.inodes.push(Inode { kind, ..Inode::directory(dir) });
        self.set_attributes(number, &entry);
        self.link(dir, name, number);
        Ok(())
    }

    fn set_attributes(&mut self, number: u32, entry: &Entry) {
        let kept = self.xattrs.kept(&entry.xattrs);
        let xattrs = self.xattrs.number(&kept);
        if let Some(inode) = self.inodes.get_mut(number as usize) {
            inode.mode = (entry.mode & 0o7777) as u16;
            inode.uid = entry.uid;
            inode.gid = entry.gid;
            inode.mtime = entry.mtime;
            inode.xattrs = xattrs;
        }
    }

    fn link_target(&self, target: &[u8], path: &[u8]) -> Result<u32, MergeError> {
        let failed = |what| MergeError::HardLink {
            layer: usize::from(self.layer),
            path: String::from_utf8_lossy(path).into_owned(),
            target: String::from_utf8_lossy(target).into_owned(),
            what,
        };
        let (parent, name) = split(target);
        let child = self.find(parent, path)?.and_then(|dir| self.child(dir, name));
        let child = child.ok_or_else(|| failed("no such file"))?;
        if self.is_directory(child.inode) {
            return Err(failed("a directory cannot have a second name"));
        }
        Ok(child.inode)
    }

    fn link(&mut self, dir: u32, name: &[u8], inode: u32) {
        let layer = self.layer;
        if let Some(Inode { kind: Kind::Directory { children, .. }, .. }) = self.inodes.get_mut(dir as usize)
        {
            children.insert(name.into(), Child { inode, layer });
        }
    }

    fn unlink(&mut self, dir: u32, name: &[u8]) {
        let Some(Inode { kind: Kind::Directory { children, .. }, .. }) = self.inodes.get_mut(dir as usize)
        else {
            return;
        };
        let Some(child) = children.remove(name) else { return };
        let mut gone = vec![child.inode];
        while let Some(number) = gone.pop() {
            let Some(inode) = self.inodes.get_mut(number as usize) else { continue };
            match &mut inode.kind {
                Kind::Directory { children, .. } => {
                    gone.extend(std::mem::take(children).into_values().map(|child| child.inode));
                }
                _ => inode.links = inode.links.saturating_sub(1),
            }
        }
    }

    fn child(&self, dir: u32, name: &[u8]) -> Option<Child> {
        match &self.inode(dir)?.kind {
            Kind::Directory { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    fn is_directory(&self, number: u32) -> bool {
        matches!(self.inode(number).map(|inode| &inode.kind), Some(Kind::Directory { .. }))
    }

    fn path_error(&self, path: &[u8], what: &'static str) -> MergeError {
        MergeError::Path {
            layer: usize::from(self.layer),
            path: String::from_utf8_lossy(path).into_owned(),
            what,
        }
    }
}

impl Inode {
    fn directory(parent: u32) -> Self {
        Self {
            kind: Kind::Directory { parent, children: BTreeMap::new() },
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: 0,
            links: 1,
        }
    }
}
