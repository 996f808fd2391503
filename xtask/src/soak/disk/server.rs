//! The process behind the soak's disk: a FUSE file system of one file, which becomes slow and fails as it is told to.
//!
//! It is apart because nothing may wait for a disk that nobody serves: when the soak goes, in whatever way, this process's input ends.
//! Then it aborts the connection, so that the kernel's requests fail instead of waiting for ever (`sync` of anybody on the machine
//! would), clears what stood on the disk away, and ends. When this process dies the kernel aborts the connection itself.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};
use serde::{Deserialize, Serialize};

use crate::soak::random::is_content;

/// Name of the file that is the disk.
pub(crate) const FILE_NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);
const BLOCK: usize = 4096;
/// Cleaning up may take so long; then the process ends all the same.
const CLEANING: Duration = Duration::from_secs(20);

/// What the disk does to requests. Only those for contents of files can fail: a file system whose own blocks cannot be read or
/// written shuts itself down, and no source of any byte is left then.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct DiskFaults {
    /// Each request takes so much longer.
    pub(crate) slow_ms: u64,
    /// Of the reads of contents one in so many fails with EIO; 0: none.
    pub(crate) failing_reads_one_in: u64,
    /// The same of writes.
    pub(crate) failing_writes_one_in: u64,
}

/// How many requests failed so far.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Failed {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// Options of the process, which `cargo xtask soak` starts.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file with the disk's bytes
    image: PathBuf,
    /// Where the file system is mounted
    at: PathBuf,
    /// The directory whose mounts are cleared away in the end
    room: PathBuf,
}

/// Serves until its input ends. Each line of the input says what goes wrong from then on, and is answered.
pub(crate) fn serve(args: &Args) -> Result<()> {
    let image = File::options().read(true).write(true).open(&args.image).context("cannot open the disk")?;
    let state = Arc::new(State::default());
    let disk = Disk { size: image.metadata()?.len(), image, state: Arc::clone(&state) };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("sluice-soak".to_owned())];
    let session = fuser::Session::new(disk, &args.at, &config).and_then(fuser::Session::spawn);
    let session = session.context("cannot mount the disk")?;
    let connection = connection(&args.at)?;
    say(&state.failed())?;
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        *state.faults.lock().unwrap_or_else(PoisonError::into_inner) =
            serde_json::from_str(&line).context("these are no faults of a disk")?;
        if say(&state.failed()).is_err() {
            break;
        }
    }
    std::thread::spawn(|| {
        std::thread::sleep(CLEANING);
        std::process::exit(1);
    });
    // The soak unmounts before it ends in good order: then all of this finds nothing.
    if connection.exists() {
        std::fs::write(&connection, "1").context("cannot abort the connection")?;
    }
    super::end_processes(&args.room);
    super::super::world::unmount(&args.room)?;
    // Its threads may be in the middle of a slow request, which nobody waits for any more.
    std::mem::forget(session);
    Ok(())
}

/// The kernel's handle that ends the connection of a mount.
fn connection(mount: &Path) -> Result<PathBuf> {
    let device = std::fs::metadata(mount).context("the disk is not mounted")?.dev();
    // The minor number: FUSE mounts have anonymous devices, whose major number is 0.
    let minor = (device & 0xff) | ((device >> 12) & 0xfff_ff00);
    Ok(PathBuf::from(format!("/sys/fs/fuse/connections/{minor}/abort")))
}

fn say(failed: &Failed) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(failed)?)?;
    Ok(out.flush()?)
}

#[derive(Debug, Default)]
struct State {
    faults: Mutex<DiskFaults>,
    /// Requests for contents while some of them were to fail.
    turn: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl State {
    fn failed(&self) -> Failed {
        Failed { reads: self.reads.load(Ordering::Relaxed), writes: self.writes.load(Ordering::Relaxed) }
    }

    fn faults(&self) -> DiskFaults {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this request is one that fails.
    fn fails(&self, one_in: u64, bytes: &[u8], failed: &AtomicU64) -> bool {
        let fails = one_in > 0
            && bytes.chunks(BLOCK).any(is_content)
            && self.turn.fetch_add(1, Ordering::Relaxed).is_multiple_of(one_in);
        if fails {
            failed.fetch_add(1, Ordering::Relaxed);
        }
        fails
    }
}

/// See the module text.
#[derive(Debug)]
struct Disk {
    image: File,
    size: u64,
    state: Arc<State>,
}

impl Disk {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let file = inode == FILE;
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size: if file { self.size } else { 0 },
            blocks: 0,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == FILE_NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
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
        let faults = self.state.faults();
        std::thread::sleep(Duration::from_millis(faults.slow_ms));
        let len = u64::from(size).min(self.size.saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        if self.image.read_exact_at(&mut bytes, offset).is_err()
            || self.state.fails(faults.failing_reads_one_in, &bytes, &self.state.reads)
        {
            return reply.error(Errno::EIO);
        }
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let faults = self.state.faults();
        std::thread::sleep(Duration::from_millis(faults.slow_ms));
        if self.state.fails(faults.failing_writes_one_in, data, &self.state.writes)
            || self.image.write_all_at(data, offset).is_err()
        {
            return reply.error(Errno::EIO);
        }
        reply.written(u32::try_from(data.len()).unwrap_or_default());
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Nobody takes the power away here: the bytes are the next reader's when they are in the page cache.
        std::thread::sleep(Duration::from_millis(self.state.faults().slow_ms));
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::random::Random;

    #[test]
    fn only_contents_fail_and_one_in_so_many() {
        let state = State::default();
        let content = Random::new(1).content(3 * BLOCK);
        let reads =
            |one_in, bytes: &[u8]| (0..6).filter(|_| state.fails(one_in, bytes, &state.reads)).count();
        assert_eq!(reads(0, &content), 0);
        assert_eq!(reads(3, &content), 2);
        assert_eq!(reads(1, &[0; 3 * BLOCK]), 0);
        // A block of the file system's own in front of contents, as an extent block or a directory is.
        let mixed =
            [&b"\x0a\xf3\x01\x00\x54\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"[..], &[1; BLOCK - 16]];
        assert_eq!(reads(1, &mixed.concat()), 0);
        assert_eq!(reads(1, &[mixed.concat(), content].concat()), 6);
        assert_eq!(state.failed().reads, 8);
    }
}
