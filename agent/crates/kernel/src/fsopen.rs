//! The mount interface of Linux 5.2: `fsopen`, `fsconfig`, `fsmount`, `move_mount`.
//!
//! Options are given one at a time, so that their sum is not limited to a page, and the kernel says in words what it did
//! not like. Only `mount` and `abilities` use it.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

pub(crate) const ATTR_RDONLY: u32 = 1;
pub(crate) const ATTR_NOSUID: u32 = 2;
pub(crate) const ATTR_NODEV: u32 = 4;
pub(crate) const ATTR_NOEXEC: u32 = 8;

/// `fsconfig` refuses strings of this length and more.
pub(crate) const MAX_VALUE: usize = 256;

/// A file system being configured.
#[derive(Debug)]
pub(crate) struct Context {
    fd: File,
}

/// A file system that is mounted nowhere yet.
#[derive(Debug)]
pub(crate) struct Detached {
    fd: OwnedFd,
}

impl Context {
    /// Opens a context; loads the file system's module if need be. `ENODEV`: the kernel does not have it.
    pub(crate) fn open(kind: &CStr) -> Result<Self, Errno> {
        // SAFETY: `kind` is NUL-terminated and outlives the call; the kernel only reads it.
        let result = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        Ok(Self { fd: File::from(owned(result)?) })
    }

    /// Sets an option that has no value.
    pub(crate) fn flag(&self, key: &CStr) -> Result<(), Errno> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Sets an option; values of [`MAX_VALUE`] bytes or more are refused by the kernel.
    pub(crate) fn string(&self, key: &CStr, value: &[u8]) -> Result<(), Errno> {
        let value = CString::new(value).map_err(|_nul| Errno::EINVAL)?;
        self.config(FSCONFIG_SET_STRING, Some(key), Some(&value))
    }

    /// Makes the file system and a mount of it with `attributes`.
    pub(crate) fn create(&self, attributes: u32) -> Result<Detached, Errno> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        let fd = self.fd.as_raw_fd();
        // SAFETY: the descriptor is open as long as `self`; the other arguments are numbers.
        let result = unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes) };
        Ok(Detached { fd: owned(result)? })
    }

    /// What the kernel has said about this context so far, messages joined by `; `.
    pub(crate) fn messages(&mut self) -> String {
        let mut said = Vec::new();
        let mut buffer = [0; 1024];
        // Each read gives one message; ENODATA ends the list.
        while let Ok(length @ 1..) = self.fd.read(&mut buffer) {
            said.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
        }
        said.join("; ")
    }

    fn config(&self, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> Result<(), Errno> {
        let fd = self.fd.as_raw_fd();
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let value = value.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: the descriptor is open as long as `self`; key and value are null or NUL-terminated and outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
        Errno::result(result).map(drop)
    }
}

impl Detached {
    /// Puts the mount where `target` is.
    pub(crate) fn attach(self, target: &Path) -> Result<(), Errno> {
        use std::os::unix::ffi::OsStrExt;
        let target = CString::new(target.as_os_str().as_bytes()).map_err(|_nul| Errno::EINVAL)?;
        let from = self.fd.as_raw_fd();
        // SAFETY: `from` is open as long as `self`; both paths are NUL-terminated and outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                from,
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        Errno::result(result).map(drop)
    }
}

fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_range| Errno::EBADF)?;
    // SAFETY: the kernel just returned this descriptor to us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
