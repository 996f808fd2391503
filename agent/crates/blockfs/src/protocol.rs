//! What the agent and the server of its block files say to each other, over a Unix socket of their own.
//!
//! A message is a head of [`HEAD_BYTES`] bytes, little-endian, and `len` bytes behind it. Server and agent may be of different
//! builds (the server outlives the agent), so the first message names the version; another one is refused.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Of this page.
pub const VERSION: u64 = 1;
/// Where the local bytes end of a file that is local as a whole, beginning at 0.
pub(crate) const WHOLE: u64 = u64::MAX;
const HEAD_BYTES: usize = 40;
/// No message is longer: one request's bytes, or a list of files.
const MAX_BYTES: usize = 16 << 20;
/// Fewer bytes than this go out with their head in one system call.
const SHORT: usize = 4096;

/// What a message is about; the fields it uses are in the comments, `a` and `b` being numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// Server to a new agent: id = its process, a = version, b = next free inode number, bytes = way, a line each, then its files ([`FileRecord`]).
    Hello = 1,
    /// Agent: here is the source of file `id`: a = size, bytes = name; a descriptor of its local file may come along.
    Add = 2,
    /// Server: file `id` can be opened.
    Added = 3,
    /// Agent: file `id` is gone.
    Remove = 4,
    /// Agent: bytes from a to b of file `id` are in its local file; from 0 to [`WHOLE`] also for reads that wait.
    Local = 5,
    /// Server: read `id` waits; a = file, b = offset, bytes = length, eight of them. Eight more, not zero: the local file does not give
    /// these bytes. Agents that do not know that may answer `InFile`, and the read fails.
    Read = 6,
    /// Agent: the bytes of read `id` are in the local file.
    InFile = 7,
    /// Agent: the bytes of read `id`.
    Bytes = 8,
    /// Agent: read `id` fails with errno a.
    Failed = 9,
    /// Agent: take the mount away and end.
    Unmount = 10,
    /// Server: done; a = errno, 0 if it went well.
    Unmounted = 11,
    /// Agent: a descriptor to keep open as long as this agent is connected.
    Hold = 12,
}

const KINDS: [Kind; 12] = [
    Kind::Hello,
    Kind::Add,
    Kind::Added,
    Kind::Remove,
    Kind::Local,
    Kind::Read,
    Kind::InFile,
    Kind::Bytes,
    Kind::Failed,
    Kind::Unmount,
    Kind::Unmounted,
    Kind::Hold,
];

/// A message; see [`Kind`] for what it holds.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) id: u64,
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptor: Option<OwnedFd>,
}

impl Message {
    /// Waits for the next message. `UnexpectedEof`: the other one is gone.
    pub(crate) fn receive(stream: &UnixStream) -> io::Result<Self> {
        let mut head = [0; HEAD_BYTES];
        let descriptor = sluice_kernel::pass::receive(stream, &mut head)?;
        let number = |at: usize| {
            let bytes = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            u64::from_le_bytes(bytes)
        };
        let (kind, length) = (number(0), number(32));
        let kind = KINDS.into_iter().find(|known| u64::from(*known as u32) == kind);
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_BYTES);
        let (Some(kind), Some(length)) = (kind, length) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of no known kind or length"));
        };
        let mut bytes = vec![0; length];
        sluice_kernel::pass::receive(stream, &mut bytes)?;
        Ok(Self { kind, id: number(8), a: number(16), b: number(24), bytes, descriptor })
    }
}

/// The numbers of a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) id: u64,
    pub(crate) a: u64,
    pub(crate) b: u64,
}

impl Head {
    pub(crate) fn new(kind: Kind, id: u64) -> Self {
        Self { kind, id, a: 0, b: 0 }
    }

    /// Sends the message with `bytes` behind it. Blocks while the socket is full.
    pub(crate) fn send(
        self,
        stream: &UnixStream,
        bytes: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        for number in [self.kind as u64, self.id, self.a, self.b, bytes.len() as u64] {
            head.extend(number.to_le_bytes());
        }
        if bytes.len() < SHORT {
            head.extend(bytes);
            return sluice_kernel::pass::send(stream, &head, descriptor);
        }
        sluice_kernel::pass::send(stream, &head, descriptor)?;
        sluice_kernel::pass::send(stream, bytes, None)
    }
}

/// A file that the server has: as a line `INODE SIZE NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) name: String,
}

impl FileRecord {
    pub(crate) fn line(&self) -> String {
        format!("{} {} {}\n", self.inode, self.size, self.name)
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(3, ' ');
        let (inode, size) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { inode, size, name: words.next()?.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (here, there) = UnixStream::pair().expect("pair");
        for length in [0, 1, 4095, 4096, 100_000] {
            let bytes: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let head = Head { a: 1, b: u64::MAX, ..Head::new(Kind::Bytes, 7) };
            std::thread::scope(|scope| {
                scope.spawn(|| head.send(&here, &bytes, None).expect("sent"));
                let came = Message::receive(&there).expect("received");
                assert_eq!((came.kind, came.id, came.a, came.b), (Kind::Bytes, 7, 1, u64::MAX));
                assert!(came.bytes == bytes);
            });
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (kind, length) in [(99_u64, 0_u64), (1, u64::MAX), (1, 17 << 20)] {
            let (here, there) = UnixStream::pair().expect("pair");
            let numbers = [kind, 0, 0, 0, length];
            let head: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            sluice_kernel::pass::send(&here, &head, None).expect("sent");
            let error = Message::receive(&there).expect_err("nonsense");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn file_records_keep_names_with_blanks() {
        let record = FileRecord { inode: 7, size: 4096, name: "a b".to_owned() };
        assert_eq!(FileRecord::parse(record.line().trim_end()), Some(record));
        assert_eq!(FileRecord::parse("7 x y"), None);
    }
}
