//! Loop devices: read-only, direct I/O, 4096-byte blocks, released by the kernel when nobody uses them.
//!
//! Numbers and structures: `include/uapi/linux/loop.h` (LOOP_CONFIGURE since 5.8).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{KernelError, Tried};

const LOOP_CONTROL: &str = "/dev/loop-control";
const LOOP_CHANGE_FD: libc::c_ulong = 0x4C06;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Another process may take the free device between the two calls.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
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

/// `struct loop_config`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device held open: it stays attached while this, or a mount, uses it.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    device: File,
}

impl LoopDevice {
    /// Attaches `backing` (opened read-only) to a free device.
    pub fn attach(backing: BorrowedFd<'_>, name: &Path) -> Result<Self, KernelError> {
        let control =
            OpenOptions::new().read(true).write(true).open(LOOP_CONTROL).tried("cannot open", LOOP_CONTROL)?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..ATTEMPTS {
            let number = ioctl(control.as_fd(), LOOP_CTL_GET_FREE, 0).tried("no free loop device for", name)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = OpenOptions::new().read(true).open(&path).tried("cannot open", &path)?;
            match configure(device.as_fd(), backing, LO_FLAGS_DIRECT_IO) {
                Ok(()) => return Ok(Self { number: number.cast_unsigned(), device }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
                Err(error) => return Err(error).tried("cannot attach to a loop device", name),
            }
        }
        Err(last).tried("cannot attach to a loop device", name)
    }

    /// Opens a device that is attached already.
    pub fn open(number: u32) -> Result<Self, KernelError> {
        let path = device_path(number);
        let device = OpenOptions::new().read(true).open(&path).tried("cannot open", &path)?;
        Ok(Self { number, device })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> PathBuf {
        device_path(self.number)
    }

    /// N of `/dev/loopN`.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Switches the device, in use, to `backing`: a regular file of the same size with the same content.
    pub fn change_backing(&self, backing: BorrowedFd<'_>) -> Result<(), KernelError> {
        ioctl(self.device.as_fd(), LOOP_CHANGE_FD, backing.as_raw_fd() as libc::c_ulong)
            .tried("cannot change the file behind", self.path())
            .map(|_| ())
    }

    /// Detaches the file once the last user is gone.
    pub fn detach(&self) -> Result<(), KernelError> {
        ioctl(self.device.as_fd(), LOOP_CLR_FD, 0).tried("cannot detach", self.path()).map(|_| ())
    }

    /// Sets how far the kernel reads ahead, in KiB.
    pub fn set_read_ahead_kib(&self, kib: u32) -> Result<(), KernelError> {
        let path = PathBuf::from(format!("/sys/block/loop{}/queue/read_ahead_kb", self.number));
        std::fs::write(&path, kib.to_string()).tried("cannot write", path)
    }
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Attached devices and the files behind them, as sysfs shows them.
pub fn attached() -> Result<Vec<(u32, PathBuf)>, KernelError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").tried("cannot list", "/sys/block")? {
        let entry = entry.tried("cannot list", "/sys/block")?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok()) else { continue };
        match std::fs::read(entry.path().join("loop/backing_file")) {
            Ok(mut bytes) => {
                if bytes.last() == Some(&b'\n') {
                    bytes.pop();
                }
                found.push((number, PathBuf::from(std::ffi::OsString::from_vec(bytes))));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).tried("cannot read the backing file of", entry.path()),
        }
    }
    Ok(found)
}

fn configure(device: BorrowedFd<'_>, backing: BorrowedFd<'_>, extra_flags: u32) -> io::Result<()> {
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | extra_flags,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config =
        LoopConfig { fd: backing.as_raw_fd().cast_unsigned(), block_size: 4096, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`; `config` is one (sizes and offsets tested below) and
    // outlives the call. Both descriptors are borrowed, hence open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl whose argument is a number.
fn ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests used here (LOOP_CTL_GET_FREE, LOOP_CHANGE_FD, LOOP_CLR_FD) take a number, not a
    // pointer; the descriptor is borrowed, hence open.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(offset_of!(LoopInfo64, flags), 52);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(offset_of!(LoopConfig, info), 8);
    }

    #[test]
    fn a_device_changes_its_file_and_goes_away() {
        let make = |byte: u8| {
            let file = tempfile::NamedTempFile::new().expect("file");
            std::fs::write(file.path(), vec![byte; 65536]).expect("write");
            file
        };
        let (first, second) = (make(1), make(2));
        let number = {
            let device =
                LoopDevice::attach(first.as_file().as_fd(), first.path()).expect("attach (needs root and loop)");
            let reader = File::open(device.path()).expect("open");
            let mut buffer = [0; 4096];
            reader.read_exact_at(&mut buffer, 0).expect("read");
            assert_eq!(buffer, [1; 4096]);
            assert!(attached().expect("list").iter().any(|(number, path)| {
                *number == device.number() && path == first.path()
            }));
            let change = File::open(second.path()).expect("open");
            device.change_backing(change.as_fd()).expect("change");
            reader.read_exact_at(&mut buffer, 8192).expect("read");
            assert_eq!(buffer, [2; 4096]);
            device.number()
        };
        let gone = attached().expect("list").iter().all(|(left, path)| *left != number || path != second.path());
        assert!(gone, "autoclear releases the device with its last user");
    }
}
