//! Files: reflinks, copies within the kernel, holes, allocation, free space.
//!
//! Used by the layer store. Offsets and lengths are bytes.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use thiserror::Error;

/// `_IOW(0x94, 9, int)`.
const FICLONE: u32 = 0x4004_9409;
/// `_IOW(0x94, 13, struct file_clone_range)`.
const FICLONERANGE: u32 = 0x4020_940D;

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u32 = 0xC020_660B;
/// `linux/fiemap.h`: the last extent of the file; its blocks are other files' as well.
const FIEMAP_EXTENT_LAST: u32 = 1;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
const EXTENTS_AT_ONCE: usize = 128;

/// `linux/fs.h`.
const FS_NOATIME_FL: libc::c_int = 0x80;

/// What can go wrong with a file.
#[derive(Debug, Error)]
pub enum FileError {
    /// A request failed.
    #[error("{request} failed")]
    Request {
        /// System call or ioctl.
        request: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The source ended before all bytes were copied.
    #[error("the source ended {missing} bytes early")]
    Short {
        /// Bytes not copied.
        missing: u64,
    },
    /// An offset or length beyond what the kernel can say (2^63 - 1).
    #[error("{value} is beyond the largest file offset")]
    Range {
        /// The number.
        value: u64,
    },
    /// Space of a file system cannot be found out.
    #[error("statfs of {} failed", path.display())]
    Space {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// `struct file_clone_range` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// `struct fiemap_extent` of `linux/fiemap.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of `linux/fiemap.h`, with room for some extents.
#[repr(C)]
#[derive(Debug)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS_AT_ONCE],
}

/// Space of a file system in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total_bytes: u64,
    /// What unprivileged processes may still use.
    pub available_bytes: u64,
}

/// Makes `destination` share all blocks of `source`. `Ok(false)`: this file system, or this pair of files, cannot.
pub fn reflink(source: BorrowedFd<'_>, destination: BorrowedFd<'_>) -> Result<bool, FileError> {
    // SAFETY: both descriptors are borrowed and open; the request takes a descriptor by value.
    let result = unsafe { libc::ioctl(destination.as_raw_fd(), FICLONE as _, source.as_raw_fd()) };
    shared("FICLONE", result)
}

/// Gives a directory the attribute that times of access are not kept; what is made in it later gets it too.
pub fn set_no_atime(directory: BorrowedFd<'_>) -> Result<(), FileError> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed and open; the kernel writes an int, whatever the request's number says.
    let got = unsafe { libc::ioctl(directory.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut flags) };
    Errno::result(got).map_err(|source| FileError::Request { request: "FS_IOC_GETFLAGS", source })?;
    flags |= FS_NOATIME_FL;
    // SAFETY: the descriptor is borrowed and open; the kernel reads an int.
    let set = unsafe { libc::ioctl(directory.as_raw_fd(), libc::FS_IOC_SETFLAGS as _, &raw const flags) };
    Errno::result(set).map(drop).map_err(|source| FileError::Request { request: "FS_IOC_SETFLAGS", source })
}

/// Makes a range of `destination` share blocks with `source`; offsets and length are multiples of the file system's
/// block size (the length may be odd at the end of the source). `Ok(false)`: cannot be had here, copy instead.
pub fn reflink_range(
    source: BorrowedFd<'_>,
    source_offset: u64,
    destination: BorrowedFd<'_>,
    destination_offset: u64,
    length: u64,
) -> Result<bool, FileError> {
    if length == 0 {
        // To the kernel a length of zero means "to the end".
        return Ok(true);
    }
    let range = FileCloneRange {
        src_fd: source.as_raw_fd().into(),
        src_offset: source_offset,
        src_length: length,
        dest_offset: destination_offset,
    };
    // SAFETY: both descriptors are borrowed and open; `range` has the layout of struct file_clone_range and outlives the call.
    let result = unsafe { libc::ioctl(destination.as_raw_fd(), FICLONERANGE as _, &raw const range) };
    shared("FICLONERANGE", result)
}

fn shared(request: &'static str, result: libc::c_int) -> Result<bool, FileError> {
    match Errno::result(result) {
        Ok(_) => Ok(true),
        // Not supported, not one file system, not aligned, swap file or different DAX flags.
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EXDEV | Errno::EINVAL | Errno::ENOSYS) => Ok(false),
        Err(source) => Err(FileError::Request { request, source }),
    }
}

