//! Merges the layers of an image into one tree, by the OCI image specification's rules for whiteouts (`layer.md`).
//!
//! A whiteout hides what lower layers hold, wherever in its own layer it stands. Parents of an entry are followed through
//! symbolic links, inside the root, as unpacking onto a file system does.

use std::collections::BTreeMap;
use std::collections::HashMap;

use crate::entry::{Entry, EntryKind, Timestamp};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS_META: &[u8] = b".wh..wh.";
/// As the kernel: more symbolic links than this on a path are a loop.
const MAX_LINKS: usize = 40;
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
    dropped: Dropped,
}

/// What the layers have and the image cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Attributes that only overlayfs itself may set (`trusted.overlay.`): they would redirect it to other files.
    pub overlay_xattrs: u64,
    /// Attributes with names that no file system of Linux keeps: neither `user.`, `trusted.`, `security.` nor a POSIX list.
    pub foreign_xattrs: u64,
}

impl Dropped {
    /// A line for each kind of thing that was dropped, for whoever runs the image.
    pub fn notes(&self) -> Vec<String> {
        let lines = [
            (self.overlay_xattrs, "of overlayfs (trusted.overlay.*), which images may not set"),
            (self.foreign_xattrs, "with names that Linux does not keep"),
        ];
        let told = lines.into_iter().filter(|(count, _)| *count > 0);
        told.map(|(count, what)| format!("{count} extended attributes {what}, were left out")).collect()
    }
}

