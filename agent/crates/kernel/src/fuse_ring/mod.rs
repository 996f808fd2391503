//! FUSE over io_uring (Linux 6.14): queues of requests that one thread serves, as owned entries behind a safe interface.
//!
//! Numbers and layouts are those of `linux/fuse.h` 7.46. What a request says is not known here: its bytes are given as they
//! came. Rules that the kernel makes, and that were tried:
//!
//! * Each possible CPU has a queue, and each queue needs an entry before any request comes this way.
//! * An entry is the kernel's until a request is in it; then it is ours until it is committed, which answers the request
//!   and waits for the next one in it. There is no other way to give it back: a request that waits for the network keeps
//!   its entry. Therefore queues can get more entries; their memory is not there until it is used.
//! * Everything of a ring must be submitted by the thread that made it: the kernel copies requests in that thread's context.
//! * Zero copy (7.3) is a queue's, asked for before its first entry. The pages of a read, of a file opened for it, are then a buffer of
//!   the ring while the request is in an entry, by the entry's number. Only the ring's own reads can write there. All other
//!   requests have their payload in the queue's pool, at a place that the kernel chooses anew for each.

mod memory;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;

use memory::{Memory, Region};

const CMD_REGISTER: u32 = 1;
const CMD_COMMIT_AND_FETCH: u32 = 2;
const CMD_ADD_QUEUE: u32 = 3;
const CMD_ADD_BUFPOOL: u32 = 4;
/// `FUSE_URING_ZERO_COPY`.
const QUEUE_ZERO_COPY: u64 = 1 << 0;
/// Entries of a ring with zero copy, over all its queues: as many buffers as a ring can have.
const MAX_BUFFERS: usize = 1 << 14;
/// Payloads of a queue with zero copy: for requests that are answered at once.
const POOL_PAYLOADS: usize = 4;
/// Where an SQE's `len` is, which the io-uring crate does not let us set for commands.
const SQE_LEN: usize = 24;
const SQ_ENTRIES: u32 = 256;
const CQ_ENTRIES: u32 = 4096;

/// The lowest bits of `user_data` say what has ended, those above which entry it concerns.
const KIND_BITS: u32 = 2;
const KIND_COMMAND: u64 = 0;
const KIND_READ: u64 = 1;
const KIND_WAKE: u64 = 2;

/// How much a ring can hold.
#[derive(Debug, Clone, Copy)]
pub struct RingSize {
    /// Entries of each queue at first.
    pub entries: u16,
    /// Of those, entries whose payload is registered with io_uring (and pinned in memory).
    pub registered: u16,
    /// Bytes of a payload: at least what the kernel may read at once, and 8192. With zero copy exactly that.
    pub payload_bytes: usize,
    /// Whether bytes go into the pages of whoever reads, and not into payloads (Linux 7.3, `CAP_SYS_ADMIN`).
    pub zero_copy: bool,
}

/// Wakes a ring's thread from any other one.
#[derive(Debug, Clone)]
pub struct Waker(Arc<File>);

impl Waker {
    /// A new one, for one ring.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call takes two numbers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel just returned this descriptor to us and nobody else owns it.
        Ok(Self(Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))))
    }

    /// Makes the ring's next (or present) wait end with [`Event::Woken`].
    pub fn wake(&self) -> io::Result<()> {
        (&*self.0).write_all(&1_u64.to_ne_bytes())
    }
}

/// An entry with a request in it. It must go back to its ring by one of the replies: dropped, its reader waits for ever.
#[derive(Debug)]
#[must_use = "the reader waits for a reply"]
pub struct Held(u32);

impl Held {
    /// Which entry of its ring this is.
    pub fn number(&self) -> u32 {
        self.0
    }
}

/// What a ring has to tell.
#[derive(Debug)]
pub enum Event {
    /// A request came.
    Request(Held),
    /// [`FuseRing::reply_from_file`] could not read all bytes; nothing was answered yet.
    Unread(Held),
    /// The kernel does not use an entry any more: ENOTCONN when the file system is unmounted.
    Lost(Errno),
    /// [`Waker::wake`] was called.
    Woken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Kernel,
    Held,
    /// A read is under way whose success commits the entry.
    Reading,
    Lost,
}

