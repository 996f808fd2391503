//! The way over io_uring: a thread and a ring per CPU, and one thread for what still comes by `/dev/fuse`.
//!
//! A read of local bytes is one submission: the bytes go from the layer's file into the reply, and the reply back, before this
//! process sees the ring again. One that waits for the agent leaves its entry in `Inbox` when it is answered, and
//! wakes the ring's thread.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;
use sluice_kernel::fuse_ring::{Event, FuseRing, Held, RingSize, Waker};
use sluice_kernel::mount::{Restrictions, UnmountOptions};

use super::Shared;
use super::files::Read;
use super::misses::{Supply, Waiting};
use super::wire::{self, Answer, Request};
use crate::{Options, Way};

/// As for the classic way: all that loop devices ask for counts.
const MAX_BACKGROUND: u16 = u16::MAX;
/// A request by `/dev/fuse` is no longer (`FUSE_MIN_READ_BUFFER`, and a batch of forgets).
const DEVICE_BUFFER: usize = 64 << 10;
/// A queue with fewer free entries gets longer by half, and by as many at least.
const SPARE_ENTRIES: usize = 8;
/// No queue gets longer than this; the memory of one entry is `request_bytes` when all of it was used.
const MAX_ENTRIES: usize = 4096;
/// All requests are as small as this at least.
const MIN_PAYLOAD: usize = 8192;

/// Mounts on `dir` and serves in this way, which is not the classic one. On an error nothing is mounted.
pub(super) fn start(shared: &Arc<Shared>, dir: &Path, way: Way) -> io::Result<()> {
    sluice_kernel::fuse::enable_uring()?;
    sluice_kernel::fuse_ring::probe()?;
    let restrictions = Restrictions { read_only: true, no_suid: true, no_dev: true, no_exec: true };
    let device = sluice_kernel::fuse::mount_fuse("sluice", restrictions, dir).map_err(io::Error::other)?;
    let started =
        handshake(&device, &shared.options, way).and_then(|()| serve(shared, Arc::new(device), way));
    if started.is_err() {
        let options = UnmountOptions { lazy: true, force: false };
        sluice_kernel::unmount(dir, options).map_err(io::Error::other)?;
    }
    started
}

fn handshake(mut device: &File, options: &Options, way: Way) -> io::Result<()> {
    let mut buffer = vec![0; DEVICE_BUFFER];
    let length = device.read(&mut buffer)?;
    let request = buffer.get(..length).and_then(Request::from_device);
    let request = request.filter(|request| request.header.opcode == wire::INIT);
    let request = request.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no INIT came first"))?;
    let zero_copy = way == Way::ZeroCopy;
    let reply = wire::init(&request, options.request_bytes, MAX_BACKGROUND, zero_copy).ok_or_else(|| {
        let without = if zero_copy { ", or not with zero copy" } else { "" };
        let text = format!("the kernel does not offer FUSE over io_uring{without}");
        io::Error::new(io::ErrorKind::Unsupported, text)
    })?;
    device.write_all(&reply)
}

/// Starts the threads, and waits until all rings are registered.
fn serve(shared: &Arc<Shared>, device: Arc<File>, way: Way) -> io::Result<()> {
    let (started, results) = channel();
    let threads = assign(&usable_cpus()?, possible_cpus()?);
    let count = threads.len();
    for (cpu, queues) in threads {
        let (shared, device, started) = (Arc::clone(shared), Arc::clone(&device), started.clone());
        let run = move || ring_thread(&shared, device, way, cpu, &queues, &started);
        std::thread::Builder::new().name(format!("fuse-ring-{cpu}")).spawn(run)?;
    }
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name("fuse-device".to_owned())
        .spawn(move || device_thread(&shared, &device, way))?;
    drop(started);
    let results: Vec<_> = results.iter().take(count).collect();
    if results.len() < count {
        return Err(io::Error::other("a ring's thread ended"));
    }
    results.into_iter().collect()
}

/// For each thread its CPU and its queues: each CPU that we may run on has a thread, other CPUs' queues are shared out.
fn assign(usable: &[u16], possible: u16) -> Vec<(u16, Vec<u16>)> {
    let mut threads: Vec<_> = usable.iter().map(|cpu| (*cpu, vec![*cpu])).collect();
    let others = (0..possible).filter(|cpu| !usable.contains(cpu));
    for (number, cpu) in others.enumerate() {
        let count = threads.len().max(1);
        if let Some((_, queues)) = threads.get_mut(number % count) {
            queues.push(cpu);
        }
    }
    threads
}

