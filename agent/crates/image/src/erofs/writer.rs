//! Writes a planned image, front to back.

use std::io::{self, Write};

use zerocopy::IntoBytes;

use super::ErofsError;
use super::directory::{encode_directory, sorted_names};
use super::format::{
    COMPAT_MTIME, DeviceSlot, DiskInode, INCOMPAT_DEVICE_TABLE, LAYOUT_INLINE, LAYOUT_PLAIN, MAGIC, SLOT,
    SUPER_OFFSET, SuperBlock, dirent_type, encode_device,
};
use super::plan::{Place, Plan};
use super::xattr::encode_xattrs;
use crate::merge::{Inode, Kind, Tree};
use crate::records::BLOCK_SIZE;

pub(super) struct Writer<'a, W> {
    pub(super) tree: &'a Tree,
    pub(super) plan: &'a Plan,
    pub(super) bases: &'a [Option<u32>],
    pub(super) out: &'a mut W,
    pub(super) at: u64,
}

impl<W: Write> Writer<'_, W> {
    pub(super) fn super_block(&mut self, layer_blocks: &[u64], slots: usize) -> Result<(), ErofsError> {
        self.pad_to(SUPER_OFFSET)?;
        let many_layers = |_range| ErofsError::TooLarge("too many layers");
        let block =
            |value: u64| u32::try_from(value).map_err(|_range| ErofsError::TooLarge("more than 16 TiB"));
        let super_block = SuperBlock {
            magic: MAGIC.into(),
            checksum: 0.into(),
            feature_compat: COMPAT_MTIME.into(),
            block_bits: BLOCK_SIZE.trailing_zeros() as u8,
            ext_slots: 0,
            root_nid: u16::try_from(self.plan.nid(0)).map_err(many_layers)?.into(),
            inodes: (self.plan.order.len() as u64).into(),
            build_time: 0.into(),
            build_time_nsec: 0.into(),
            blocks: block(self.plan.total_blocks())?.into(),
            meta_block: 0.into(),
            xattr_block: 0.into(),
            uuid: [0; 16],
            volume_name: [0; 16],
            feature_incompat: if slots > 0 { INCOMPAT_DEVICE_TABLE } else { 0 }.into(),
            compression: 0.into(),
            extra_devices: u16::try_from(slots).map_err(many_layers)?.into(),
            device_slot: (if slots > 0 { ((SUPER_OFFSET + SLOT) / SLOT) as u16 } else { 0 }).into(),
            dir_block_bits: 0,
            xattr_prefixes: 0,
            xattr_prefix_start: 0.into(),
            packed_nid: 0.into(),
            reserved: [0; 24],
        };
        self.put(super_block.as_bytes())?;
        if slots == 0 {
            return Ok(());
        }
        for (blocks, base) in layer_blocks.iter().zip(self.bases) {
            if let Some(base) = base {
                let slot = DeviceSlot {
                    tag: [0; 64],
                    blocks: block(*blocks)?.into(),
                    mapped_block: (*base).into(),
                    reserved: [0; 56],
                };
                self.put(slot.as_bytes())?;
            }
        }
        Ok(())
    }

    pub(super) fn inodes(&mut self) -> Result<(), ErofsError> {
        for number in &self.plan.order {
            let Some(inode) = self.tree.inode(*number) else { continue };
            let place = self.plan.at(*number);
            self.pad_to(place.offset)?;
            let xattrs = encode_xattrs(self.tree.xattrs(inode.xattrs))?;
            self.put(self.disk_inode(*number, inode, place, xattrs.len()).as_bytes())?;
            self.put(&xattrs)?;
            if place.inline {
                let data = self.data(*number, inode);
                let tail = data.len() - data.len() % BLOCK_SIZE as usize;
                self.put(data.get(tail..).unwrap_or(&[]))?;
            }
        }
        Ok(())
    }

    fn disk_inode(&self, number: u32, inode: &Inode, place: Place, xattr_len: usize) -> DiskInode {
        let data = (self.plan.data_start as u32).wrapping_add(place.data_block);
        let (kind_bits, address, links) = match &inode.kind {
            Kind::Directory { children, .. } => {
                let is_dir = |number| {
                    matches!(self.tree.inode(number).map(|inode| &inode.kind), Some(Kind::Directory { .. }))
                };
                let subdirs = children.values().filter(|child| is_dir(child.inode)).count() as u32;
                (0o040_000, data, 2 + subdirs)
            }
            Kind::Symlink(_) => (0o120_000, data, inode.links),
            Kind::File { size, layer, store_offset } => {
                let base = self.bases.get(usize::from(*layer)).copied().flatten().unwrap_or(0);
                let address =
                    if *size == 0 { 0 } else { base.wrapping_add((store_offset / BLOCK_SIZE) as u32) };
                (0o100_000, address, inode.links)
            }
            Kind::CharDevice(major, minor) => (0o020_000, encode_device(*major, *minor), inode.links),
            Kind::BlockDevice(major, minor) => (0o060_000, encode_device(*major, *minor), inode.links),
            Kind::Fifo => (0o010_000, 0, inode.links),
        };
        let layout = if place.inline { LAYOUT_INLINE } else { LAYOUT_PLAIN };
        DiskInode {
            format: (1 | (layout << 1)).into(),
            xattr_count: (if xattr_len == 0 { 0 } else { ((xattr_len - 12) / 4 + 1) as u16 }).into(),
            mode: (kind_bits | inode.mode).into(),
            reserved: 0.into(),
            size: place.size.into(),
            address: address.into(),
            number: number.wrapping_add(1).into(),
            uid: inode.uid.into(),
            gid: inode.gid.into(),
            mtime: inode.mtime.seconds.cast_unsigned().into(),
            mtime_nsec: inode.mtime.nanoseconds.into(),
            links: links.into(),
            reserved2: [0; 16],
        }
    }

    /// Data blocks of directories and long symlinks, without inline tails.
    pub(super) fn directories(&mut self) -> Result<(), ErofsError> {
        for number in &self.plan.order {
            let Some(inode) = self.tree.inode(*number) else { continue };
            if !matches!(inode.kind, Kind::Directory { .. } | Kind::Symlink(_)) {
                continue;
            }
            let place = self.plan.at(*number);
            let mut data = self.data(*number, inode);
            if place.inline {
                data.truncate(data.len() - data.len() % BLOCK_SIZE as usize);
            }
            if !data.is_empty() {
                self.pad_to((self.plan.data_start + u64::from(place.data_block)) * BLOCK_SIZE)?;
                self.put(&data)?;
            }
        }
        Ok(())
    }

    fn data(&self, number: u32, inode: &Inode) -> Vec<u8> {
        match &inode.kind {
            Kind::Symlink(target) => target.to_vec(),
            Kind::Directory { parent, children } => {
                let entries: Vec<(&[u8], u64, u8)> = sorted_names(children)
                    .into_iter()
                    .map(|name| match name {
                        b"." => (name, self.plan.nid(number), 2),
                        b".." => (name, self.plan.nid(*parent), 2),
                        _ => self.entry(name, children.get(name).map_or(0, |child| child.inode)),
                    })
                    .collect();
                encode_directory(&entries)
            }
            _ => Vec::new(),
        }
    }

    fn entry<'n>(&self, name: &'n [u8], inode: u32) -> (&'n [u8], u64, u8) {
        let kind = self.tree.inode(inode).map_or(0, |inode| dirent_type(&inode.kind));
        (name, self.plan.nid(inode), kind)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    pub(super) fn pad_to(&mut self, offset: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < offset {
            let len = (offset - self.at).min(ZEROS.len() as u64) as usize;
            self.put(ZEROS.get(..len).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }
}