#[derive(Debug)]
struct Slot {
    queue: u16,
    memory: Memory,
    /// Number among the registered buffers.
    registered: Option<u16>,
    state: State,
    /// Keeps the descriptor open while a read of it is under way.
    file: Option<Arc<File>>,
    /// Bytes of that read.
    length: u32,
}

/// The queues that one thread serves.
pub struct FuseRing {
    // Fields are dropped in this order: the ring is closed before its memory goes.
    ring: IoUring<squeue::Entry128>,
    slots: Vec<Slot>,
    events: VecDeque<Event>,
    device: Arc<File>,
    waker: Waker,
    wakes: Box<u64>,
    size: RingSize,
    /// With zero copy the payloads of each queue.
    pools: HashMap<u16, Memory>,
    _regions: Vec<Region>,
}

impl std::fmt::Debug for FuseRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FuseRing").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

/// Whether this process may make such rings; costs a system call or two.
pub fn probe() -> io::Result<()> {
    build(8, 8).map(drop)
}

fn build(submissions: u32, completions: u32) -> io::Result<IoUring<squeue::Entry128>> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(completions)
        .build(submissions)
}

impl FuseRing {
    /// A ring of the calling thread for `queues` (numbers of CPUs) of the FUSE connection `device`, INIT being answered.
    /// Requests come as soon as all queues of the connection are registered.
    pub fn new(device: Arc<File>, queues: &[u16], size: RingSize, waker: Waker) -> io::Result<Self> {
        let mut ring = Self {
            ring: build(SQ_ENTRIES, CQ_ENTRIES)?,
            slots: Vec::new(),
            events: VecDeque::new(),
            device,
            waker,
            wakes: Box::new(0),
            size,
            pools: HashMap::new(),
            _regions: Vec::new(),
        };
        if size.zero_copy {
            ring.ring.submitter().register_buffers_sparse(MAX_BUFFERS as u32)?;
            queues.iter().try_for_each(|queue| ring.add_zero_copy(*queue))?;
            ring.size.registered = 0;
        }
        let registered = ring.size.registered;
        for queue in queues {
            ring.grow(*queue, size.entries.saturating_sub(registered))?;
        }
        ring.add_registered(queues)?;
        ring.arm_waker()?;
        Ok(ring)
    }

    /// Adds entries to a queue; with zero copy as many as its ring can have.
    pub fn grow(&mut self, queue: u16, entries: u16) -> io::Result<()> {
        let pool = self.pools.get(&queue).copied();
        let (most, payload_bytes) = match pool {
            Some(_) => (MAX_BUFFERS.saturating_sub(self.slots.len()), 0),
            None => (usize::MAX, self.size.payload_bytes),
        };
        let entries = most.min(entries.into());
        if entries == 0 {
            return Ok(());
        }
        let (region, memory) = Region::new(entries, payload_bytes)?;
        self._regions.push(region);
        let pooled =
            |memory: Memory| pool.map_or(memory, |pool| memory.with_pool(&pool, self.size.payload_bytes));
        let memory: Vec<_> = memory.into_iter().map(pooled).collect();
        memory.into_iter().try_for_each(|memory| self.register(queue, memory, None))
    }

    /// Makes a queue that has no entry yet one with zero copy, and gives it its payloads.
    fn add_zero_copy(&mut self, queue: u16) -> io::Result<()> {
        let (region, memory) = Region::new(1, POOL_PAYLOADS * self.size.payload_bytes)?;
        self._regions.push(region);
        let mut add = command_bytes(0, queue);
        add[..8].copy_from_slice(&QUEUE_ZERO_COPY.to_ne_bytes());
        self.command(CMD_ADD_QUEUE, add)?;
        for pool in memory {
            let place = pool.payload_iovec();
            let mut add = command_bytes(0, queue);
            add[24..32].copy_from_slice(&(place.iov_base as u64).to_ne_bytes());
            add[32..36].copy_from_slice(&(place.iov_len as u32).to_ne_bytes());
            self.command(CMD_ADD_BUFPOOL, add)?;
            self.pools.insert(queue, pool);
        }
        Ok(())
    }

