//! Paths in a tree: followed through symbolic links, inside the root, and made where they are missing.

use super::{Kind, MAX_DEPTH, MergeError, ROOT, Tree};
use crate::entry::{Entry, EntryKind, Timestamp};

/// As the kernel: more symbolic links than this on a path are a loop.
const MAX_LINKS: usize = 40;

impl Tree {
    /// The directory at `path`, symbolic links followed inside the root; `None` if it is not there.
    pub(super) fn find(&self, path: &[u8], of: &[u8]) -> Result<Option<u32>, MergeError> {
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
    pub(super) fn make_dirs(&mut self, path: &[u8], of: &[u8]) -> Result<u32, MergeError> {
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

    pub(super) fn parent(&self, dir: u32) -> u32 {
        match self.inode(dir).map(|inode| &inode.kind) {
            Some(Kind::Directory { parent, .. }) => *parent,
            _ => ROOT,
        }
    }

    /// Directories above `dir`; bounded by [`MAX_DEPTH`], which `add` upholds.
    pub(super) fn depth(&self, mut dir: u32) -> usize {
        let mut depth = 0;
        while dir != ROOT {
            dir = self.parent(dir);
            depth += 1;
        }
        depth
    }
}

/// Parent and last component.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or(&[]), path.get(at + 1..).unwrap_or(&[])),
        None => (&[], path),
    }
}

pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}
