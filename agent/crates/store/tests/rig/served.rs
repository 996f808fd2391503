//! A disk of our own: a file that a process of its own serves by FUSE, with ext4 on it by a loop device. It fails on demand, and
//! writes down what reached it.
//!
//! store → ext4 → loop device → FUSE file: a flush of the device is an fsync of the file. The server is another process than the one
//! that uses the disk: that one, killed in the middle of a write, could not end before the write does, which its own dead threads
//! would have to answer, and every `sync` of the machine would wait for it. The server ends with its standard input, and takes away
//! what the test had mounted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

use super::{noise, output, run};

const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);
const BLOCK: usize = 4096;
/// Fewer than FUSE's largest request.
const MOST_KB: &str = "512";
/// In place of an offset in the log.
const FLUSH: u64 = u64::MAX;
const SERVE: &str = "--serve-disk";

/// Contents of which each block begins with what the disk can be told to fail: `SLUICE-`, a number, `-DATA`.
pub(crate) fn marked(number: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(number + 1, len);
    let mark = format!("SLUICE-{number:04}-DATA");
    bytes.chunks_mut(BLOCK).filter(|block| block.len() >= mark.len()).for_each(|block| {
        block[..mark.len()].copy_from_slice(mark.as_bytes());
    });
    bytes
}

/// What reached the disk.
#[derive(Debug)]
pub(crate) enum Operation {
    Write(u64, Vec<u8>),
    Flush,
}

/// The disk as the test sees it: mounted, until it is dropped.
#[derive(Debug)]
pub(crate) struct ServedDisk {
    server: Child,
    /// Until it is to end.
    said: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    mounted: bool,
    files: tempfile::TempDir,
}

impl ServedDisk {
    /// ext4, of so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let files = tempfile::tempdir().expect("dir");
        let [image, fuse, dir] = ["image", "fuse", "mnt"].map(|name| files.path().join(name));
        fs::create_dir(&fuse).and_then(|()| fs::create_dir(&dir)).expect("dirs");
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("image");
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-b", "4096", "-J", "size=4"]).arg(&image));
        let mut server = Command::new(std::env::current_exe().expect("this program"))
            .arg(SERVE)
            .arg(files.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a server");
        let (stdin, stdout) = (server.stdin.take().expect("stdin"), server.stdout.take().expect("stdout"));
        let mut disk =
            Self { server, said: Mutex::new(Some((stdin, BufReader::new(stdout)))), mounted: false, files };
        disk.say("ready");
        mount(&fuse.join("disk"), &dir);
        disk.mounted = true;
        disk
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.files.path().join("mnt")
    }

    /// What it was made of.
    pub(crate) fn image(&self) -> PathBuf {
        self.files.path().join("image")
    }

    /// From now on `what` (`writes`, `reads` or `flushes`) fail, the former of blocks that begin with `prefix`.
    pub(crate) fn fail(&self, what: &str, prefix: &str) {
        self.say(&format!("{what} {prefix}"));
    }

    /// Nothing fails any more.
    pub(crate) fn heal(&self) {
        self.say("heal");
    }

    /// How many writes and flushes reached it.
    pub(crate) fn operations(&self) -> usize {
        self.say("count").parse().expect("a number")
    }

    /// How many it has failed.
    pub(crate) fn refused(&self) -> usize {
        self.say("refused").parse().expect("a number")
    }

    pub(crate) fn unmount(&mut self) {
        if std::mem::take(&mut self.mounted) {
            run(Command::new("umount").arg(self.path()));
        }
    }

    /// Unmounts and mounts it: what the file system remembered of failures is forgotten.
    pub(crate) fn mount_again(&self) {
        run(Command::new("umount").arg(self.path()));
        mount(&self.files.path().join("fuse/disk"), &self.path());
    }

    /// Everything that reached it.
    pub(crate) fn log(&self) -> Vec<Operation> {
        self.operations();
        let log = fs::read(self.files.path().join("log")).expect("log");
        let (mut left, mut operations) = (log.as_slice(), Vec::new());
        while let Some((head, rest)) = left.split_at_checked(16) {
            let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight"));
            let (bytes, rest) = rest.split_at(number(8) as usize);
            operations.push(match number(0) {
                FLUSH => Operation::Flush,
                offset => Operation::Write(offset, bytes.to_vec()),
            });
            left = rest;
        }
        operations
    }

    fn say(&self, line: &str) -> String {
        let mut said = self.said.lock().expect("lock");
        let (to, from) = said.as_mut().expect("it runs");
        writeln!(to, "{line}").expect("said");
        let mut answer = String::new();
        from.read_line(&mut answer).expect("an answer");
        answer.trim_end().to_owned()
    }
}

fn mount(disk: &Path, dir: &Path) {
    let device = output(Command::new("losetup").args(["--find", "--show"]).arg(disk));
    // One request of the device is one of the file: of several, some of which fail, the loop driver tells no error (Linux 6.18).
    let queue = device.replace("/dev/", "/sys/block/");
    fs::write(format!("{queue}/queue/max_sectors_kb"), MOST_KB).expect("the size of requests");
    run(Command::new("mount").args(["-o", "errors=continue", &device]).arg(dir));
    // It goes when it is unmounted.
    run(Command::new("losetup").args(["--detach", &device]));
}