/// Sets of extended attributes, each kept once.
#[derive(Debug, Default)]
struct Interned {
    sets: Vec<Xattrs>,
    known: HashMap<Xattrs, u32>,
}

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

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
        let mut tree =
            Self { inodes: Vec::new(), xattrs: Interned::default(), layer: 0, dropped: Dropped::default() };
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
        self.dropped
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
        let kept = self.kept_xattrs(&entry.xattrs);
        let xattrs = self.xattrs.number(&kept);
        if let Some(inode) = self.inodes.get_mut(number as usize) {
            inode.mode = (entry.mode & 0o7777) as u16;
            inode.uid = entry.uid;
            inode.gid = entry.gid;
            inode.mtime = entry.mtime;
            inode.xattrs = xattrs;
        }
    }

    /// The attributes that the image can have; counts the others.
    fn kept_xattrs<'x>(&mut self, xattrs: &'x Xattrs) -> std::borrow::Cow<'x, Xattrs> {
        let is_overlay = |name: &[u8]| name.starts_with(b"trusted.overlay.");
        let is_kept = |name: &[u8]| !is_overlay(name) && crate::erofs::xattr_prefix(name).is_some();
        if xattrs.iter().all(|(name, _)| is_kept(name)) {
            return std::borrow::Cow::Borrowed(xattrs);
        }
        let mut kept = Vec::new();
        for (name, value) in xattrs {
            if is_overlay(name) {
                self.dropped.overlay_xattrs += 1;
            } else if is_kept(name) {
                kept.push((name.clone(), value.clone()));
            } else {
                self.dropped.foreign_xattrs += 1;
            }
        }
        std::borrow::Cow::Owned(kept)
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

    /// The directory at `path`, symbolic links followed inside the root; `None` if it is not there.
    fn find(&self, path: &[u8], of: &[u8]) -> Result<Option<u32>, MergeError> {
        let mut left: Vec<&[u8]> = components(path).collect();
        left.reverse();
        let mut dir = ROOT;
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                dir = self.parent(dir);
                continue;
            }
            let Some(child) = self.child(dir, name) else { return Ok(None) };
            match self.inode(child.inode).map(|inode| &inode.kind) {
                Some(Kind::Directory { .. }) => dir = child.inode,
                Some(Kind::Symlink(target)) => {
                    links += 1;
                    if links > MAX_LINKS || left.len() > MAX_DEPTH {
                        return Err(self.path_error(of, "too many symbolic links on the way"));
                    }
                    if target.starts_with(b"/") {
                        dir = ROOT;
                    }
                    let mut parts: Vec<&[u8]> = components(target).collect();
                    parts.reverse();
                    left.extend(parts);
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(dir))
    }

    /// The directory at `path`; what is missing is created (0755, of root), what is no directory is replaced by one.
    fn make_dirs(&mut self, path: &[u8], of: &[u8]) -> Result<u32, MergeError> {
        if components(path).count() > MAX_DEPTH {
            return Err(self.path_error(of, "it is too deep"));
        }
        if let Some(dir) = self.find(path, of)? {
            return Ok(dir);
        }
        let (parent, name) = split(path);
        let dir = self.make_dirs(parent, of)?;
        let target = self.child(dir, name).and_then(|child| self.inode(child.inode)).and_then(|inode| {
            match &inode.kind {
                Kind::Symlink(target) => Some(target.to_vec()),
                _ => None,
            }
        });
        // A dangling link: its target is made, as `mkdir -p` on the link would want it.
        if let Some(target) = target {
            let inside = if target.starts_with(b"/") { target } else { [parent, b"/", &target].concat() };
            if let Some(inside) = crate::tar::normalise(&inside).filter(|inside| inside != path)
                && components(&inside).count() <= MAX_DEPTH
                && self.find(split(&inside).0, of)?.is_some()
            {
                return self.make_dirs(&inside, of);
            }
            return Err(self.path_error(of, "its parent is a dangling symbolic link"));
        }
        let layer = self.layer;
        let entry = Entry {
            path: path.to_vec(),
            kind: EntryKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        };
        debug_assert_eq!(layer, self.layer);
        self.add(dir, name, entry)?;
        self.child(dir, name)
            .map(|child| child.inode)
            .ok_or_else(|| self.path_error(of, "its parent is lost"))
    }

    /// Removes what lower layers put under the directory `dir`; says whether nothing is left.
    fn prune(&mut self, dir: u32) -> bool {
        let layer = self.layer;
        let names: Vec<(Box<[u8]>, Child)> = match self.inode(dir).map(|inode| &inode.kind) {
            Some(Kind::Directory { children, .. }) => {
                children.iter().map(|(name, child)| (name.clone(), *child)).collect()
            }
            _ => return true,
        };
        let mut empty = true;
        for (name, child) in names {
            let emptied = !self.is_directory(child.inode) || self.prune(child.inode);
            if child.layer < layer && emptied {
                self.unlink(dir, &name);
            } else {
                empty = false;
            }
        }
        empty
    }

    /// Hides `name` of lower layers.
    fn hide(&mut self, dir: u32, name: &[u8]) {
        let Some(child) = self.child(dir, name) else { return };
        let emptied = !self.is_directory(child.inode) || self.prune(child.inode);
        if child.layer < self.layer && emptied {
            self.unlink(dir, name);
        }
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

    fn parent(&self, dir: u32) -> u32 {
        match self.inode(dir).map(|inode| &inode.kind) {
            Some(Kind::Directory { parent, .. }) => *parent,
            _ => ROOT,
        }
    }

    /// Directories above `dir`; bounded by [`MAX_DEPTH`], which `add` upholds.
    fn depth(&self, mut dir: u32) -> usize {
        let mut depth = 0;
        while dir != ROOT {
            dir = self.parent(dir);
            depth += 1;
        }
        depth
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

impl Interned {
    fn number(&mut self, set: &[(Vec<u8>, Vec<u8>)]) -> u32 {
        if set.is_empty() {
            return 0;
        }
        if let Some(number) = self.known.get(set) {
            return *number;
        }
        let number = self.sets.len() as u32;
        self.sets.push(set.to_vec());
        self.known.insert(set.to_vec(), number);
        number
    }
}

/// Parent and last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or(&[]), path.get(at + 1..).unwrap_or(&[])),
        None => (&[], path),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind) -> Result<Entry, MergeError> {
        Ok(Entry {
            path: path.as_bytes().to_vec(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        })
    }

    fn file(path: &str) -> Result<Entry, MergeError> {
        entry(path, EntryKind::File { size: 1, store_offset: 0 })
    }

    fn dir(path: &str) -> Result<Entry, MergeError> {
        entry(path, EntryKind::Directory)
    }

    fn hard_link(path: &str, target: &str) -> Result<Entry, MergeError> {
        entry(path, EntryKind::HardLink { target: target.as_bytes().to_vec() })
    }

    fn symlink(path: &str, target: &str) -> Result<Entry, MergeError> {
        entry(path, EntryKind::Symlink { target: target.as_bytes().to_vec() })
    }

    fn merge(layers: Vec<Vec<Result<Entry, MergeError>>>) -> Result<Vec<String>, MergeError> {
        let mut tree = Tree::new();
        for layer in layers {
            tree.apply(layer.into_iter())?;
        }
        let mut out = Vec::new();
        let mut left = vec![(ROOT, String::new())];
        while let Some((number, path)) = left.pop() {
            if let Some(Inode { kind: Kind::Directory { children, .. }, .. }) = tree.inode(number) {
                for (name, child) in children {
                    let path = format!("{path}/{}", String::from_utf8_lossy(name));
                    let layer = match tree.inode(child.inode).expect("inode").kind {
                        Kind::File { layer, .. } => format!("{layer}"),
                        Kind::Directory { .. } => "d".to_owned(),
                        _ => "l".to_owned(),
                    };
                    out.push(format!("{path}={layer}"));
                    left.push((child.inode, path));
                }
            }
        }
        out.sort();
        Ok(out)
    }

    #[test]
    fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
        let lower = || vec![file("a/x"), file("a/y"), file("b"), file("c/deep/z")];
        for (upper, want) in [
            (vec![file("a/.wh.x")], vec!["/a/y=0", "/b=0", "/c/deep/z=0"]),
            (vec![file("a/x"), file("a/.wh.x")], vec!["/a/x=1", "/a/y=0", "/b=0", "/c/deep/z=0"]),
            (vec![file("a/new"), file("a/.wh..wh..opq")], vec!["/a/new=1", "/b=0", "/c/deep/z=0"]),
            (vec![file("a/.wh..wh..opq"), file("a/new")], vec!["/a/new=1", "/b=0", "/c/deep/z=0"]),
            (
                vec![file(".wh.c"), file(".wh.nothing"), file(".wh..wh.plnk")],
                vec!["/a/x=0", "/a/y=0", "/b=0"],
            ),
            (vec![file("c/deep/new"), file(".wh.c")], vec!["/a/x=0", "/a/y=0", "/b=0", "/c/deep/new=1"]),
        ] {
            let merged = merge(vec![lower(), upper]).expect("merge");
            let files: Vec<&String> = merged.iter().filter(|line| !line.ends_with("=d")).collect();
            assert_eq!(files, want);
        }
    }

    #[test]
    fn kinds_replace_each_other() {
        let merged =
            merge(vec![vec![dir("a"), file("a/x"), file("b")], vec![file("a"), dir("b"), file("b/y")]]);
        assert_eq!(merged.expect("merge"), ["/a=1", "/b/y=1", "/b=d"]);
        let merged = merge(vec![vec![file("a/x")], vec![dir("a")], vec![], vec![]]);
        assert_eq!(merged.expect("merge"), ["/a/x=0", "/a=d"]);
    }

    #[test]
    fn parents_are_followed_inside_the_root() {
        let merged =
            merge(vec![vec![dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib")], vec![file("lib/x")]]);
        assert_eq!(merged.expect("merge"), ["/lib=l", "/usr/lib/x=1", "/usr/lib=d", "/usr=d"]);
        let merged = merge(vec![vec![dir("a"), symlink("up", "../../../a")], vec![file("up/x")]]);
        assert_eq!(merged.expect("merge"), ["/a/x=1", "/a=d", "/up=l"]);
        let merged = merge(vec![vec![symlink("p", "q"), symlink("q", "p")], vec![file("p/x")]]);
        assert!(matches!(merged, Err(MergeError::Path { .. })), "{merged:?}");
    }

    #[test]
    fn hard_links_share_an_inode_across_layers() {
        let mut tree = Tree::new();
        tree.apply(vec![file("a")].into_iter()).expect("merge");
        tree.apply(vec![hard_link("b", "a"), file(".wh.a")].into_iter()).expect("merge");
        let b = tree.child(ROOT, b"b").expect("b");
        assert_eq!(tree.inode(b.inode).expect("inode").links, 1);
        assert!(tree.child(ROOT, b"a").is_none());
        for (link, what) in [(hard_link("x", "none"), "no such"), (hard_link("x", "d"), "directory")] {
            let error = merge(vec![vec![dir("d"), link]]).expect_err("accepted");
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn attributes_that_images_may_not_set_are_left_out_and_counted() {
        let names =
            ["security.capability", "system.nfs4_acl", "trusted.overlay.opaque", "trusted.x", "user.y"];
        let mut with = dir("d").expect("entry");
        with.xattrs = names.iter().map(|name| (name.as_bytes().to_vec(), b"y".to_vec())).collect();
        let mut tree = Tree::new();
        tree.apply::<MergeError>([Ok(with)].into_iter()).expect("merge");
        let inode = tree.inode(tree.child(ROOT, b"d").expect("d").inode).expect("inode");
        let kept: Vec<&[u8]> = tree.xattrs(inode.xattrs).iter().map(|(name, _)| name.as_slice()).collect();
        assert_eq!(kept, [&b"security.capability"[..], b"trusted.x", b"user.y"]);
        assert_eq!(tree.dropped(), Dropped { overlay_xattrs: 1, foreign_xattrs: 1 });
        assert_eq!(tree.dropped().notes().len(), 2);
        assert!(Tree::new().dropped().notes().is_empty());
    }

    #[test]
    fn device_numbers_that_linux_cannot_hold_are_refused() {
        for (major, minor, accepted) in
            [(4095, 1_048_575, true), (4096, 0, false), (0, 1_048_576, false), (u32::MAX, u32::MAX, false)]
        {
            for kind in [EntryKind::CharDevice { major, minor }, EntryKind::BlockDevice { major, minor }] {
                let merged = merge(vec![vec![entry("dev/x", kind)]]);
                assert_eq!(merged.is_ok(), accepted, "{major}:{minor}: {merged:?}");
            }
        }
    }

    #[test]
    fn more_layers_than_are_accepted_are_refused() {
        let mut tree = Tree::new();
        for _ in 0..MAX_LAYERS {
            tree.apply::<MergeError>(std::iter::empty()).expect("merge");
        }
        let error = tree.apply::<MergeError>(std::iter::empty()).expect_err("accepted");
        assert_eq!(error, MergeError::TooManyLayers(MAX_LAYERS));
    }
}