    /// A command that ends at once, while nothing else is under way.
    fn command(&mut self, number: u32, bytes: [u8; 80]) -> io::Result<()> {
        let device = types::Fd(self.device.as_raw_fd());
        self.push(&[opcode::UringCmd80::new(device, number).cmd(bytes).build()])?;
        self.ring.submit_and_wait(1)?;
        match self.ring.completion().next().map(|ended| ended.result()) {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    fn add_registered(&mut self, queues: &[u16]) -> io::Result<()> {
        let each = usize::from(self.size.registered);
        if each == 0 {
            return Ok(());
        }
        let (region, memory) = Region::new(queues.len() * each, self.size.payload_bytes)?;
        self._regions.push(region);
        let buffers: Vec<_> = memory.iter().map(Memory::payload_iovec).collect();
        // SAFETY: the payloads live in a region that is dropped after the ring.
        if let Err(error) = unsafe { self.ring.submitter().register_buffers(&buffers) } {
            // A limit of locked memory: all entries are plain ones then.
            let entries = queues.iter().flat_map(|queue| std::iter::repeat_n(*queue, each)).zip(memory);
            drop(error);
            return entries.into_iter().try_for_each(|(queue, memory)| self.register(queue, memory, None));
        }
        for (number, memory) in memory.into_iter().enumerate() {
            let queue = queues.get(number / each).copied().ok_or(io::ErrorKind::InvalidInput)?;
            self.register(queue, memory, u16::try_from(number).ok())?;
        }
        Ok(())
    }

    fn register(&mut self, queue: u16, memory: Memory, registered: Option<u16>) -> io::Result<()> {
        let slot = self.slots.len() as u64;
        self.slots.push(Slot { queue, memory, registered, state: State::Kernel, file: None, length: 0 });
        let mut bytes = command_bytes(0, queue);
        if self.size.zero_copy {
            bytes[24..26].copy_from_slice(&(slot as u16).to_ne_bytes());
        }
        let command = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), CMD_REGISTER)
            .cmd(bytes)
            .addr(Some(memory.write_iovecs()));
        let entry = with_length(command.build(), 2).user_data(slot << KIND_BITS | KIND_COMMAND);
        self.push(&[entry])
    }