/// Where on the device those bytes of a file are that it shares with others, in the file's order. None where the file system cannot say.
pub fn shared_extents(file: BorrowedFd<'_>) -> Result<Vec<Range<u64>>, FileError> {
    let mut shared = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS_AT_ONCE as u32,
            reserved: 0,
            extents: [FiemapExtent::default(); EXTENTS_AT_ONCE],
        };
        // SAFETY: the descriptor is borrowed and open; `map` has the layout of struct fiemap with room for `extent_count` extents.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => return Ok(Vec::new()),
            Err(source) => return Err(FileError::Request { request: "FS_IOC_FIEMAP", source }),
        }
        let found = map.extents.get(..map.mapped_extents as usize).unwrap_or(&map.extents);
        for extent in found.iter().filter(|extent| extent.flags & FIEMAP_EXTENT_SHARED != 0) {
            shared.push(extent.physical..extent.physical.saturating_add(extent.length));
        }
        match found.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 => {
                start = last.logical.saturating_add(last.length);
            }
            _ => return Ok(shared),
        }
    }
}

/// Copies `length` bytes inside the kernel; file systems that can share blocks do.
/// `EXDEV`, `EOPNOTSUPP` and `ENOSYS` say that this pair of files must be copied by hand.
pub fn copy_range(
    source: BorrowedFd<'_>,
    source_offset: u64,
    destination: BorrowedFd<'_>,
    destination_offset: u64,
    length: u64,
) -> Result<(), FileError> {
    let (mut from, mut to) = (signed(source_offset)?, signed(destination_offset)?);
    let mut missing = length;
    while missing > 0 {
        let piece = usize::try_from(missing).unwrap_or(usize::MAX).min(1 << 30);
        match nix::fcntl::copy_file_range(source, Some(&mut from), destination, Some(&mut to), piece) {
            Ok(0) => return Err(FileError::Short { missing }),
            Ok(copied) => missing = missing.saturating_sub(copied as u64),
            Err(Errno::EINTR) => {}
            Err(source) => return Err(FileError::Request { request: "copy_file_range", source }),
        }
    }
    Ok(())
}

/// Gives the blocks of a range back; it reads as zeros, the size stays.
pub fn punch_hole(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), FileError> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate_with("fallocate(PUNCH_HOLE)", file, flags, offset, length)
}

/// Reserves blocks for a range; the size stays. `EOPNOTSUPP` where the file system cannot.
pub fn allocate(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), FileError> {
    allocate_with("fallocate", file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, length)
}

fn allocate_with(
    request: &'static str,
    file: BorrowedFd<'_>,
    flags: FallocateFlags,
    offset: u64,
    length: u64,
) -> Result<(), FileError> {
    if length == 0 {
        return Ok(());
    }
    let (offset, length) = (signed(offset)?, signed(length)?);
    loop {
        match nix::fcntl::fallocate(file.as_fd(), flags, offset, length) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(source) => return Err(FileError::Request { request, source }),
        }
    }
}

fn signed(value: u64) -> Result<i64, FileError> {
    i64::try_from(value).map_err(|_range| FileError::Range { value })
}

/// Reads through a mapping of the file, as programs read their code: by page faults. Bytes that are not there when the fault
/// comes (an I/O error, a file that became shorter) kill the process by SIGBUS; it is for measuring and testing.
pub fn read_mapped(file: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> Result<(), FileError> {
    let before = (offset % 4096) as usize;
    let start = signed(offset - before as u64)?;
    let length = before + buffer.len();
    let (flags, fd) = (libc::MAP_PRIVATE, file.as_raw_fd());
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory; the descriptor is open.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, flags, fd, start) };
    if place == libc::MAP_FAILED {
        return Err(FileError::Request { request: "mmap", source: Errno::last() });
    }
    // SAFETY: `before` is less than the mapping's length unless there is nothing to copy.
    let first = unsafe { place.cast::<u8>().add(before) };
    // SAFETY: the mapping holds `buffer.len()` bytes from `first` on and does not overlap a buffer that existed before.
    unsafe { std::ptr::copy_nonoverlapping(first, buffer.as_mut_ptr(), buffer.len()) };
    // SAFETY: the whole mapping of just now, to which no pointer is kept.
    let result = unsafe { libc::munmap(place, length) };
    Errno::result(result).map(drop).map_err(|source| FileError::Request { request: "munmap", source })
}

