//! Writes a merged tree as a standard EROFS image that holds metadata only.
//!
//! Format: Linux `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`. Inodes are the 64-byte extended ones.
//! Regular files are flat: one run of blocks in a *unified* address space in which the metadata image stands first and the
//! layers' files follow, each at the address its device slot names (`mapped_blkaddr`, Linux 5.16). The same addresses
//! serve the one-device form for older kernels, where metadata and layers stand in one device. Output is a function of the
//! tree alone.

use std::collections::BTreeMap;
use std::io::{self, Write};

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::merge::{Child, Inode, Kind, Tree};
use crate::records::BLOCK_SIZE;

pub mod reader;

const MAGIC: u32 = 0xE0F5_E1E2;
const SUPER_OFFSET: u64 = 1024;
const SLOT: u64 = 128;
const INODE: u64 = 64;
const NID_UNIT: u64 = 32;
const INCOMPAT_DEVICE_TABLE: u32 = 8;
const COMPAT_MTIME: u32 = 2;
const DIRENT: usize = 12;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const NAME_MAX: usize = 255;
/// The kernel's `PATH_MAX` without the NUL.
const TARGET_MAX: usize = 4095;

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// A limit of the format or of the kernel.
    #[error("`{name}`: {what}")]
    Limit {
        /// A file name or attribute name.
        name: String,
        /// The limit.
        what: &'static str,
    },
    /// More than 16 TiB, or more devices than a table holds.
    #[error("the image's layers do not fit EROFS: {0}")]
    TooLarge(&'static str),
    /// An index says that a file's content is where its layer has none: it would read metadata or another layer.
    #[error(
        "layer {layer}: {size} bytes at store offset {store_offset} are outside its {blocks} blocks, or not at a block"
    )]
    OutsideLayer {
        /// Number of the layer, from 0.
        layer: usize,
        /// Where the content is said to be, in bytes.
        store_offset: u64,
        /// How long, in bytes.
        size: u64,
        /// Blocks of the layer's file.
        blocks: u64,
    },
    /// The image could not be written.
    #[error("cannot write the EROFS image")]
    Write(#[from] io::Error),
}

/// How layers are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A device per layer that holds content, in order.
    Devices,
    /// Metadata and layers one after another in one device.
    OneDevice,
}

