//! Writes a merged tree as a standard EROFS image that holds metadata only.
//!
//! Format: Linux `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`. Inodes are the 64-byte extended ones.
//! Regular files are flat: one run of blocks in a *unified* address space in which the metadata image stands first and the
//! layers' files follow, each at the address its device slot names (`mapped_blkaddr`, Linux 5.16). The same addresses
//! serve the one-device form for older kernels, where metadata and layers stand in one device. Output is a function of the
//! tree alone.

use std::io::{self, Write};

use self::format::{INCOMPAT_DEVICE_TABLE, INCOMPAT_OFFSET, SLOT, SUPER_OFFSET};
use self::plan::Plan;
use self::writer::Writer;
use crate::merge::Tree;
use crate::records::BLOCK_SIZE;

mod directory;
mod format;
mod plan;
pub mod reader;
mod writer;
mod xattr;

pub(crate) use xattr::xattr_prefix;

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

/// Whether an image wants a device per layer, or all in one.
pub fn has_devices(image: &impl reader::ReadAt) -> io::Result<bool> {
    let mut features = [0; 4];
    image.read_exact_at(&mut features, SUPER_OFFSET + INCOMPAT_OFFSET)?;
    Ok(u32::from_le_bytes(features) & INCOMPAT_DEVICE_TABLE != 0)
}

fn limit(name: &[u8], what: &'static str) -> ErofsError {
    ErofsError::Limit { name: String::from_utf8_lossy(name).into_owned(), what }
}
