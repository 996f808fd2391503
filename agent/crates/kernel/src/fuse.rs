//! FUSE: mounting, and the switch for FUSE over io_uring.
//!
//! The way of fuser mounts by itself; this is for the way over io_uring, whose INIT fuser does not speak.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::fsopen::Context;
use crate::mount::{MountError, Plan, Restrictions};

/// The parameter of the fuse module that allows FUSE over io_uring (Linux 6.14); off unless somebody turns it on.
pub const URING_PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// `FUSE_OVER_IO_URING` of INIT (Linux 6.14): offered while [`URING_PARAMETER`] is on.
pub const OVER_IO_URING: u64 = 1 << 41;
/// `FUSE_HAS_IO_URING_BUFPOOL` of INIT (Linux 7.3): io_uring with zero copy.
pub const IO_URING_BUFPOOL: u64 = 1 << 43;
/// A read of `/dev/fuse` must have room for as much (`FUSE_MIN_READ_BUFFER`).
const MIN_READ_BUFFER: usize = 8192;
/// Where INIT has its flags, behind `struct fuse_in_header`: the lower half, and since 5.17 the upper.
const INIT_FLAGS: [usize; 2] = [40 + 12, 40 + 16];

/// What the kernel offers to FUSE servers: the flags of its INIT (`linux/fuse.h`). Nothing is mounted anywhere. Needs root and Linux 5.2.
pub fn offered() -> io::Result<u64> {
    let mut device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let context = Context::open(c"fuse")?;
    let number = device.as_raw_fd().to_string();
    let options = [(c"fd", number.as_str()), (c"rootmode", "40000"), (c"user_id", "0"), (c"group_id", "0")];
    options.iter().try_for_each(|(key, value)| context.string(key, value.as_bytes()))?;
    let _mounted = context.create(0)?;
    let mut init = [0; MIN_READ_BUFFER];
    let length = device.read(&mut init)?;
    let word = |at: usize| {
        let bytes = init.get(..length).and_then(|init| init.get(at..at + 4));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    let [low, high] = INIT_FLAGS.map(word);
    Ok(u64::from(low) | u64::from(high) << 32)
}

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
