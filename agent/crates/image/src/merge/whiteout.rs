//! Whiteouts: names that hide what lower layers hold.

use super::{Child, Kind, Tree};

pub(super) const WHITEOUT: &[u8] = b".wh.";
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
pub(super) const AUFS_META: &[u8] = b".wh..wh.";

impl Tree {
    /// Removes what lower layers put under the directory `dir`; says whether nothing is left.
    pub(super) fn prune(&mut self, dir: u32) -> bool {
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
    pub(super) fn hide(&mut self, dir: u32, name: &[u8]) {
        let Some(child) = self.child(dir, name) else { return };
        let emptied = !self.is_directory(child.inode) || self.prune(child.inode);
        if child.layer < self.layer && emptied {
            self.unlink(dir, name);
        }
    }
}