fn usable_cpus() -> io::Result<Vec<u16>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).map(|cpu| cpu as u16).collect())
}

/// How many queues the kernel wants: one more than the highest number in a list such as `0-3,8`.
fn possible_cpus() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<u16>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, text))
}

/// Answers that other threads have for a ring.
#[derive(Debug)]
struct Inbox {
    answers: Mutex<Vec<(Held, Asked, Supply)>>,
    waker: Waker,
}

/// A read that the agent is asked for.
#[derive(Debug, Clone, Copy)]
struct Asked {
    inode: u64,
    /// The kernel's number of the request.
    unique: u64,
    offset: u64,
    len: u32,
    /// The local file does not give it.
    unreadable: bool,
}

impl Inbox {
    fn put(&self, held: Held, asked: Asked, supply: Supply) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let first = answers.is_empty();
        answers.push((held, asked, supply));
        drop(answers);
        if first && let Err(error) = self.waker.wake() {
            tracing::error!(%error, "a ring cannot be woken");
        }
    }

    fn take(&self) -> Vec<(Held, Asked, Supply)> {
        std::mem::take(&mut self.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn ring_thread(
    shared: &Arc<Shared>,
    device: Arc<File>,
    way: Way,
    cpu: u16,
    queues: &[u16],
    started: &Sender<io::Result<()>>,
) {
    let ring = pin(cpu).and_then(|()| RingThread::new(shared, device, way, queues));
    let (result, ring) = match ring {
        Ok(ring) => (Ok(()), Some(ring)),
        Err(error) => (Err(error), None),
    };
    if started.send(result).is_err() {
        tracing::debug!(cpu, "nobody waits for this ring any more");
    }
    if let Some(mut ring) = ring
        && let Err(error) = ring.run()
    {
        tracing::error!(cpu, %error, "a ring ends");
    }
    shared.ended(way);
}

fn pin(cpu: u16) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu.into())?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Requests for which a queue had no entry stay queued in the kernel when new entries are registered. They move when a request of the
/// queue is answered, or one for the background comes, one each (Linux 6.18, `fuse_uring_do_register`, `fuse_uring_commit_fetch`,
/// `fuse_uring_queue_bq_req`): this makes a harmless request on that CPU. In a thread of its own each, since it may come when
/// there is no free entry again, and is then queued behind those that wait.
fn poke(dir: PathBuf, cpu: u16) {
    let poke = move || {
        let poked = pin(cpu).and_then(|()| Ok(statvfs(&dir)?));
        if let Err(error) = poked {
            tracing::debug!(cpu, %error, "cannot poke");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("fuse-poke".to_owned()).spawn(poke) {
        tracing::error!(cpu, %error, "nobody pokes");
    }
}

struct RingThread {
    shared: Arc<Shared>,
    ring: FuseRing,
    inbox: Arc<Inbox>,
    /// Entries that wait for the agent.
    waiting: usize,
    /// By the number of an entry what was last read from a file into it: the reply's head has overwritten the request's.
    reading: HashMap<u32, Asked>,
}

impl RingThread {
    fn new(shared: &Arc<Shared>, device: Arc<File>, way: Way, queues: &[u16]) -> io::Result<Self> {
        let options = &shared.options;
        let size = RingSize {
            entries: options.queue_depth.max(1),
            registered: options.registered.min(options.queue_depth.max(1)),
            payload_bytes: (options.request_bytes as usize).max(MIN_PAYLOAD),
            zero_copy: way == Way::ZeroCopy,
        };
        let waker = Waker::new()?;
        let inbox = Arc::new(Inbox { answers: Mutex::default(), waker: waker.clone() });
        let mut ring = FuseRing::new(device, queues, size, waker)?;
        ring.submit()?;
        Ok(Self { shared: Arc::clone(shared), ring, inbox, waiting: 0, reading: HashMap::new() })
    }

    /// Until the file system is unmounted.
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.ring.wait()?;
            while let Some(event) = self.ring.next_event()? {
                match event {
                    Event::Request(held) => self.request(held)?,
                    Event::Unread(held) => self.unread(held)?,
                    Event::Woken => self.answers()?,
                    Event::Lost(Errno::ENOTCONN | Errno::ECONNABORTED) => return Ok(()),
                    Event::Lost(errno) => {
                        tracing::error!(%errno, "the kernel refused an entry of a FUSE ring")
                    }
                }
            }
        }
    }

    fn request(&mut self, held: Held) -> io::Result<()> {
        let (headers, payload) = self.ring.request(&held);
        let Some(request) = Request::from_ring(headers, payload) else {
            return self.ring.reply(held, Err(libc_eio()));
        };
        let poked = request.header.opcode == wire::STATFS;
        let (inode, unique) = (request.header.inode, request.header.unique);
        let (number, queue) = (held.number(), self.ring.queue(&held));
        match request.answer(&self.shared.files) {
            Answer::Read { offset, read: Read::InFile { file, len } } => {
                let asked = Asked { inode, unique, offset, len, unreadable: false };
                self.reply_from_file(held, &file, asked)
            }
            Answer::Read { offset, read: Read::Ask { len } } => {
                self.ask(held, Asked { inode, unique, offset, len, unreadable: false });
                self.grow(queue)
            }
            Answer::Bytes(bytes) => {
                self.reply_bytes(held, &bytes)?;
                if poked && self.ring.next_came(number)? {
                    // The kernel had a request queued, and maybe more behind it.
                    poke(self.shared.dir.clone(), queue);
                }
                Ok(())
            }
            Answer::Failed(errno) => self.ring.reply(held, Err(errno)),
            Answer::Read { read: Read::Nothing, .. } | Answer::Nothing => self.ring.reply(held, Ok(())),
        }
    }

    fn ask(&mut self, held: Held, asked: Asked) {
        let inbox = Arc::clone(&self.inbox);
        let Asked { inode, unique, offset, len, unreadable } = asked;
        let answer = Box::new(move |supply| inbox.put(held, asked, supply));
        self.waiting += 1;
        self.shared.misses.ask(Waiting { unique, inode, offset, len, unreadable, answer });
    }

    /// Waiting reads must leave entries for those that need not wait.
    fn grow(&mut self, queue: u16) -> io::Result<()> {
        if self.waiting + SPARE_ENTRIES <= usize::from(self.shared.options.queue_depth) {
            return Ok(());
        }
        let (used, all) = self.ring.usage(queue);
        if used + SPARE_ENTRIES > all && all < MAX_ENTRIES {
            let more = SPARE_ENTRIES.max(all / 2);
            tracing::debug!(queue, used, all, more, "a queue of the FUSE ring gets longer");
            self.ring.grow(queue, more as u16)?;
            self.ring.submit()?;
            poke(self.shared.dir.clone(), queue);
        }
        Ok(())
    }

    fn answers(&mut self) -> io::Result<()> {
        for (held, asked, supply) in self.inbox.take() {
            self.waiting = self.waiting.saturating_sub(1);
            match supply {
                // It failed before: there is nobody else to be asked.
                Supply::InFile(file) if asked.unreadable => match read(&file, asked) {
                    Ok(bytes) => self.reply_bytes(held, &bytes)?,
                    Err(error) => {
                        self.ring.reply(held, Err(error.raw_os_error().unwrap_or(libc_eio())))?;
                    }
                },
                Supply::InFile(file) => self.reply_from_file(held, &file, asked)?,
                Supply::Failed(errno) => self.ring.reply(held, Err(errno))?,
                Supply::Bytes(bytes) => self.reply_bytes(held, &bytes)?,
            }
        }
        Ok(())
    }

    fn reply_from_file(&mut self, held: Held, file: &Arc<File>, asked: Asked) -> io::Result<()> {
        self.reading.insert(held.number(), asked);
        self.ring.reply_from_file(held, file, asked.offset, asked.len)
    }

    fn reply_bytes(&mut self, held: Held, bytes: &[u8]) -> io::Result<()> {
        // Should they have to be read from memory, and that fail, nothing is tried again.
        self.reading.remove(&held.number());
        self.ring.reply_bytes(held, bytes)
    }

    /// The read in front of a commit failed or came short. It is read again, and the agent is asked for what the file does not give.
    fn unread(&mut self, held: Held) -> io::Result<()> {
        let asked = self.reading.remove(&held.number());
        // Without a file it was removed meanwhile.
        let Some((asked, file)) = asked.and_then(|asked| Some((asked, self.shared.files.disk(asked.inode)?)))
        else {
            return self.ring.reply(held, Err(libc_eio()));
        };
        let Asked { inode, offset, len, .. } = asked;
        let error = match read(&file, asked) {
            Ok(bytes) => return self.reply_bytes(held, &bytes),
            Err(error) => error,
        };
        tracing::error!(offset, size = len, %error, "cannot read the layer store");
        self.shared.files.not_local(inode, offset, offset + u64::from(len));
        self.ask(held, Asked { unreadable: true, ..asked });
        Ok(())
    }
}

/// All that a read asks for, by this thread.
fn read(file: &File, asked: Asked) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; asked.len as usize];
    file.read_exact_at(&mut bytes, asked.offset)?;
    Ok(bytes)
}

