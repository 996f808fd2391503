//! FUSE: mounting, and the switch for FUSE over io_uring.
//!
//! The way of fuser mounts by itself; this is for the way over io_uring, whose INIT fuser does not speak.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::mount::{MountError, Plan, Restrictions};

/// The parameter of the fuse module that allows FUSE over io_uring (Linux 6.14); off unless somebody turns it on.
pub const URING_PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// Mounts a FUSE file system of root's own on `target`; its requests are read from what is returned, INIT first.
pub fn mount_fuse(source: &str, restrictions: Restrictions, target: &Path) -> Result<File, MountError> {
    let path = Path::new("/dev/fuse");
    let opened = OpenOptions::new().read(true).write(true).open(path);
    let device = opened.map_err(|source| MountError::Open { path: path.into(), source })?;
    let mut plan =
        Plan { kind: "fuse", name: c"fuse", source: source.into(), options: Vec::new(), restrictions };
    plan.push(c"fd", device.as_raw_fd().to_string().as_bytes());
    plan.push(c"rootmode", b"40000");
    plan.push(c"user_id", b"0");
    plan.push(c"group_id", b"0");
    plan.mount_new(target).or_else(|failure| plan.fall_back(target, failure, true))?;
    Ok(device)
}

/// Whether FUSE over io_uring is allowed for new mounts, after allowing it if it was not. Connections keep what they have.
///
/// `NotFound`: the kernel is older than 6.14 or was built without it. `PermissionDenied`: a container's read-only sysfs.
pub fn enable_uring() -> io::Result<()> {
    let text = std::fs::read_to_string(URING_PARAMETER)?;
    if matches!(text.trim(), "Y" | "1") { Ok(()) } else { std::fs::write(URING_PARAMETER, "Y") }
}
