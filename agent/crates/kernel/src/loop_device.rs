//! Loop devices: a file becomes a block device, and the file under a device in use is exchanged.
//!
//! Between the FUSE file of a layer and EROFS. Knows nothing of what the file holds. Constants and structures are those
//! of `linux/loop.h`; `LOOP_CONFIGURE` exists since Linux 5.8, older kernels are configured step by step.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use thiserror::Error;

const LOOP_SET_FD: u32 = 0x4C00;
const LOOP_CLR_FD: u32 = 0x4C01;
const LOOP_SET_STATUS64: u32 = 0x4C04;
const LOOP_GET_STATUS64: u32 = 0x4C05;
const LOOP_CHANGE_FD: u32 = 0x4C06;
const LOOP_SET_DIRECT_IO: u32 = 0x4C08;
const LOOP_SET_BLOCK_SIZE: u32 = 0x4C09;
const LOOP_CONFIGURE: u32 = 0x4C0A;
const LOOP_CTL_ADD: u32 = 0x4C80;
const LOOP_CTL_GET_FREE: u32 = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

const CONTROL: &str = "/dev/loop-control";
/// How often another process may snatch the free device before we give up.
const ATTACH_ATTEMPTS: u32 = 64;
/// Loop numbers are minor numbers, 20 bits.
const MAX_LOOP_NUMBER: u32 = (1 << 20) - 1;

