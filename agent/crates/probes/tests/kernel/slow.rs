//! A file that takes its time: whoever reads from a device on it has to wait.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, Session,
};

const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

/// What one read takes.
pub(crate) const DELAY: Duration = Duration::from_millis(2);

/// A file system of one file.
struct Slow(Vec<u8>);

impl Slow {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) = match ino {
            FILE => (FileType::RegularFile, self.0.len() as u64),
            _ => (FileType::Directory, 0),
        };
        let time = SystemTime::UNIX_EPOCH;
        let (atime, mtime, ctime, crtime) = (time, time, time, time);
        let (blocks, perm, nlink, uid, gid, rdev, blksize, flags) = (size / 512, 0o400, 1, 0, 0, 0, 4096, 0);
        FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        }
    }
}

impl Filesystem for Slow {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        std::thread::sleep(DELAY);
        let begin = (offset as usize).min(self.0.len());
        reply.data(&self.0[begin..(begin + size as usize).min(self.0.len())]);
    }
}

/// The file, as long as this is there.
pub(crate) struct SlowFile {
    pub(crate) path: PathBuf,
    // In this order: unmounted before its directory goes.
    _session: BackgroundSession,
    _dir: tempfile::TempDir,
}

impl SlowFile {
    /// A slow copy of a file.
    pub(crate) fn of(file: &Path) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let content = std::fs::read(file).expect("read");
        let session = Session::new(Slow(content), dir.path(), &Config::default()).expect("mounted");
        let session = session.spawn().expect("served");
        Self { path: dir.path().join("disk"), _session: session, _dir: dir }
    }
}
