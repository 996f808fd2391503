//! The classic way: `/dev/fuse`, by fuser.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyOpen, Request,
};

use super::Shared;
use super::files::{ROOT, Read, VALID_SECONDS, file_name};
use super::misses::{Supply, Waiting};
use crate::Way;

const TTL: Duration = Duration::from_secs(VALID_SECONDS);
/// Requests the kernel may have under way. Direct I/O of loop devices counts as "background" (Linux 6.18), so this bounds all
/// layers' reads together: were it reached by reads that wait for the network, local ones would wait behind them.
const MAX_BACKGROUND: u16 = u16::MAX;
/// FUSE threads: hits are copied by them, misses leave them at once.
const THREADS: usize = 2;
const READ_AHEAD: u32 = 1 << 20;

thread_local! {
    /// Where a FUSE thread copies local bytes. Allocating it for each read would cost a page fault per page.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Mounts on the server's directory and serves.
pub(super) fn start(shared: &Arc<Shared>, dir: &Path) -> std::io::Result<fuser::BackgroundSession> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::FSName("sluice".to_owned()),
        MountOption::Subtype("sluice".to_owned()),
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let filesystem = Transport { shared: Arc::clone(shared) };
    fuser::Session::new(filesystem, dir, &config).and_then(fuser::Session::spawn)
}

/// What the kernel asks.
struct Transport {
    shared: Arc<Shared>,
}

fn attributes(inode: u64, size: Option<u64>) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    let (kind, perm, nlink) = match size {
        Some(_) => (FileType::RegularFile, 0o400, 1),
        None => (FileType::Directory, 0o500, 2),
    };
    FileAttr {
        ino: INodeNo(inode),
        size: size.unwrap_or(0),
        blocks: size.unwrap_or(0) / 512,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// A read that is being answered.
#[derive(Clone, Copy)]
struct Asked {
    inode: u64,
    offset: u64,
    len: u32,
    /// The local file does not give it.
    unreadable: bool,
}

/// Answers with bytes of a file, by way of this thread's buffer. If they are not to be had there the agent is asked for them, once.
fn reply_from_file(shared: &Arc<Shared>, file: &File, asked: Asked, reply: ReplyData) {
    let Asked { inode, offset, len, unreadable } = asked;
    let failed = BUFFER.with_borrow_mut(|buffer| {
        buffer.resize((len as usize).max(buffer.len()), 0);
        let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
        match file.read_exact_at(bytes, offset) {
            Ok(()) => {
                reply.data(bytes);
                None
            }
            Err(error) => Some((reply, error)),
        }
    });
    let Some((reply, error)) = failed else { return };
    tracing::error!(offset, size = len, %error, "cannot read the layer store");
    if unreadable {
        return reply.error(Errno::EIO);
    }
    shared.files.not_local(inode, offset, offset + u64::from(len));
    ask(shared, Asked { unreadable: true, ..asked }, reply);
}

fn ask(shared: &Arc<Shared>, asked: Asked, reply: ReplyData) {
    let Asked { inode, offset, len, unreadable } = asked;
    let this = Arc::clone(shared);
    let answer = Box::new(move |supply| match supply {
        Supply::InFile(file) => reply_from_file(&this, &file, asked, reply),
        Supply::Bytes(bytes) => reply.data(&bytes),
        Supply::Failed(errno) => reply.error(Errno::from_i32(errno)),
    });
    // fuser answers interrupts itself, by ENOSYS: there are none after the first.
    shared.misses.ask(Waiting { unique: 0, inode, offset, len, unreadable, answer });
}

impl Filesystem for Transport {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each of these only makes it faster; a kernel that has less is served with less.
        let wanted = InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_PARALLEL_DIROPS;
        if let Err(missing) = config.add_capabilities(wanted) {
            tracing::debug!(?missing, "the kernel's FUSE lacks capabilities");
        }
        if let Err(nearest) = config.set_max_readahead(READ_AHEAD) {
            tracing::debug!(nearest, "read-ahead is limited");
        }
        if let Err(nearest) = config.set_max_background(MAX_BACKGROUND) {
            tracing::debug!(nearest, "background requests are limited");
        }
        Ok(())
    }

    fn destroy(&mut self) {
        self.shared.ended(Way::Classic);
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.shared.files.lookup(parent.0, name.as_bytes()) {
            Ok((inode, file)) => reply.entry(&TTL, &attributes(inode, Some(file.size)), Generation(0)),
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if inode.0 == ROOT {
            return reply.attr(&TTL, &attributes(ROOT, None));
        }
        match self.shared.files.get(inode.0) {
            Ok(file) => reply.attr(&TTL, &attributes(inode.0, Some(file.size))),
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.shared.files.get(inode.0) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH),
            // ESTALE: the kernel looks the name up again and finds nothing.
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.shared.files.read(inode.0, offset, size) {
            Ok(Read::InFile { file, len }) => {
                let asked = Asked { inode: inode.0, offset, len, unreadable: false };
                reply_from_file(&self.shared, &file, asked, reply);
            }
            Ok(Read::Nothing) => reply.data(&[]),
            Err(errno) => reply.error(Errno::from_i32(errno)),
            Ok(Read::Ask { len }) => {
                ask(&self.shared, Asked { inode: inode.0, offset, len, unreadable: false }, reply);
            }
        }
    }

    /// A loop device flushes its file when it is released; there is nothing to flush.
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// Never anything but ENOTTY: overlayfs asks for file attributes and takes other errors for failure.
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
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, file) in self.shared.files.list().into_iter().enumerate().skip(skipped) {
            let name = file_name(file.inode, &file.name);
            if reply.add(INodeNo(file.inode), at as u64 + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
