//! A small FUSE file system: what an image streamed as files would be. It is the control of the overlay cases: on a kernel
//! with the fault, symbolic links in it cannot be renamed.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, MountOption, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEntry, ReplyIoctl, ReplyXattr, Request,
};

const TTL: Duration = Duration::from_secs(60);
const LINK: u64 = 2;

/// One directory with one symbolic link, `link`.
struct Server {
    /// Answers READLINK with ENXIO, as a server with a fault might.
    broken: bool,
}

/// Mounts it; it ends with what is returned.
pub(crate) fn mount(dir: &Path, broken: bool) -> Result<fuser::BackgroundSession> {
    std::fs::create_dir_all(dir)?;
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("control".to_owned())];
    let session = fuser::Session::new(Server { broken }, dir, &config).and_then(fuser::Session::spawn);
    session.context("cannot mount the control's FUSE")
}

fn attributes(inode: u64) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    let kind = if inode == LINK { FileType::Symlink } else { FileType::Directory };
    FileAttr {
        ino: INodeNo(inode),
        size: if inode == LINK { 6 } else { 0 },
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind,
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "link" {
            reply.entry(&TTL, &attributes(LINK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(inode.0));
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        if self.broken { reply.error(Errno::ENXIO) } else { reply.data(b"target") }
    }

    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if offset == 0 && reply.add(INodeNo(LINK), 1, FileType::Symlink, "link") {
            // It did not fit, which the kernel learns from what is missing.
        }
        reply.ok();
    }
}
