//! What a failed call was about, where the kernel's record does not say: looked up in the mount namespace of the caller.
//!
//! The caller may be gone (`mv` ends right after its failure), but some process of its mount namespace is mostly there: the
//! container's first one.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, fstat};
use sluice_kernel::mountinfo;
use sluice_trace::{FailedCall, Process};

/// Fills in inode number and mode, if the file can still be found.
pub(crate) fn complete(call: &mut FailedCall, process: &Process) {
    if call.mode.is_some() || !call.whole_path {
        return;
    }
    let same = |pid: u32| mount_namespace_of(pid) == Some(process.mnt_ns);
    let witness = if same(process.tgid) { Some(process.tgid) } else { processes().find(|pid| same(*pid)) };
    if let Some((inode, mode)) = witness.and_then(|pid| look(pid, call)) {
        call.inode = Some(inode);
        call.mode = Some(mode);
    }
}

/// Inode number and mode of the file, as a process sees it. `None` if it is gone, or hidden: nothing that can be said.
fn look(pid: u32, call: &FailedCall) -> Option<(u64, u16)> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let text = fs::read(proc.join("mountinfo")).ok()?;
    let mounts = mountinfo::parse(&text).ok()?;
    let path = Path::new(std::ffi::OsStr::from_bytes(&call.path));
    let seen = mounts.iter().filter(|mount| {
        let (major, minor) = mount.device;
        major << 20 | minor == call.dev
    });
    // A mount may show only a part of the file system.
    let mut inside = seen.filter_map(|mount| {
        let root = mount.root.strip_prefix("/").unwrap_or(&mount.root);
        path.strip_prefix(root).ok().map(|rest| mount.target.join(rest))
    });
    let target = inside.next()?;
    let root = File::open(proc.join("root")).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let file = openat2(root.as_fd(), target.strip_prefix("/").unwrap_or(&target), how).ok()?;
    let stat = fstat(&file).ok()?;
    Some((stat.st_ino, u16::try_from(stat.st_mode & 0xFFFF).ok()?))
}

/// Inode number of a process's mount namespace; `None` if it is gone.
pub fn mount_namespace_of(pid: u32) -> Option<u32> {
    let link = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?;
    let text = link.to_str()?.strip_prefix("mnt:[")?.strip_suffix(']')?;
    text.parse().ok()
}

/// Numbers of all processes of this process's pid namespace.
pub fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}