/// What can go wrong with a loop device.
#[derive(Debug, Error)]
pub enum LoopError {
    /// The control device cannot be opened: no loop driver, or no right to use it.
    #[error("cannot open {CONTROL}: is the loop driver there, and is this root?")]
    Control(#[source] io::Error),
    /// The kernel has a device for which this mount namespace has no node (a container without devtmpfs).
    #[error("the kernel offers loop{number}, but {} does not exist: /dev is not devtmpfs here; bind the host's /dev or make the node (b 7 {number})", path.display())]
    NodeMissing {
        /// The kernel's number.
        number: u32,
        /// Where the node was looked for.
        path: PathBuf,
    },
    /// The node exists but cannot be opened, or is no block device.
    #[error("cannot open {}", path.display())]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A request to the driver failed.
    #[error("{request} on {} failed", path.display())]
    Request {
        /// The name of the request.
        request: &'static str,
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Other processes took every free device that was offered.
    #[error("no free loop device after {ATTACH_ATTEMPTS} attempts")]
    NoneFree,
    /// The read-ahead of a device cannot be set.
    #[error("cannot write {}", path.display())]
    ReadAhead {
        /// The attribute in sysfs.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `/sys/block` cannot be read.
    #[error("cannot list loop devices")]
    List(#[source] io::Error),
}

/// `struct loop_info64`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo64 {
    const fn zeroed() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`, Linux 5.8.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// How a file is made a device. The device is always read-only.
#[derive(Debug, Clone, Copy)]
pub struct LoopOptions {
    /// Reads bypass the backing file's page cache.
    pub direct_io: bool,
    /// The device frees itself when its last user (descriptor or mount) goes.
    pub autoclear: bool,
    /// Logical block size in bytes: 512, 1024, 2048 or 4096.
    pub block_size_bytes: u32,
}

impl Default for LoopOptions {
    fn default() -> Self {
        Self { direct_io: true, autoclear: true, block_size_bytes: 4096 }
    }
}

/// State of a device, from `LOOP_GET_STATUS64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopStatus {
    /// `st_dev` of the backing file, in the kernel's `huge_encode_dev` form.
    pub backing_device: u64,
    /// Inode number of the backing file.
    pub backing_inode: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it frees itself.
    pub autoclear: bool,
    /// Whether reads bypass the page cache. The kernel turns this off when the backing file cannot do it.
    pub direct_io: bool,
}

/// An open loop device. While this lives an autoclear device stays; after a mount took it, it may be dropped.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    path: PathBuf,
    node: File,
}

/// A device in use, as `/sys/block` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopListing {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Path of the backing file as the kernel prints it (` (deleted)` appended when it is unlinked).
    pub backing_file: PathBuf,
}

impl LoopDevice {
    /// Makes `backing` (open for reading) a read-only block device; a new device is created when all are taken.
    pub fn attach(backing: BorrowedFd<'_>, options: LoopOptions) -> Result<Self, LoopError> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL).map_err(LoopError::Control)?;
        for _ in 0..ATTACH_ATTEMPTS {
            let number = free_number(control.as_fd())?;
            let device = Self::open(number)?;
            match device.configure(backing, options) {
                Ok(()) => return Ok(device),
                Err(LoopError::Request { source: Errno::EBUSY, .. }) => continue,
                Err(error) => return Err(error),
            }
        }
        Err(LoopError::NoneFree)
    }

    /// Opens `/dev/loopN`, whatever its state.
    pub fn open(number: u32) -> Result<Self, LoopError> {
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(&path);
        let node = match opened {
            Ok(node) => node,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(LoopError::NodeMissing { number, path });
            }
            Err(source) => return Err(LoopError::Open { path, source }),
        };
        let kind =
            node.metadata().map_err(|source| LoopError::Open { path: path.clone(), source })?.file_type();
        if !kind.is_block_device() {
            let source = io::Error::from_raw_os_error(libc::ENOTBLK);
            return Err(LoopError::Open { path, source });
        }
        Ok(Self { number, path, node })
    }

    /// N of `/dev/loopN`.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets how far the kernel reads ahead, in KiB.
    pub fn set_read_ahead_kib(&self, kib: u32) -> Result<(), LoopError> {
        let path = PathBuf::from(format!("/sys/block/loop{}/queue/read_ahead_kb", self.number));
        std::fs::write(&path, kib.to_string()).map_err(|source| LoopError::ReadAhead { path, source })
    }

    /// Reads that ended and reads that are under way (first and ninth field of `/sys/block/loopN/stat`, the kernel's
    /// Documentation/block/stat.rst). `None` where there is no such file to be read.
    pub fn reads(&self) -> Option<(u64, u64)> {
        let text = std::fs::read_to_string(format!("/sys/block/loop{}/stat", self.number)).ok()?;
        let mut fields = text.split_ascii_whitespace().map(str::parse);
        Some((fields.next()?.ok()?, fields.nth(7)?.ok()?))
    }

    /// Exchanges the file under the device, in use, for one of the same size and contents (`LOOP_CHANGE_FD`).
    ///
    /// The kernel wants both files regular, and refuses a different size with `EINVAL`.
    pub fn change_backing(&self, backing: BorrowedFd<'_>) -> Result<(), LoopError> {
        self.request("LOOP_CHANGE_FD", LOOP_CHANGE_FD, backing.as_raw_fd() as libc::c_ulong)
    }

    /// Frees the device; when it is in use, as soon as its last user goes.
    pub fn detach(&self) -> Result<(), LoopError> {
        self.request("LOOP_CLR_FD", LOOP_CLR_FD, 0)
    }

    /// Turns direct I/O on or off. `EINVAL` when the backing file cannot do it.
    pub fn set_direct_io(&self, on: bool) -> Result<(), LoopError> {
        self.request("LOOP_SET_DIRECT_IO", LOOP_SET_DIRECT_IO, libc::c_ulong::from(on))
    }

    /// Path of the file that backs the device, as [`LoopListing`] has it; none of a free device.
    pub fn backing_file(&self) -> Result<Option<PathBuf>, LoopError> {
        backing_file(self.number)
    }

    /// What backs the device and how. `ENXIO` when nothing does.
    pub fn status(&self) -> Result<LoopStatus, LoopError> {
        let mut info = LoopInfo64::zeroed();
        self.request("LOOP_GET_STATUS64", LOOP_GET_STATUS64, (&raw mut info) as libc::c_ulong)?;
        Ok(LoopStatus {
            backing_device: info.device,
            backing_inode: info.inode,
            read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
            autoclear: info.flags & LO_FLAGS_AUTOCLEAR != 0,
            direct_io: info.flags & LO_FLAGS_DIRECT_IO != 0,
        })
    }

    fn configure(&self, backing: BorrowedFd<'_>, options: LoopOptions) -> Result<(), LoopError> {
        let mut info = LoopInfo64::zeroed();
        info.flags = LO_FLAGS_READ_ONLY;
        if options.direct_io {
            info.flags |= LO_FLAGS_DIRECT_IO;
        }
        if options.autoclear {
            info.flags |= LO_FLAGS_AUTOCLEAR;
        }
        let fd = backing.as_raw_fd().cast_unsigned();
        let config = LoopConfig { fd, block_size: options.block_size_bytes, info, reserved: [0; 8] };
        match self.request("LOOP_CONFIGURE", LOOP_CONFIGURE, (&raw const config) as libc::c_ulong) {
            // An unbound device answers ENXIO to requests it does not know: Linux before 5.8.
            Err(LoopError::Request { source: Errno::ENXIO | Errno::ENOTTY | Errno::EINVAL, .. }) => {
                self.configure_stepwise(backing, info, options)
            }
            done => done,
        }
    }

    fn configure_stepwise(
        &self,
        backing: BorrowedFd<'_>,
        info: LoopInfo64,
        options: LoopOptions,
    ) -> Result<(), LoopError> {
        self.request("LOOP_SET_FD", LOOP_SET_FD, backing.as_raw_fd() as libc::c_ulong)?;
        let configured = self
            .request("LOOP_SET_BLOCK_SIZE", LOOP_SET_BLOCK_SIZE, options.block_size_bytes.into())
            .and_then(|()| {
                self.request("LOOP_SET_STATUS64", LOOP_SET_STATUS64, (&raw const info) as libc::c_ulong)
            })
            .and_then(|()| if options.direct_io { self.set_direct_io(true) } else { Ok(()) });
        match configured {
            Ok(()) => Ok(()),
            // Half a configuration must not stay behind; if it cannot even be taken back, that is the worse news.
            Err(error) => self.detach().and(Err(error)),
        }
    }

    fn request(&self, name: &'static str, request: u32, argument: libc::c_ulong) -> Result<(), LoopError> {
        loop {
            // SAFETY: the descriptor is open as long as `self`; `argument` is a number, or points to a live structure of
            // the layout that this request reads or writes, which every caller in this file upholds.
            let result = unsafe { libc::ioctl(self.node.as_raw_fd(), request as _, argument) };
            match Errno::result(result) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(source) => {
                    return Err(LoopError::Request { request: name, path: self.path.clone(), source });
                }
            }
        }
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.node.as_fd()
    }
}

