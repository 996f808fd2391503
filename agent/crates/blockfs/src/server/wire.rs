//! The kernel's FUSE requests and their replies as bytes, for the way over io_uring: the few operations that a directory of
//! read-only files needs. Layouts are those of `linux/fuse.h` 7.46; integers are the machine's own.
//!
//! Requests come from the kernel, yet nothing here trusts their lengths.

use sluice_kernel::fuse::{IO_URING_BUFPOOL, OVER_IO_URING};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::files::{Files, ROOT, Read, VALID_SECONDS, file_name};

pub(super) const INIT: u32 = 26;
pub(super) const INTERRUPT: u32 = 36;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
pub(super) const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;

const ENOSYS: i32 = 38;
const ENOTTY: i32 = 25;
const EINVAL: i32 = 22;

const REGULAR: u32 = 0o100_400;
const DIRECTORY: u32 = 0o040_500;
const DT_REG: u32 = 8;

const OPEN_KEEP_CACHE: u32 = 1 << 1;
const OPEN_NOFLUSH: u32 = 1 << 5;
/// Has a meaning for queues with zero copy only.
const OPEN_ZERO_COPY: u32 = 1 << 8;

const ASYNC_READ: u64 = 1 << 0;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InHeader {
    pub(super) len: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) inode: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    extensions: u32,
}

/// `struct fuse_out_header`.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct OutHeader {
    len: u32,
    error: i32,
    unique: u64,
}

/// The beginning of `struct fuse_init_in`: old kernels send no more, and `flags2` is read apart.
#[derive(Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InitIn {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    unused: [u32; 6],
}

/// `struct fuse_read_in`, also of READDIR.
#[derive(Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReadIn {
    handle: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Attributes {
    inode: u64,
    size: u64,
    blocks: u64,
    times: [u64; 3],
    nanoseconds: [u32; 3],
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct EntryOut {
    inode: u64,
    generation: u64,
    entry_valid: u64,
    attr_valid: u64,
    nanoseconds: [u32; 2],
    attributes: Attributes,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct AttrOut {
    valid: u64,
    nanoseconds: u32,
    dummy: u32,
    attributes: Attributes,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct OpenOut {
    handle: u64,
    flags: u32,
    backing: u32,
}

#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct StatfsOut {
    counts: [u64; 5],
    block_bytes: u32,
    name_bytes: u32,
    fragment_bytes: u32,
    padding: u32,
    spare: [u32; 6],
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) header: InHeader,
    /// The operation's own header, as much as came.
    pub(super) own: &'a [u8],
    /// Further arguments.
    pub(super) rest: &'a [u8],
}

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// It is answered with these bytes.
    Bytes(Vec<u8>),
    /// A read.
    Read { offset: u64, read: Read },
    /// An errno, as a positive number.
    Failed(i32),
    /// The kernel wants no answer.
    Nothing,
}

impl<'a> Request<'a> {
    /// A request as `/dev/fuse` gives it: all in a row.
    pub(super) fn from_device(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = InHeader::read_from_prefix(bytes).ok()?;
        Some(Self { header, own: rest, rest })
    }

    /// A request as a ring gives it: the operation's header apart, at 128.
    pub(super) fn from_ring(headers: &'a [u8; 256], payload: &'a [u8]) -> Option<Self> {
        let (header, _) = InHeader::read_from_prefix(headers).ok()?;
        Some(Self { header, own: headers.get(128..)?, rest: payload })
    }

    /// The inode number that a read of any kind, or an interrupt, names first.
    pub(super) fn interrupted(&self) -> Option<u64> {
        u64::read_from_prefix(self.own).ok().map(|(unique, _)| unique)
    }

    /// The one set of operations.
    pub(super) fn answer(&self, files: &Files) -> Answer {
        match self.try_answer(files) {
            Ok(answer) => answer,
            Err(errno) => Answer::Failed(errno),
        }
    }

