//! Extended attributes of a tree: which ones an image can have, and each set of them kept once.

use std::borrow::Cow;
use std::collections::HashMap;

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
pub(super) struct Interned {
    pub(super) sets: Vec<Xattrs>,
    known: HashMap<Xattrs, u32>,
    pub(super) dropped: Dropped,
}

pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

impl Interned {
    pub(super) fn number(&mut self, set: &[(Vec<u8>, Vec<u8>)]) -> u32 {
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

    /// The attributes that the image can have; counts the others.
    pub(super) fn kept<'x>(&mut self, xattrs: &'x Xattrs) -> Cow<'x, Xattrs> {
        let is_overlay = |name: &[u8]| name.starts_with(b"trusted.overlay.");
        let is_kept = |name: &[u8]| !is_overlay(name) && crate::erofs::xattr_prefix(name).is_some();
        if xattrs.iter().all(|(name, _)| is_kept(name)) {
            return Cow::Borrowed(xattrs);
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
        Cow::Owned(kept)
    }
}