fn libc_eio() -> i32 {
    Errno::EIO as i32
}

/// What comes by `/dev/fuse` all the same: forgets, interrupts, and requests of before the rings were ready.
fn device_thread(shared: &Arc<Shared>, device: &Arc<File>, way: Way) {
    let mut buffer = vec![0; DEVICE_BUFFER];
    loop {
        let length = match (&**device).read(&mut buffer) {
            Ok(length) => length,
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                // Interrupted; or a request whose reader was killed before it came here.
                Some(Errno::EINTR | Errno::ENOENT | Errno::EAGAIN) => continue,
                // ENODEV: unmounted.
                Some(Errno::ENODEV | Errno::ECONNABORTED) => break,
                _ => {
                    tracing::error!(%error, "cannot read /dev/fuse");
                    break;
                }
            },
        };
        if let Some(request) = buffer.get(..length).and_then(Request::from_device) {
            from_device(shared, device, &request);
        }
    }
    shared.ended(way);
}

fn from_device(shared: &Arc<Shared>, device: &Arc<File>, request: &Request<'_>) {
    let (inode, unique) = (request.header.inode, request.header.unique);
    let answer = match request.answer(&shared.files) {
        Answer::Bytes(bytes) => Ok(bytes),
        Answer::Failed(errno) => Err(errno),
        Answer::Read { read: Read::Nothing, .. } => Ok(Vec::new()),
        Answer::Read { offset, read: Read::InFile { file, len } } => {
            let asked = Asked { inode, unique, offset, len, unreadable: false };
            return write_supply(shared, device, asked, Supply::InFile(file));
        }
        Answer::Read { offset, read: Read::Ask { len } } => {
            return ask(shared, device, Asked { inode, unique, offset, len, unreadable: false });
        }
        Answer::Nothing => {
            if request.header.opcode == wire::INTERRUPT
                && let Some(unique) = request.interrupted()
            {
                shared.misses.interrupt(unique);
            }
            return;
        }
    };
    write_reply(device, unique, answer.as_deref().map_err(|errno| *errno));
}

