//! The on-disk structures: Linux `fs/erofs/erofs_fs.h`.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::merge::Kind;

pub(super) const MAGIC: u32 = 0xE0F5_E1E2;
pub(super) const SUPER_OFFSET: u64 = 1024;
pub(super) const SLOT: u64 = 128;
pub(super) const INODE: u64 = 64;
pub(super) const NID_UNIT: u64 = 32;
pub(super) const INCOMPAT_DEVICE_TABLE: u32 = 8;
/// Where the superblock's incompatible features are.
pub(super) const INCOMPAT_OFFSET: u64 = 80;
pub(super) const COMPAT_MTIME: u32 = 2;
pub(super) const DIRENT: usize = 12;
pub(super) const LAYOUT_PLAIN: u16 = 0;
pub(super) const LAYOUT_INLINE: u16 = 2;
pub(super) const NAME_MAX: usize = 255;

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SuperBlock {
    pub(super) magic: U32,
    pub(super) checksum: U32,
    pub(super) feature_compat: U32,
    pub(super) block_bits: u8,
    pub(super) ext_slots: u8,
    pub(super) root_nid: U16,
    pub(super) inodes: U64,
    pub(super) build_time: U64,
    pub(super) build_time_nsec: U32,
    pub(super) blocks: U32,
    pub(super) meta_block: U32,
    pub(super) xattr_block: U32,
    pub(super) uuid: [u8; 16],
    pub(super) volume_name: [u8; 16],
    pub(super) feature_incompat: U32,
    pub(super) compression: U16,
    pub(super) extra_devices: U16,
    pub(super) device_slot: U16,
    pub(super) dir_block_bits: u8,
    pub(super) xattr_prefixes: u8,
    pub(super) xattr_prefix_start: U32,
    pub(super) packed_nid: U64,
    pub(super) reserved: [u8; 24],
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct DeviceSlot {
    pub(super) tag: [u8; 64],
    pub(super) blocks: U32,
    pub(super) mapped_block: U32,
    pub(super) reserved: [u8; 56],
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct DiskInode {
    pub(super) format: U16,
    pub(super) xattr_count: U16,
    pub(super) mode: U16,
    pub(super) reserved: U16,
    pub(super) size: U64,
    pub(super) address: U32,
    pub(super) number: U32,
    pub(super) uid: U32,
    pub(super) gid: U32,
    pub(super) mtime: U64,
    pub(super) mtime_nsec: U32,
    pub(super) links: U32,
    pub(super) reserved2: [u8; 16],
}

pub(super) fn dirent_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory { .. } => 2,
        Kind::CharDevice(..) => 3,
        Kind::BlockDevice(..) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// The kernel's `new_encode_dev`.
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<SuperBlock>(), 128);
        assert_eq!(size_of::<DeviceSlot>(), 128);
        assert_eq!(size_of::<DiskInode>(), 64);
        assert_eq!(encode_device(8, 1), 0x801);
        assert_eq!(encode_device(259, 0x1_2345), 0x1234_5000 & 0xfff0_0000 | 259 << 8 | 0x45);
    }
}