    /// Submits what was queued. Does not wait.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.submit().map(drop)
    }

    /// Submits what was queued, and says whether entry `number` has its next request already: the kernel had it queued.
    pub fn next_came(&mut self, number: u32) -> io::Result<bool> {
        self.ring.submit()?;
        self.take_in()?;
        Ok(self.events.iter().any(|event| matches!(event, Event::Request(held) if held.0 == number)))
    }

    /// Submits what was queued and waits until there is an event.
    pub fn wait(&mut self) -> io::Result<()> {
        if !self.events.is_empty() {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            // EBUSY: completions overflowed; they are taken in now.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next event, if any. Does not wait.
    pub fn next_event(&mut self) -> io::Result<Option<Event>> {
        if self.events.is_empty() {
            self.take_in()?;
        }
        Ok(self.events.pop_front())
    }

    fn take_in(&mut self) -> io::Result<()> {
        let mut woken = false;
        for entry in self.ring.completion() {
            let (data, result) = (entry.user_data(), entry.result());
            if data & ((1 << KIND_BITS) - 1) == KIND_WAKE {
                woken = true;
                continue;
            }
            let number = data >> KIND_BITS;
            let Some(slot) = usize::try_from(number).ok().and_then(|number| self.slots.get_mut(number))
            else {
                continue;
            };
            let held = Held(number as u32);
            if data & ((1 << KIND_BITS) - 1) == KIND_READ {
                slot.file = None;
                if u32::try_from(result) == Ok(slot.length) {
                    continue;
                }
                // Successful reads of files are silent, so this one failed; the commit linked to it is cancelled, silently too.
                slot.state = State::Held;
                self.events.push_back(Event::Unread(held));
                continue;
            }
            match Errno::from_raw(result.saturating_neg()) {
                // Should the kernel tell of the cancelled commit after all.
                Errno::ECANCELED => {}
                _ if result >= 0 => {
                    slot.file = None;
                    slot.state = State::Held;
                    self.events.push_back(Event::Request(held));
                }
                error => {
                    slot.file = None;
                    slot.state = State::Lost;
                    self.events.push_back(Event::Lost(error));
                }
            }
        }
        if woken {
            self.arm_waker()?;
            self.events.push_back(Event::Woken);
        }
        Ok(())
    }

    /// The number of the queue that an entry belongs to.
    pub fn queue(&self, held: &Held) -> u16 {
        self.slot(held).queue
    }

    /// Entries of a queue with a request in them, and all it has.
    pub fn usage(&self, queue: u16) -> (usize, usize) {
        let own = || self.slots.iter().filter(|slot| slot.queue == queue);
        (own().filter(|slot| slot.state == State::Held).count(), own().count())
    }

    /// The request's in-header, the operation's header (from 128 on), and the rest of its arguments.
    pub fn request(&self, held: &Held) -> (&[u8; 256], &[u8]) {
        let memory = &self.slot(held).memory;
        (memory.headers(), memory.payload(memory.entry_header().1))
    }

    /// Answers without bytes, or with an errno (as a positive number).
    pub fn reply(&mut self, held: Held, answer: Result<(), i32>) -> io::Result<()> {
        let commit = self.commit(&held, answer.map(|()| 0), State::Kernel);
        self.push(&[commit])
    }

    /// Answers with these bytes: a copy. What is zero-copied takes them from a file of memory, which goes when it was read.
    pub fn reply_bytes(&mut self, held: Held, bytes: &[u8]) -> io::Result<()> {
        let memory = &mut self.slot_mut(&held).memory;
        if memory.is_zero_copied() && !bytes.is_empty() {
            return match memory_file(bytes) {
                Ok(file) => self.read_and_commit(held, &Arc::new(file), 0, bytes.len() as u32, false),
                Err(error) => self.reply(held, Err(error.raw_os_error().unwrap_or(libc::EIO))),
            };
        }
        let Some(place) = memory.payload_mut().get_mut(..bytes.len()) else {
            return self.reply(held, Err(libc::EIO));
        };
        place.copy_from_slice(bytes);
        let commit = self.commit(&held, Ok(bytes.len() as u32), State::Kernel);
        self.push(&[commit])
    }

    /// Reads `length` bytes of `file` into the reply and answers with them: one submission, no copy in this process.
    pub fn reply_from_file(
        &mut self,
        held: Held,
        file: &Arc<File>,
        offset: u64,
        length: u32,
    ) -> io::Result<()> {
        self.read_and_commit(held, file, offset, length, true)
    }

    fn read_and_commit(
        &mut self,
        held: Held,
        file: &Arc<File>,
        offset: u64,
        length: u32,
        silent: bool,
    ) -> io::Result<()> {
        let commit = self.commit(&held, Ok(length), State::Reading);
        let slot = self.slot_mut(&held);
        let (fd, payload) = (types::Fd(file.as_raw_fd()), slot.memory.payload_iovec());
        (slot.file, slot.length) = (Some(Arc::clone(file)), length);
        let read = if slot.memory.is_zero_copied() {
            // Addresses in a buffer of the kernel's begin at 0. Where it ends the kernel sees to.
            opcode::ReadFixed::new(fd, std::ptr::null_mut(), length, held.0 as u16).offset(offset).build()
        } else {
            assert!(length as usize <= payload.iov_len, "no more than the payload holds");
            let place = payload.iov_base.cast();
            match slot.registered {
                Some(buffer) => opcode::ReadFixed::new(fd, place, length, buffer).offset(offset).build(),
                None => opcode::Read::new(fd, place, length).offset(offset).build(),
            }
        };
        let flags = if silent { squeue::Flags::SKIP_SUCCESS } else { squeue::Flags::empty() };
        let read = read.flags(flags | squeue::Flags::IO_LINK);
        let read = read.user_data(u64::from(held.0) << KIND_BITS | KIND_READ);
        self.push(&[read.into(), commit])
    }

    fn commit(&mut self, held: &Held, answer: Result<u32, i32>, next: State) -> squeue::Entry128 {
        let device = types::Fd(self.device.as_raw_fd());
        let slot = self.slot_mut(held);
        let headers = slot.memory.headers();
        let unique = headers.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes);
        let (commit_id, _) = slot.memory.entry_header();
        let (error, length) = answer.map_or_else(|errno| (-errno, 0), |length| (0, length));
        slot.memory.write_reply(unique, error, length);
        slot.state = next;
        opcode::UringCmd80::new(device, CMD_COMMIT_AND_FETCH)
            .cmd(command_bytes(commit_id, slot.queue))
            .build()
            .user_data(u64::from(held.0) << KIND_BITS | KIND_COMMAND)
    }

    fn slot(&self, held: &Held) -> &Slot {
        let slot = self.slots.get(held.0 as usize).expect("entries never go");
        assert!(slot.state == State::Held, "an entry of another ring");
        slot
    }

    fn slot_mut(&mut self, held: &Held) -> &mut Slot {
        let slot = self.slots.get_mut(held.0 as usize).expect("entries never go");
        assert!(matches!(slot.state, State::Held | State::Reading), "an entry of another ring");
        slot
    }

    fn arm_waker(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.waker.0.as_raw_fd());
        let read = opcode::Read::new(fd, (&raw mut *self.wakes).cast(), 8).offset(u64::MAX);
        self.push(&[read.build().user_data(KIND_WAKE).into()])
    }

    /// Queues linked operations; submits what is queued already if there is no room.
    fn push(&mut self, entries: &[squeue::Entry128]) -> io::Result<()> {
        loop {
            // SAFETY: each operation's buffers live in regions (dropped after the ring) or in `wakes` (a box that is dropped
            // after the ring too), or are the kernel's own; the kernel has them until the completion is taken in, which
            // `State` keeps track of.
            if unsafe { self.ring.submission().push_multiple(entries) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }
}

/// A file of no file system with these bytes.
fn memory_file(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a string that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"sluice-reply".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just returned this descriptor to us and nobody else owns it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(bytes)?;
    Ok(file)
}

/// `struct fuse_uring_cmd_req`: flags, commit id, queue, and from 24 on what some commands have besides.
fn command_bytes(commit_id: u64, queue: u16) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    bytes[16..18].copy_from_slice(&queue.to_ne_bytes());
    bytes
}