fn ask(shared: &Arc<Shared>, device: &Arc<File>, asked: Asked) {
    let Asked { inode, unique, offset, len, unreadable } = asked;
    let (this, device) = (Arc::clone(shared), Arc::clone(device));
    let answer = Box::new(move |supply| write_supply(&this, &device, asked, supply));
    shared.misses.ask(Waiting { unique, inode, offset, len, unreadable, answer });
}

fn write_supply(shared: &Arc<Shared>, device: &Arc<File>, asked: Asked, supply: Supply) {
    let Asked { inode, unique, offset, len, unreadable } = asked;
    let answer = match supply {
        Supply::Bytes(bytes) => Ok(bytes),
        Supply::Failed(errno) => Err(errno),
        Supply::InFile(file) => match read(&file, asked) {
            Ok(bytes) => Ok(bytes),
            Err(_) if !unreadable => {
                shared.files.not_local(inode, offset, offset + u64::from(len));
                return ask(shared, device, Asked { unreadable: true, ..asked });
            }
            Err(error) => Err(error.raw_os_error().unwrap_or(libc_eio())),
        },
    };
    write_reply(device, unique, answer.as_deref().map_err(|errno| *errno));
}

fn write_reply(mut device: &File, unique: u64, answer: Result<&[u8], i32>) {
    if let Err(error) = device.write_all(&wire::reply(unique, answer)) {
        // ENOENT: the request was interrupted.
        tracing::debug!(unique, %error, "a reply was not taken");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_has_one_thread() {
        assert_eq!(assign(&[0, 1], 2), [(0, vec![0]), (1, vec![1])]);
        assert_eq!(assign(&[2], 4), [(2, vec![2, 0, 1, 3])]);
        assert_eq!(assign(&[1, 3], 6), [(1, vec![1, 0, 4]), (3, vec![3, 2, 5])]);
        let possible = possible_cpus().expect("known");
        let all: usize = assign(&usable_cpus().expect("known"), possible).iter().map(|(_, q)| q.len()).sum();
        assert_eq!(all, usize::from(possible));
    }
}