impl Drop for ServedDisk {
    fn drop(&mut self) {
        // After a failure somebody may have a file open: the server takes the mount away, then.
        if !std::thread::panicking() {
            self.unmount();
        }
        self.said.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.server.wait().expect("ended");
    }
}

/// In the process that [`ServedDisk`] starts: serves until its input ends, and does not come back.
pub(crate) fn serve_if_asked() {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(at) = arguments.iter().position(|argument| argument == SERVE) else { return };
    let dir = Path::new(&arguments[at + 1]);
    let log = BufWriter::new(File::create(dir.join("log")).expect("log"));
    let content = fs::read(dir.join("image")).expect("image");
    let disk = DiskFile(Arc::new(Mutex::new(Served {
        content,
        log,
        count: 0,
        refused: AtomicUsize::new(0),
        failing: Failing::default(),
    })));
    let session = fuser::Session::new(disk.clone(), dir.join("fuse"), &fuser::Config::default())
        .and_then(fuser::Session::spawn)
        .expect("mounted");
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let answer = disk.lock().told(&line);
        // The test may be gone by now.
        if writeln!(std::io::stdout(), "{answer}").is_err() {
            break;
        }
    }
    disk.lock().failing = Failing::default();
    for name in ["mnt", "fuse"] {
        detach(&dir.join("fuse"));
        // Gone already if all went well.
        let unmounted = Command::new("umount").arg("-l").arg(dir.join(name)).stderr(Stdio::null()).status();
        unmounted.expect("umount");
    }
    drop(session);
    std::process::exit(0);
}

/// Takes files below `dir` from loop devices: at once, or with the mount.
fn detach(dir: &Path) {
    for entry in fs::read_dir("/sys/block").expect("devices").flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end()).starts_with(dir) {
            let device = Path::new("/dev").join(entry.file_name());
            Command::new("losetup").arg("--detach").arg(device).status().expect("losetup");
        }
    }
}

/// Which operations fail: writes and reads of blocks that begin with this.
#[derive(Debug, Default)]
struct Failing {
    writes: Option<String>,
    reads: Option<String>,
    flushes: bool,
}

#[derive(Debug)]
struct Served {
    content: Vec<u8>,
    log: BufWriter<File>,
    count: usize,
    refused: AtomicUsize,
    failing: Failing,
}

impl Served {
    fn told(&mut self, line: &str) -> String {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("writes", prefix) => self.failing.writes = Some(prefix.to_owned()),
            ("reads", prefix) => self.failing.reads = Some(prefix.to_owned()),
            ("flushes", _) => self.failing.flushes = true,
            ("heal", _) => self.failing = Failing::default(),
            ("refused", _) => return self.refused.load(Ordering::Relaxed).to_string(),
            _ => {}
        }
        self.log.flush().expect("log");
        self.count.to_string()
    }

    fn write_down(&mut self, offset: u64, bytes: &[u8]) {
        let head = [offset.to_le_bytes(), (bytes.len() as u64).to_le_bytes()].concat();
        self.log.write_all(&head).and_then(|()| self.log.write_all(bytes)).expect("log");
        self.count += 1;
    }
}

/// Whether any block of these bytes begins with `prefix`.
fn has_block(bytes: &[u8], prefix: Option<&String>) -> bool {
    prefix.is_some_and(|prefix| bytes.chunks(BLOCK).any(|block| block.starts_with(prefix.as_bytes())))
}

/// A file system of one file, `disk`.
#[derive(Clone)]
struct DiskFile(Arc<Mutex<Served>>);

impl DiskFile {
    fn lock(&self) -> MutexGuard<'_, Served> {
        self.0.lock().expect("lock")
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let file = inode == FILE;
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size: if file { self.lock().content.len() as u64 } else { 0 },
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

impl Filesystem for DiskFile {
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
        // Not cached: each read of the device comes here.
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
        let disk = self.lock();
        let start = (offset as usize).min(disk.content.len());
        let end = (start + size as usize).min(disk.content.len());
        let bytes = &disk.content[start..end];
        if has_block(bytes, disk.failing.reads.as_ref()) {
            disk.refused.fetch_add(1, Ordering::Relaxed);
            return reply.error(Errno::EIO);
        }
        reply.data(bytes);
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
        let mut disk = self.lock();
        if has_block(data, disk.failing.writes.as_ref()) {
            disk.refused.fetch_add(1, Ordering::Relaxed);
            return reply.error(Errno::EIO);
        }
        disk.content[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        disk.write_down(offset, data);
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut disk = self.lock();
        if disk.failing.flushes {
            disk.refused.fetch_add(1, Ordering::Relaxed);
            return reply.error(Errno::EIO);
        }
        disk.write_down(FLUSH, &[]);
        reply.ok();
    }
}
