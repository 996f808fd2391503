//! Where every inode, directory and layer goes, before anything is written.

use super::directory::{directory_size, sorted_names};
use super::format::{INODE, NAME_MAX, NID_UNIT};
use super::xattr::xattr_bytes;
use super::{ErofsError, limit};
use crate::merge::{Inode, Kind, Tree};
use crate::records::BLOCK_SIZE;

/// The kernel's `PATH_MAX` without the NUL.
const TARGET_MAX: usize = 4095;

/// Where one inode goes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    /// Byte offset of the inode; 0: no name leads to it.
    pub(super) offset: u64,
    /// First data block, relative to the data area (directories and long symlinks).
    pub(super) data_block: u32,
    /// Data size in bytes.
    pub(super) size: u64,
    pub(super) inline: bool,
}

/// Every inode's place.
pub(super) struct Plan {
    places: Vec<Place>,
    /// Inodes in the order they are written.
    pub(super) order: Vec<u32>,
    /// First block of directory and symlink data.
    pub(super) data_start: u64,
    data_blocks: u64,
}

impl Plan {
    pub(super) fn new(tree: &Tree, start: u64) -> Result<Self, ErofsError> {
        let mut plan = Self {
            places: vec![Place::default(); tree.inode_count()],
            order: Vec::new(),
            data_start: 0,
            data_blocks: 0,
        };
        let mut offset = start.next_multiple_of(NID_UNIT);
        let mut left = std::collections::VecDeque::from([0_u32]);
        plan.place(tree, 0, &mut offset)?;
        // Breadth first: the entries of a directory stand together, where a listing with attributes reads them.
        while let Some(dir) = left.pop_front() {
            let Some(Inode { kind: Kind::Directory { children, .. }, .. }) = tree.inode(dir) else {
                continue;
            };
            for (name, child) in children {
                if name.len() > NAME_MAX {
                    return Err(limit(name, "a file name has at most 255 bytes"));
                }
                if plan.places.get(child.inode as usize).is_some_and(|place| place.offset == 0) {
                    plan.place(tree, child.inode, &mut offset)?;
                    left.push_back(child.inode);
                }
            }
        }
        plan.data_start = offset.div_ceil(BLOCK_SIZE);
        Ok(plan)
    }

    fn place(&mut self, tree: &Tree, number: u32, offset: &mut u64) -> Result<(), ErofsError> {
        let Some(inode) = tree.inode(number) else { return Ok(()) };
        let head = INODE + xattr_bytes(tree.xattrs(inode.xattrs))?;
        let (size, has_data) = match &inode.kind {
            Kind::Directory { children, .. } => (directory_size(&sorted_names(children)), true),
            Kind::Symlink(target) if target.len() > TARGET_MAX => {
                return Err(limit(target, "a symbolic link's target has at most 4095 bytes"));
            }
            Kind::Symlink(target) => (target.len() as u64, true),
            Kind::File { size, .. } => (*size, false),
            _ => (0, false),
        };
        let tail = size % BLOCK_SIZE;
        let inline = has_data && tail > 0 && head + tail <= BLOCK_SIZE;
        let mut start = offset.next_multiple_of(NID_UNIT);
        if inline && (start + head) % BLOCK_SIZE + tail > BLOCK_SIZE {
            start = start.next_multiple_of(BLOCK_SIZE);
        }
        if inline && (start + head) % BLOCK_SIZE + tail > BLOCK_SIZE {
            return Err(ErofsError::TooLarge("an inode and its tail do not fit a block"));
        }
        let mut place = Place { offset: start, data_block: 0, size, inline };
        if has_data {
            place.data_block = u32::try_from(self.data_blocks)
                .map_err(|_range| ErofsError::TooLarge("too many directories"))?;
            self.data_blocks += if inline { size / BLOCK_SIZE } else { size.div_ceil(BLOCK_SIZE) };
        }
        *offset = start + head + if inline { tail } else { 0 };
        if let Some(slot) = self.places.get_mut(number as usize) {
            *slot = place;
        }
        self.order.push(number);
        Ok(())
    }

    /// Store offsets come from indexes; what they say must stay inside the layer.
    pub(super) fn check_contents(&self, tree: &Tree, layer_blocks: &[u64]) -> Result<(), ErofsError> {
        for number in &self.order {
            let Some(Inode { kind: Kind::File { size, layer, store_offset }, .. }) = tree.inode(*number)
            else {
                continue;
            };
            let layer = usize::from(*layer);
            let blocks = layer_blocks.get(layer).copied().unwrap_or(0);
            let fits = store_offset.checked_add(*size).is_some_and(|end| end.div_ceil(BLOCK_SIZE) <= blocks);
            if *size > 0 && (!fits || !store_offset.is_multiple_of(BLOCK_SIZE)) {
                return Err(ErofsError::OutsideLayer {
                    layer,
                    store_offset: *store_offset,
                    size: *size,
                    blocks,
                });
            }
        }
        Ok(())
    }

    pub(super) fn total_blocks(&self) -> u64 {
        self.data_start + self.data_blocks
    }

    pub(super) fn at(&self, number: u32) -> Place {
        self.places.get(number as usize).copied().unwrap_or_default()
    }

    pub(super) fn nid(&self, number: u32) -> u64 {
        self.at(number).offset / NID_UNIT
    }

    /// First block of each layer in the unified address space.
    pub(super) fn layer_bases(&self, layer_blocks: &[u64]) -> Result<Vec<Option<u32>>, ErofsError> {
        let mut next = self.total_blocks();
        let mut bases = Vec::with_capacity(layer_blocks.len());
        for blocks in layer_blocks {
            let base = u32::try_from(next).map_err(|_range| ErofsError::TooLarge("more than 16 TiB"))?;
            bases.push((*blocks > 0).then_some(base));
            next = next.checked_add(*blocks).ok_or(ErofsError::TooLarge("more than 16 TiB"))?;
        }
        u32::try_from(next).map_err(|_range| ErofsError::TooLarge("more than 16 TiB"))?;
        Ok(bases)
    }
}