    fn try_answer(&self, files: &Files) -> Result<Answer, i32> {
        let inode = self.header.inode;
        Ok(match self.header.opcode {
            READ => {
                let (asked, _) = ReadIn::read_from_prefix(self.own).map_err(|_short| EINVAL)?;
                Answer::Read { offset: asked.offset, read: files.read(inode, asked.offset, asked.size)? }
            }
            LOOKUP => {
                let name = self.rest.split(|byte| *byte == 0).next().unwrap_or_default();
                let (inode, file) = files.lookup(inode, name)?;
                bytes(&EntryOut {
                    inode,
                    entry_valid: VALID_SECONDS,
                    attr_valid: VALID_SECONDS,
                    attributes: attributes(inode, Some(file.size)),
                    ..EntryOut::default()
                })
            }
            GETATTR => {
                let size = if inode == ROOT { None } else { Some(files.get(inode)?.size) };
                let attributes = attributes(inode, size);
                bytes(&AttrOut { valid: VALID_SECONDS, attributes, ..AttrOut::default() })
            }
            OPEN => {
                // ESTALE: the kernel looks the name up again and finds nothing.
                files.get(inode)?;
                let flags = OPEN_KEEP_CACHE | OPEN_NOFLUSH | OPEN_ZERO_COPY;
                bytes(&OpenOut { flags, ..OpenOut::default() })
            }
            OPENDIR => bytes(&OpenOut::default()),
            READDIR => {
                let (asked, _) = ReadIn::read_from_prefix(self.own).map_err(|_short| EINVAL)?;
                Answer::Bytes(directory(files, asked.offset, asked.size))
            }
            STATFS => bytes(&StatfsOut {
                block_bytes: 4096,
                name_bytes: 255,
                fragment_bytes: 4096,
                ..StatfsOut::default()
            }),
            // A loop device flushes its file when it is released; there is nothing to flush.
            RELEASE | RELEASEDIR | FLUSH | FSYNC | DESTROY => Answer::Bytes(Vec::new()),
            FORGET | BATCH_FORGET | INTERRUPT => Answer::Nothing,
            // Never anything else: overlayfs asks for file attributes and takes other errors for failure.
            IOCTL => return Err(ENOTTY),
            _ => return Err(ENOSYS),
        })
    }
}

fn bytes(reply: &(impl IntoBytes + Immutable)) -> Answer {
    Answer::Bytes(reply.as_bytes().to_vec())
}

fn attributes(inode: u64, size: Option<u64>) -> Attributes {
    let (mode, nlink) = if size.is_some() { (REGULAR, 1) } else { (DIRECTORY, 2) };
    let size = size.unwrap_or(0);
    Attributes { inode, size, blocks: size / 512, mode, nlink, blksize: 4096, ..Attributes::default() }
}

/// `struct fuse_dirent`s from number `offset` on, no more than `limit` bytes.
fn directory(files: &Files, offset: u64, limit: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
    for (at, file) in files.list().into_iter().enumerate().skip(skipped) {
        let name = file_name(file.inode, &file.name);
        let bytes = (24 + name.len()).next_multiple_of(8);
        if out.len() + bytes > limit as usize {
            break;
        }
        let end = out.len() + bytes;
        out.extend(file.inode.to_ne_bytes());
        out.extend((at as u64 + 1).to_ne_bytes());
        out.extend((name.len() as u32).to_ne_bytes());
        out.extend(DT_REG.to_ne_bytes());
        out.extend(name.as_bytes());
        out.resize(end, 0);
    }
    out
}

/// A whole message for `/dev/fuse`.
pub(super) fn reply(unique: u64, answer: Result<&[u8], i32>) -> Vec<u8> {
    let (error, bytes) = answer.map_or_else(|errno| (-errno, &[][..]), |bytes| (0, bytes));
    let len = (size_of::<OutHeader>() + bytes.len()) as u32;
    let mut message = OutHeader { len, error, unique }.as_bytes().to_vec();
    message.extend(bytes);
    message
}

