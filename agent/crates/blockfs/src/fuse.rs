//! The agent's FUSE mount: one read-only file per layer, through `/dev/fuse` (the classic way, by fuser).
//!
//! A read whose bytes are local is answered in the FUSE thread. One that must wait for the network never holds that thread: it
//! is answered later by a task. Root only: no `allow_other`, and the directory above is 0700.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry,
    ReplyIoctl, ReplyOpen, Request,
};
use tokio::runtime::Handle;

use crate::{BlockFsError, BlockSource, ReadError};

/// Attributes never change: a layer's file has its final size from the start.
const TTL: Duration = Duration::from_secs(3600);
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

/// A file's name and its bytes.
type Named = (String, Arc<dyn BlockSource>);

/// The files, by inode number.
#[derive(Debug, Default)]
struct Files {
    by_inode: RwLock<HashMap<u64, Named>>,
    next: AtomicU64,
}

/// The agent's mount. Dropped, it unmounts.
#[derive(Debug)]
pub struct BlockFs {
    dir: PathBuf,
    files: Arc<Files>,
    session: Option<fuser::BackgroundSession>,
}

impl BlockFs {
    /// Mounts on `dir`; reads that wait are driven by `runtime`.
    pub fn mount(dir: &Path, runtime: Handle) -> Result<Self, BlockFsError> {
        let files = Arc::new(Files { by_inode: RwLock::default(), next: AtomicU64::new(2) });
        let failed = |source| BlockFsError::Fuse { path: dir.to_path_buf(), source };
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
        let filesystem = Transport { files: Arc::clone(&files), runtime };
        let session =
            fuser::Session::new(filesystem, dir, &config).and_then(fuser::Session::spawn).map_err(failed)?;
        Ok(Self { dir: dir.to_path_buf(), files, session: Some(session) })
    }

    /// Adds a file; returns its path.
    pub fn add(&self, name: &str, source: Arc<dyn BlockSource>) -> PathBuf {
        let inode = self.files.next.fetch_add(1, Ordering::Relaxed);
        let mut files = self.files.by_inode.write().unwrap_or_else(PoisonError::into_inner);
        files.insert(inode, (name.to_owned(), source));
        // The name holds the inode number, so that a name that comes back is another file and no cached entry is wrong.
        self.dir.join(format!("{inode}-{name}"))
    }

    /// Removes a file by the path that `add` gave. Whoever has it open gets ESTALE from now on.
    pub fn remove(&self, path: &Path) {
        let inode = path.file_name().and_then(OsStr::to_str).and_then(inode_of);
        if let Some(inode) = inode {
            self.files.by_inode.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
        }
    }

    /// Takes the mount out of the tree. Loop devices that still read a file of it fail once the process ends.
    pub fn unmount(mut self) -> Result<(), BlockFsError> {
        // Joining the session would wait for the last open file; its threads end with the process.
        std::mem::forget(self.session.take());
        sluice_kernel::unmount(&self.dir, sluice_kernel::mount::UnmountOptions { lazy: true, force: false })?;
        Ok(())
    }
}

fn inode_of(name: &str) -> Option<u64> {
    name.split_once('-')?.0.parse().ok()
}

/// Reads until all is there. The kernel would take less for the end of the file and (buffered) shrink its idea of the size.
async fn read_whole(source: &Arc<dyn BlockSource>, offset: u64, len: usize) -> Result<Bytes, ReadError> {
    let mut bytes = Arc::clone(source).read(offset, len).await?;
    while bytes.len() < len {
        let missing = len - bytes.len();
        let next = Arc::clone(source).read(offset + bytes.len() as u64, missing).await?;
        if next.is_empty() {
            return Err(ReadError::other_length(bytes.len(), len));
        }
        bytes = [bytes, next].concat().into();
    }
    if bytes.len() > len { Err(ReadError::other_length(bytes.len(), len)) } else { Ok(bytes) }
}

/// What the kernel asks.
struct Transport {
    files: Arc<Files>,
    runtime: Handle,
}

impl Transport {
    fn source(&self, inode: INodeNo) -> Option<Arc<dyn BlockSource>> {
        let files = self.files.by_inode.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&inode.0).map(|(_, source)| Arc::clone(source))
    }

    /// Answers when the bytes are there; nobody is held up by it but the reader.
    fn read_later(&self, source: Arc<dyn BlockSource>, offset: u64, len: usize, reply: ReplyData) {
        self.runtime.spawn(async move {
            match read_whole(&source, offset, len).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => {
                    tracing::error!(offset, size = len, %error, "a read fails");
                    reply.error(Errno::from_i32(error.errno));
                }
            }
        });
    }
}

fn attributes(inode: INodeNo, size: Option<u64>) -> FileAttr {
    let epoch = SystemTime::UNIX_EPOCH;
    let (kind, perm, nlink) = match size {
        Some(_) => (FileType::RegularFile, 0o400, 1),
        None => (FileType::Directory, 0o500, 2),
    };
    FileAttr {
        ino: inode,
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

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let inode = name.to_str().and_then(inode_of).filter(|_| parent == INodeNo::ROOT).map(INodeNo);
        match inode.and_then(|inode| self.source(inode).map(|source| (inode, source))) {
            Some((inode, source)) => {
                reply.entry(&TTL, &attributes(inode, Some(source.size())), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if inode == INodeNo::ROOT {
            return reply.attr(&TTL, &attributes(inode, None));
        }
        match self.source(inode) {
            Some(source) => reply.attr(&TTL, &attributes(inode, Some(source.size()))),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.source(inode).is_none() {
            // The kernel looks the name up again and finds nothing.
            return reply.error(Errno::ESTALE);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
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
        let Some(source) = self.source(inode) else { return reply.error(Errno::ESTALE) };
        let len = source.size().saturating_sub(offset).min(u64::from(size)) as usize;
        if len == 0 {
            return reply.data(&[]);
        }
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(len.max(buffer.len()), 0);
            let bytes = &mut buffer[..len];
            match source.try_read(offset, bytes) {
                Ok(true) => reply.data(bytes),
                Ok(false) => self.read_later(source, offset, len, reply),
                Err(error) => {
                    tracing::error!(offset, size = len, %error, "cannot read the layer store");
                    reply.error(Errno::EIO);
                }
            }
        });
    }

    /// A loop device flushes its file when it is released; there is nothing to flush.
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: fuser::ReplyEmpty) {
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
        let files = self.files.by_inode.read().unwrap_or_else(PoisonError::into_inner);
        let mut entries: Vec<(u64, String)> =
            files.iter().map(|(inode, (name, _))| (*inode, format!("{inode}-{name}"))).collect();
        drop(files);
        entries.sort_unstable();
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (inode, name)) in entries.into_iter().enumerate().skip(skipped) {
            if reply.add(INodeNo(inode), at as u64 + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