fn with_length(mut entry: squeue::Entry128, length: u32) -> squeue::Entry128 {
    const { assert!(size_of::<squeue::Entry128>() == 128) };
    let start = (&raw mut entry).cast::<u8>();
    // SAFETY: an SQE of 128 bytes, of which four from 24 on are `len` (`linux/io_uring.h`).
    let place = unsafe { start.add(SQE_LEN) };
    // SAFETY: within the entry, which nobody else borrows; no alignment is assumed.
    unsafe { place.cast::<u32>().write_unaligned(length) };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_layout_of_linux_fuse_h() {
        let bytes = command_bytes(0x0102_0304_0506_0708, 0x0A0B);
        assert_eq!(bytes[8..16], 0x0102_0304_0506_0708_u64.to_ne_bytes());
        assert_eq!(bytes[16..18], 0x0A0B_u16.to_ne_bytes());
        let command = opcode::UringCmd80::new(types::Fd(3), CMD_REGISTER).addr(Some(0x55));
        let entry = with_length(command.build(), 2);
        // SAFETY: plain bytes of the same size.
        let raw: [u8; 128] = unsafe { std::mem::transmute(entry) };
        assert_eq!(raw[8..12], CMD_REGISTER.to_ne_bytes());
        assert_eq!(raw[16..24], 0x55_u64.to_ne_bytes());
        assert_eq!(raw[24..28], 2_u32.to_ne_bytes());
    }

    #[test]
    fn a_ring_is_woken_and_says_when_the_device_is_no_connection() {
        let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("opens");
        let size = RingSize { entries: 2, registered: 1, payload_bytes: 8192, zero_copy: false };
        let waker = Waker::new().expect("eventfd");
        let mut ring = FuseRing::new(Arc::new(device), &[0], size, waker.clone()).expect("made");
        waker.wake().expect("woken");
        let (mut lost, mut woken) = (0, 0);
        while lost < 2 || woken < 1 {
            ring.wait().expect("waits");
            while let Some(event) = ring.next_event().expect("events") {
                match event {
                    Event::Lost(_) => lost += 1,
                    Event::Woken => woken += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
