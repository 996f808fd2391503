//! Reading the kernel's structures, by offsets that the agent found in its type information.

use aya_ebpf::helpers::{bpf_get_current_task, bpf_probe_read_kernel};
use sluice_events::{EROFS_MAGIC, OVERLAY_MAGIC, OverlayFile};

use crate::maps::{WATCHED, offset};

/// Some structure of the kernel. It may be null or garbage: every read is checked by the kernel.
pub type Pointer = *const u8;

/// A file of a watched file system.
#[derive(Clone, Copy)]
pub struct Watched {
    pub dev: u32,
    /// Number of the watch.
    pub watch: u32,
    pub inode: u64,
}

/// Reads a field.
#[inline(always)]
pub fn read<T>(structure: Pointer, offset: u32) -> Option<T> {
    // SAFETY: the helper copies from any address, or fails.
    unsafe { bpf_probe_read_kernel(structure.wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// The running thread's `task_struct`.
#[inline(always)]
pub fn current() -> Pointer {
    // SAFETY: the helper only returns a pointer.
    unsafe { bpf_get_current_task() as Pointer }
}

/// The open file behind a descriptor of the running thread.
#[inline(always)]
pub fn open_file(descriptor: u32) -> Option<Pointer> {
    let files: Pointer = read(current(), offset!(task_files))?;
    let table: Pointer = read(files, offset!(files_fdt))?;
    let array: Pointer = read(table, offset!(fdtable_fd))?;
    read(array.wrapping_add(descriptor as usize * size_of::<Pointer>()), 0)
}

/// Inode number of the running thread's mount namespace; 0 for a thread that is going away.
#[inline(always)]
pub fn mount_namespace() -> u32 {
    let number = || {
        let proxy: Pointer = read(current(), offset!(task_nsproxy))?;
        let namespace: Pointer = read(proxy, offset!(nsproxy_mnt_ns))?;
        read::<u32>(namespace, offset!(mnt_ns_inum))
    };
    number().unwrap_or(0)
}

/// The inode's numbers, if its file system is watched.
#[inline(always)]
pub fn watched_inode(inode: Pointer) -> Option<Watched> {
    let sb: Pointer = read(inode, offset!(inode_sb))?;
    let dev: u32 = read(sb, offset!(sb_dev))?;
    // SAFETY: a number that is exchanged meanwhile is one of two right ones.
    let watch = *unsafe { WATCHED.get(&dev) }?;
    Some(Watched { dev, watch, inode: read(inode, offset!(inode_ino))? })
}

/// The inode behind a mapping's pages, and its numbers if its file system is watched.
#[inline(always)]
pub fn watched_mapping(mapping: Pointer) -> Option<(Pointer, Watched)> {
    let host: Pointer = read(mapping, offset!(mapping_host))?;
    Some((host, watched_inode(host)?))
}

/// The watched file that an open file stands for, also through an overlay.
///
/// What an overlay's file keeps in `private_data` is the real file (until 6.12) or a structure that begins with it (6.13).
/// Where that is not known both are tried: the inode found must be of EROFS and of a watched device.
#[inline(always)]
pub fn watched_file(file: Pointer) -> Option<Watched> {
    let inode: Pointer = read(file, offset!(file_inode))?;
    let sb: Pointer = read(inode, offset!(inode_sb))?;
    let magic: u64 = read(sb, offset!(sb_magic))?;
    if magic != OVERLAY_MAGIC {
        return watched_inode(inode);
    }
    let private: Pointer = read(file, offset!(file_private))?;
    let known = offset!(overlay_file);
    if known != OverlayFile::Structure as u32 {
        let found = real_file(private);
        if found.is_some() || known == OverlayFile::Real as u32 {
            return found;
        }
    }
    real_file(read(private, 0)?)
}

#[inline(always)]
fn real_file(file: Pointer) -> Option<Watched> {
    let inode: Pointer = read(file, offset!(file_inode))?;
    let sb: Pointer = read(inode, offset!(inode_sb))?;
    let magic: u64 = read(sb, offset!(sb_magic))?;
    if magic != EROFS_MAGIC {
        return None;
    }
    watched_inode(inode)
}