/// What was written, and where layers are in the unified address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the metadata image.
    pub bytes: u64,
    /// Inodes that a name leads to.
    pub inodes: u64,
    /// Per layer its first byte in the unified address space (one-device form); layers without content have none.
    pub layer_offsets: Vec<Option<u64>>,
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SuperBlock {
    magic: U32,
    checksum: U32,
    feature_compat: U32,
    block_bits: u8,
    ext_slots: u8,
    root_nid: U16,
    inodes: U64,
    build_time: U64,
    build_time_nsec: U32,
    blocks: U32,
    meta_block: U32,
    xattr_block: U32,
    uuid: [u8; 16],
    volume_name: [u8; 16],
    feature_incompat: U32,
    compression: U16,
    extra_devices: U16,
    device_slot: U16,
    dir_block_bits: u8,
    xattr_prefixes: u8,
    xattr_prefix_start: U32,
    packed_nid: U64,
    reserved: [u8; 24],
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DeviceSlot {
    tag: [u8; 64],
    blocks: U32,
    mapped_block: U32,
    reserved: [u8; 56],
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskInode {
    format: U16,
    xattr_count: U16,
    mode: U16,
    reserved: U16,
    size: U64,
    address: U32,
    number: U32,
    uid: U32,
    gid: U32,
    mtime: U64,
    mtime_nsec: U32,
    links: U32,
    reserved2: [u8; 16],
}

/// Where one inode goes.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Byte offset of the inode; 0: no name leads to it.
    offset: u64,
    /// First data block, relative to the data area (directories and long symlinks).
    data_block: u32,
    /// Data size in bytes.
    size: u64,
    inline: bool,
}

/// Writes `tree`. `layer_blocks` gives, per layer in the order they were applied, the blocks of its local file.
pub fn write(
    tree: &Tree,
    layer_blocks: &[u64],
    form: Form,
    out: &mut impl Write,
) -> Result<Written, ErofsError> {
    let devices = layer_blocks.iter().filter(|blocks| **blocks > 0).count();
    let slots = if form == Form::Devices { devices } else { 0 };
    let plan = Plan::new(tree, SUPER_OFFSET + SLOT + slots as u64 * SLOT)?;
    plan.check_contents(tree, layer_blocks)?;
    let bases = plan.layer_bases(layer_blocks)?;
    let mut writer = Writer { tree, plan: &plan, bases: &bases, out, at: 0 };
    writer.super_block(layer_blocks, slots)?;
    writer.inodes()?;
    writer.directories()?;
    writer.pad_to(plan.total_blocks() * BLOCK_SIZE)?;
    let layer_offsets = bases.iter().map(|base| base.map(|base| u64::from(base) * BLOCK_SIZE)).collect();
    Ok(Written { bytes: writer.at, inodes: plan.order.len() as u64, layer_offsets })
}

/// Every inode's place.
struct Plan {
    places: Vec<Place>,
    /// Inodes in the order they are written.
    order: Vec<u32>,
    /// First block of directory and symlink data.
    data_start: u64,
    data_blocks: u64,
}

impl Plan {
    fn new(tree: &Tree, start: u64) -> Result<Self, ErofsError> {
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
    fn check_contents(&self, tree: &Tree, layer_blocks: &[u64]) -> Result<(), ErofsError> {
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

    fn total_blocks(&self) -> u64 {
        self.data_start + self.data_blocks
    }

    fn at(&self, number: u32) -> Place {
        self.places.get(number as usize).copied().unwrap_or_default()
    }

    fn nid(&self, number: u32) -> u64 {
        self.at(number).offset / NID_UNIT
    }

    /// First block of each layer in the unified address space.
    fn layer_bases(&self, layer_blocks: &[u64]) -> Result<Vec<Option<u32>>, ErofsError> {
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

struct Writer<'a, W> {
    tree: &'a Tree,
    plan: &'a Plan,
    bases: &'a [Option<u32>],
    out: &'a mut W,
    at: u64,
}

impl<W: Write> Writer<'_, W> {
    fn super_block(&mut self, layer_blocks: &[u64], slots: usize) -> Result<(), ErofsError> {
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

    fn inodes(&mut self) -> Result<(), ErofsError> {
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
    fn directories(&mut self) -> Result<(), ErofsError> {
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

    fn pad_to(&mut self, offset: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < offset {
            let len = (offset - self.at).min(ZEROS.len() as u64) as usize;
            self.put(ZEROS.get(..len).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }
}

fn dirent_type(kind: &Kind) -> u8 {
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
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

/// How many of `sizes` (name lengths, in order) fit the first block, and the bytes they take.
fn fill_block(sizes: impl Iterator<Item = usize>) -> (usize, usize) {
    let mut used = 0;
    let mut count = 0;
    for size in sizes {
        if used + DIRENT + size > BLOCK_SIZE as usize {
            break;
        }
        used += DIRENT + size;
        count += 1;
    }
    (count, used)
}

/// Names of a directory in the order EROFS looks them up by, `.` and `..` among them.
fn sorted_names(children: &BTreeMap<Box<[u8]>, Child>) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = children.keys().map(|name| &**name).collect();
    for dots in [&b"."[..], b".."] {
        let at = names.partition_point(|name| *name < dots);
        names.insert(at, dots);
    }
    names
}

/// Bytes of a directory with these names.
fn directory_size(names: &[&[u8]]) -> u64 {
    let mut rest = names;
    let mut size = 0;
    loop {
        let (count, used) = fill_block(rest.iter().map(|name| name.len()));
        rest = rest.get(count.max(1)..).unwrap_or(&[]);
        if rest.is_empty() {
            return size + used as u64;
        }
        size += BLOCK_SIZE;
    }
}

/// Directory blocks: entries at the front, names behind, sorted over the whole directory.
fn encode_directory(names: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        let (count, _) = fill_block(rest.iter().map(|(name, ..)| name.len()));
        let (block, after) = rest.split_at_checked(count.max(1)).unwrap_or((rest, &[]));
        let start = out.len();
        let mut name_offset = block.len() * DIRENT;
        for (name, nid, kind) in block {
            out.extend_from_slice(&nid.to_le_bytes());
            out.extend_from_slice(&(name_offset as u16).to_le_bytes());
            out.extend_from_slice(&[*kind, 0]);
            name_offset += name.len();
        }
        for (name, ..) in block {
            out.extend_from_slice(name);
        }
        if !after.is_empty() {
            out.resize(start + BLOCK_SIZE as usize, 0);
        }
        rest = after;
    }
    out
}

/// EROFS's number of an attribute's prefix, and the rest of its name. `None`: no kernel keeps such a name.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
            .into_iter()
            .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
            .filter(|(_, rest)| !rest.is_empty()),
    }
}

fn xattr_bytes(set: &[(Vec<u8>, Vec<u8>)]) -> Result<u64, ErofsError> {
    let mut bytes = 0;
    for (name, value) in set {
        let Some((_, rest)) = xattr_prefix(name) else { continue };
        if rest.len() > NAME_MAX || value.len() > usize::from(u16::MAX) {
            return Err(limit(name, "an extended attribute's name has at most 255 bytes, its value 65,535"));
        }
        bytes += (4 + rest.len() + value.len()).next_multiple_of(4) as u64;
    }
    if bytes > 4 * u64::from(u16::MAX - 1) {
        return Err(ErofsError::TooLarge("a file's extended attributes take more than 256 KiB"));
    }
    Ok(if bytes == 0 { 0 } else { 12 + bytes })
}

fn encode_xattrs(set: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<u8>, ErofsError> {
    let len = xattr_bytes(set)? as usize;
    let mut out = Vec::with_capacity(len);
    if len == 0 {
        return Ok(out);
    }
    // The header: no name filter, no shared attributes.
    out.resize(12, 0);
    for (name, value) in set {
        let Some((index, rest)) = xattr_prefix(name) else { continue };
        out.extend_from_slice(&[rest.len() as u8, index]);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    Ok(out)
}

fn limit(name: &[u8], what: &'static str) -> ErofsError {
    ErofsError::Limit { name: String::from_utf8_lossy(name).into_owned(), what }
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