fn free_number(control: BorrowedFd<'_>) -> Result<u32, LoopError> {
    control_request(control, "LOOP_CTL_GET_FREE", LOOP_CTL_GET_FREE, 0)
}

/// Creates `/dev/loopN` if it does not exist yet, e.g. to have devices ready before a burst of mounts.
pub fn add_device(number: u32) -> Result<(), LoopError> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL).map_err(LoopError::Control)?;
    match control_request(control.as_fd(), "LOOP_CTL_ADD", LOOP_CTL_ADD, number.into()) {
        Ok(_) | Err(LoopError::Request { source: Errno::EEXIST, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn control_request(
    control: BorrowedFd<'_>,
    name: &'static str,
    request: u32,
    argument: libc::c_ulong,
) -> Result<u32, LoopError> {
    // SAFETY: the descriptor is borrowed and open; both requests take a number by value, not a pointer.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request as _, argument) };
    Errno::result(result).map(i32::cast_unsigned).map_err(|source| LoopError::Request {
        request: name,
        path: PathBuf::from(CONTROL),
        source,
    })
}

/// The loop devices in use and what backs them, by number.
pub fn list() -> Result<Vec<LoopListing>, LoopError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").map_err(LoopError::List)? {
        let entry = entry.map_err(LoopError::List)?;
        let Some(number) = entry.file_name().to_str().and_then(parse_name) else { continue };
        if let Some(backing_file) = backing_file(number)? {
            found.push(LoopListing { number, backing_file });
        }
    }
    found.sort_unstable_by_key(|listing| listing.number);
    Ok(found)
}

fn backing_file(number: u32) -> Result<Option<PathBuf>, LoopError> {
    match std::fs::read(format!("/sys/block/loop{number}/loop/backing_file")) {
        Ok(text) => {
            let text = text.strip_suffix(b"\n").unwrap_or(&text);
            Ok(Some(PathBuf::from(OsStr::from_bytes(text))))
        }
        // The attribute goes with the backing file: the device is free, or was freed just now.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) || is_gone(&error) => Ok(None),
        Err(error) => Err(LoopError::List(error)),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV | libc::EIO))
}

/// N of `loopN`, without leading zeros or signs.
fn parse_name(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("loop")?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|number| *number <= MAX_LOOP_NUMBER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn structures_have_the_layout_of_linux_loop_h() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(offset_of!(LoopInfo64, number), 40);
        assert_eq!(offset_of!(LoopInfo64, flags), 52);
        assert_eq!(offset_of!(LoopInfo64, file_name), 56);
        assert_eq!(offset_of!(LoopInfo64, init), 216);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(offset_of!(LoopConfig, info), 8);
        assert_eq!(offset_of!(LoopConfig, reserved), 240);
    }

    #[test]
    fn names_parse_strictly() {
        for (name, number) in [
            ("loop0", Some(0)),
            ("loop17", Some(17)),
            ("loop", None),
            ("loop+1", None),
            ("loop0p1", None),
            ("sda", None),
            ("loop99999999999", None),
            ("loop1048576", None),
        ] {
            assert_eq!(parse_name(name), number, "{name}");
        }
    }
}