/// Space of the file system that holds `path`.
pub fn space(path: &Path) -> Result<Space, FileError> {
    let found =
        nix::sys::statvfs::statvfs(path).map_err(|source| FileError::Space { path: path.into(), source })?;
    #[allow(clippy::useless_conversion, reason = "the C types differ between architectures")]
    let (unit, blocks, free) =
        (u64::from(found.fragment_size()), u64::from(found.blocks()), u64::from(found.blocks_available()));
    Ok(Space { total_bytes: unit.saturating_mul(blocks), available_bytes: unit.saturating_mul(free) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_clone_structure_has_the_layout_of_linux_fs_h() {
        assert_eq!(size_of::<FileCloneRange>(), 32);
        assert_eq!(std::mem::offset_of!(FileCloneRange, dest_offset), 24);
    }

    #[test]
    fn the_map_of_extents_has_the_layout_of_linux_fiemap_h() {
        assert_eq!((size_of::<FiemapExtent>(), std::mem::offset_of!(FiemapExtent, flags)), (56, 40));
        assert_eq!(std::mem::offset_of!(Fiemap, extents), 32);
    }

    #[test]
    fn what_nobody_shares_has_no_shared_extents() {
        let file = filled(&[1; 100_000]);
        file.sync_all().expect("flushed");
        assert_eq!(shared_extents(file.as_fd()).expect("looked up"), []);
    }

    fn filled(bytes: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().expect("temporary file");
        file.write_all(bytes).expect("written");
        file
    }

    fn contents(file: &mut std::fs::File) -> Vec<u8> {
        let mut all = Vec::new();
        file.rewind().expect("seek");
        file.read_to_end(&mut all).expect("read");
        all
    }

    #[test]
    fn a_mapping_reads_what_is_in_the_file() {
        let bytes: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
        let file = filled(&bytes);
        for (offset, length) in [(0, 1), (4095, 2), (5000, 9000), (19_999, 1)] {
            let mut buffer = vec![0; length];
            read_mapped(file.as_fd(), offset, &mut buffer).expect("mapped");
            assert!(buffer == bytes[offset as usize..][..length], "{offset} {length}");
        }
    }

    #[test]
    fn ranges_are_copied_in_the_kernel() {
        let (from, mut to) = (filled(&[7; 10_000]), filled(&[1; 10_000]));
        copy_range(from.as_fd(), 100, to.as_fd(), 5000, 2000).expect("copied");
        let all = contents(&mut to);
        assert_eq!(all[4999..5001], [1, 7]);
        assert_eq!(all[6999..7001], [7, 1]);
        let error = copy_range(from.as_fd(), 9_000, to.as_fd(), 0, 2000).expect_err("too short");
        assert!(matches!(error, FileError::Short { missing: 1000 }), "{error}");
    }

    #[test]
    fn a_reflink_shares_or_says_no() {
        let (from, mut to) = (filled(&[7; 8192]), filled(&[1; 8192]));
        if reflink_range(from.as_fd(), 0, to.as_fd(), 4096, 4096).expect("an answer") {
            assert_eq!(contents(&mut to)[4095..4097], [1, 7]);
        } else {
            assert_eq!(contents(&mut to), [1; 8192]);
        }
        if reflink(from.as_fd(), to.as_fd()).expect("an answer") {
            assert_eq!(contents(&mut to), [7; 8192]);
        }
    }

    #[test]
    fn holes_give_blocks_back_and_read_as_zeros() {
        let mut file = filled(&[7; 1 << 20]);
        file.sync_all().expect("synced");
        let before = file.metadata().expect("stat").blocks();
        punch_hole(file.as_fd(), 4096, 1 << 19).expect("punched");
        assert!(file.metadata().expect("stat").blocks() < before);
        let all = contents(&mut file);
        assert_eq!((all.len(), all[4095], all[4096]), (1 << 20, 7, 0));
    }

    #[test]
    fn space_is_told() {
        let space = space(Path::new("/")).expect("statfs");
        assert!(space.total_bytes >= space.available_bytes);
    }
}
