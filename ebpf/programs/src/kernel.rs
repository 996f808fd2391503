//! Reading the kernel's structures, by offsets that the agent found in its type information.

use core::hint::black_box;

use aya_ebpf::helpers::{bpf_get_current_task, bpf_get_current_task_btf, bpf_probe_read_kernel};
use sluice_events::{ABSENT, EROFS_MAGIC, OVERLAY_MAGIC, OverlayFile};

use crate::maps::{offset, watch_of};

/// Some structure of the kernel. It may be null or garbage: every read is checked by the kernel.
pub type Pointer = *const u8;

/// A file of a watched file system.
#[derive(Clone, Copy)]
pub struct Watched {
    pub dev: u32,
    /// Number of the watch.
    pub watch: u32,
    pub inode: u64,
    /// Bytes of the file.
    pub size: u64,
}

/// Reads a field.
#[inline(always)]
pub fn read<T>(structure: Pointer, offset: u32) -> Option<T> {
    // SAFETY: the helper copies from any address, or fails.
    unsafe { bpf_probe_read_kernel(structure.wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// Reads a field of a structure whose type the verifier knows: an argument of a program that is loaded by the kernel's own types, the
/// running thread, or what a field of such a one points to. Costs a tenth of [`read`], and gives zeros of what is not there. Pointers can
/// be read through, but not be reckoned with.
#[inline(always)]
pub fn typed<T: Copy>(structure: Pointer, offset: u32) -> T {
    // SAFETY: the kernel catches loads from where nothing is.
    unsafe { structure.wrapping_add(offset as usize).cast::<T>().read_volatile() }
}

/// The running thread's `task_struct`.
#[inline(always)]
pub fn current() -> Pointer {
    // SAFETY: the helper only returns a pointer.
    unsafe { bpf_get_current_task() as Pointer }
}

/// Some words of a structure, read in one go: a read costs far more than what it copies.
pub struct Words<const N: usize> {
    at: Pointer,
    first: u32,
    words: [u64; N],
}

impl<const N: usize> Words<N> {
    /// Those from offset `first` on.
    #[inline(always)]
    pub fn read(at: Pointer, first: u32) -> Option<Self> {
        Some(Self { at, first, words: read(at, first)? })
    }

    /// The word at an offset of the structure. One that is elsewhere on this kernel is read by itself.
    #[inline(always)]
    pub fn get(&self, offset: u32) -> Option<u64> {
        // The verifier knows both numbers, so that one way remains.
        let distance = offset.wrapping_sub(self.first) as usize;
        if distance % 8 == 0 && distance / 8 < N {
            self.words.get(distance / 8).copied()
        } else {
            read(self.at, offset)
        }
    }
}

/// The open file behind a descriptor of the running thread.
#[inline(always)]
pub fn open_file(descriptor: u32) -> Option<Pointer> {
    let files: Pointer = read(current(), offset!(task_files))?;
    let words = Words::<3>::read(files, offset!(files_fdt))?;
    let table = words.get(offset!(files_fdt))? as Pointer;
    let own = offset!(files_fdtab);
    let array = if own != ABSENT && table == files.wrapping_add(own as usize) {
        words.get(own + offset!(fdtable_fd))? as Pointer
    } else {
        read(table, offset!(fdtable_fd))?
    };
    file_in(array, descriptor)
}

/// An open file that [`typed`] found, and whether it is itself to be read so.
pub enum TypedFile {
    Typed(Pointer),
    Plain(Pointer),
}

/// The same by [`typed`] reads. Those of an array's elements need constant places: so a file is typed where the process has its first
/// array of descriptors still, and this is one of the lowest, as that of a file which is opened, read and closed.
#[inline(always)]
pub fn typed_open_file(descriptor: u32) -> Option<TypedFile> {
    let files: Pointer = typed(typed_current(), offset!(task_files));
    let table: Pointer = typed(files, offset!(files_fdt));
    let (own, array) = (offset!(files_fdtab), offset!(files_fd_array));
    if own != ABSENT && array != ABSENT && table == files.wrapping_add(own as usize) {
        macro_rules! one_of {
            ($($number:literal)*) => {
                $(if descriptor == $number {
                    let place = black_box(array + $number * size_of::<Pointer>() as u32);
                    return Some(TypedFile::Typed(typed(files, place)));
                })*
            };
        }
        one_of!(3 4 5 6 7 8);
    }
    file_in(typed(table, offset!(fdtable_fd)), descriptor).map(TypedFile::Plain)
}

#[inline(always)]
fn file_in(array: Pointer, descriptor: u32) -> Option<Pointer> {
    read(array.wrapping_add(descriptor as usize * size_of::<Pointer>()), 0)
}

/// As [`current`], for [`typed`] reads. Since 5.11.
#[inline(always)]
fn typed_current() -> Pointer {
    // SAFETY: the helper only returns a pointer.
    unsafe { bpf_get_current_task_btf() as Pointer }
}

/// Inode number of the running thread's mount namespace; 0 for a thread that is going away.
#[inline(always)]
pub fn mount_namespace() -> u32 {
    let number = || {
        let nsproxy: Pointer = read(current(), offset!(task_nsproxy))?;
        let namespace: Pointer = read(nsproxy, offset!(nsproxy_mnt_ns))?;
        read::<u32>(namespace, offset!(mnt_ns_inum))
    };
    number().unwrap_or(0)
}

/// The same by [`typed`] reads.
#[inline(always)]
pub fn typed_mount_namespace() -> u32 {
    let nsproxy: Pointer = typed(typed_current(), offset!(task_nsproxy));
    let namespace: Pointer = typed(nsproxy, offset!(nsproxy_mnt_ns));
    typed(namespace, offset!(mnt_ns_inum))
}

/// An inode.
#[derive(Clone, Copy)]
pub struct Inode {
    pub number: u64,
    /// Bytes.
    pub size: u64,
    pub sb: Pointer,
    mapping: u64,
}

impl Inode {
    #[inline(always)]
    pub fn read(at: Pointer) -> Option<Self> {
        // From `i_sb` to `i_size` since 3.2.
        let words = Words::<6>::read(at, offset!(inode_sb))?;
        Some(Self {
            number: words.get(offset!(inode_ino))?,
            size: words.get(offset!(inode_size))?,
            sb: words.get(offset!(inode_sb))? as Pointer,
            mapping: words.get(offset!(inode_mapping))?,
        })
    }

    /// The one behind a mapping's pages: nearly always that which the mapping is a part of.
    #[inline(always)]
    pub fn of_mapping(mapping: Pointer) -> Option<Self> {
        if let Some(inode) = Self::read(mapping.wrapping_sub(offset!(inode_data) as usize))
            && inode.mapping == mapping as u64
        {
            return Some(inode);
        }
        Self::read(read(mapping, offset!(mapping_host))?)
    }

    /// The one behind an open file.
    #[inline(always)]
    pub fn of_file(file: Pointer) -> Option<Self> {
        Self::read(read(file, offset!(file_inode))?)
    }

    /// Whether its file system is an overlay.
    #[inline(always)]
    pub fn is_overlay(&self) -> Option<bool> {
        Some(read::<u64>(self.sb, offset!(sb_magic))? == OVERLAY_MAGIC)
    }

    /// Its numbers, if its file system is watched.
    #[inline(always)]
    pub fn watched(&self) -> Option<Watched> {
        let dev = read(self.sb, offset!(sb_dev))?;
        Some(Watched { dev, watch: watch_of(dev)?, inode: self.number, size: self.size })
    }
}

/// An inode's numbers, if its file system is watched, by [`typed`] reads.
#[inline(always)]
pub fn typed_watched(inode: Pointer) -> Option<Watched> {
    let sb: Pointer = typed(inode, offset!(inode_sb));
    let dev = typed(sb, offset!(sb_dev));
    let watch = watch_of(dev)?;
    let (inode, size) = (typed(inode, offset!(inode_ino)), typed(inode, offset!(inode_size)));
    Some(Watched { dev, watch, inode, size })
}

/// The watched file that an open file stands for, also through an overlay.
#[inline(always)]
pub fn watched_file(file: Pointer) -> Option<Watched> {
    let inode = Inode::of_file(file)?;
    if inode.is_overlay()? {
        return under_overlay(file);
    }
    inode.watched()
}

/// The watched file that an overlay's open file stands for.
///
/// What that keeps in `private_data` is the real file (until 6.12) or a structure that begins with it (6.13).
/// Where that is not known both are tried: the inode found must be of EROFS and of a watched device.
#[inline(always)]
pub fn under_overlay(file: Pointer) -> Option<Watched> {
    let private: Pointer = read(file, offset!(file_private))?;
    let known = offset!(overlay_file);
    if known == OverlayFile::Real as u32 {
        return Inode::of_file(private)?.watched();
    }
    let first: Pointer = read(private, 0)?;
    if known == OverlayFile::Structure as u32 {
        return Inode::of_file(first)?.watched();
    }
    of_erofs(private).or_else(|| of_erofs(first))
}

#[inline(always)]
fn of_erofs(file: Pointer) -> Option<Watched> {
    let inode = Inode::of_file(file)?;
    let magic: u64 = read(inode.sb, offset!(sb_magic))?;
    if magic != EROFS_MAGIC {
        return None;
    }
    inode.watched()
}