/// The answer to INIT that turns FUSE over io_uring on, with pools of buffers if `zero_copy` is wanted; `None` if this kernel does not
/// offer it.
pub(super) fn init(
    request: &Request<'_>,
    request_bytes: u32,
    max_background: u16,
    zero_copy: bool,
) -> Option<Vec<u8>> {
    let (asked, more) = InitIn::read_from_prefix(request.own).ok()?;
    let more_flags = u32::read_from_prefix(more).map_or(0, |(flags, _)| flags);
    let offered = u64::from(asked.flags) | u64::from(more_flags) << 32;
    let needed = INIT_EXT | OVER_IO_URING | if zero_copy { IO_URING_BUFPOOL } else { 0 };
    if offered & needed != needed {
        return None;
    }
    let flags = needed | offered & (ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES);
    let out = InitOut {
        major: 7,
        minor: asked.minor.min(if zero_copy { 46 } else { 42 }),
        max_readahead: asked.max_readahead.min(request_bytes),
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        max_background,
        congestion_threshold: max_background,
        max_write: 8192,
        time_gran: 1,
        max_pages: u16::try_from(request_bytes / 4096).unwrap_or(u16::MAX),
        ..InitOut::default()
    };
    Some(reply(request.header.unique, Ok(out.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_linux_fuse_h() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<Attributes>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<OpenOut>(), 16);
        assert_eq!(size_of::<StatfsOut>(), 80);
    }

    fn message(opcode: u32, own: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((size_of::<InHeader>() + own.len()) as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(77_u64.to_ne_bytes());
        bytes.extend(7_u64.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes.extend(own);
        bytes
    }

    #[test]
    fn requests_cut_short_are_answered_with_an_error() {
        let files = Files::default();
        for opcode in 0..60 {
            let whole = message(opcode, &[0; 40]);
            for length in 0..whole.len() {
                let Some(request) = Request::from_device(&whole[..length]) else { continue };
                let answer = request.answer(&files);
                let read = matches!(answer, Answer::Read { .. });
                assert!(!read, "there is no file: {answer:?}");
            }
        }
    }

    #[test]
    fn a_directory_is_read_in_pieces() {
        let files = Files::default();
        for inode in 2..100 {
            files.add(inode, format!("layer{inode}"), 4096, None);
        }
        let (mut offset, mut seen) = (0, 0);
        loop {
            let piece = directory(&files, offset, 200);
            if piece.is_empty() {
                break;
            }
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let number = |at: usize| u64::from_ne_bytes(rest[at..at + 8].try_into().expect("eight"));
                assert_eq!(number(0), seen + 2);
                offset = number(8);
                let length = u32::from_ne_bytes(rest[16..20].try_into().expect("four")) as usize;
                let name = format!("{0}-layer{0}", seen + 2);
                assert_eq!(&rest[24..24 + length], name.as_bytes());
                rest = &rest[(24 + length).next_multiple_of(8)..];
                seen += 1;
            }
        }
        assert_eq!(seen, 98);
    }

    #[test]
    fn init_without_the_flag_is_not_answered() {
        let own = [7_u32, 41, 1 << 20, INIT_EXT as u32].map(u32::to_ne_bytes).concat();
        let answer = |flags: Option<u64>, zero_copy| {
            let more = flags.map_or(Vec::new(), |flags| ((flags >> 32) as u32).to_ne_bytes().to_vec());
            let request = message(INIT, &[&own[..], &more].concat());
            init(&Request::from_device(&request).expect("parses"), 1 << 20, 100, zero_copy)
        };
        assert!(answer(None, false).is_none());
        assert!(answer(Some(OVER_IO_URING), true).is_none());
        for (offered, zero_copy) in [(OVER_IO_URING, false), (OVER_IO_URING | IO_URING_BUFPOOL, true)] {
            let answer = answer(Some(offered), zero_copy).expect("offered");
            assert_eq!(answer.len(), 16 + 64);
            assert_eq!(answer[8..16], 77_u64.to_ne_bytes());
            assert_eq!(answer[16 + 32..16 + 36], ((offered >> 32) as u32).to_ne_bytes());
        }
    }
}
