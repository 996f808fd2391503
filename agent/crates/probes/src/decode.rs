//! From the kernel's records to events.

use std::ffi::CStr;

use sluice_events::{
    AccessEvent, BlockedEvent, Call, ExecEvent, FailedEvent, FillKey, FillValue, Head, Kind, OpenEvent,
    VERSION,
};
use sluice_trace::{AccessKind, FailedCall, Process, Record, What};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::Device;

/// Bytes of a page. The programs count pages of 4096 bytes.
const PAGE: u64 = 4096;

/// A record from the kernel that is not understood: the programs and the agent are of different builds.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Too short for what it says it is.
    #[error("a record of {0} bytes is too short")]
    Short(usize),
    /// Another version of the programs.
    #[error("a record has version {0}, not {VERSION}")]
    Version(u8),
    /// A kind that is not known.
    #[error("a record is of the unknown kind {0}")]
    Kind(u16),
    /// A call that is not known.
    #[error("a record is about the unknown call {0}")]
    Call(u16),
}

/// Something that happened on a watched file system (or, for failed calls, on any overlay).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The file system.
    pub device: Device,
    /// What, who and when.
    pub record: Record,
}

fn record<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, RecordError> {
    T::read_from_prefix(bytes).map(|(record, _)| record).map_err(|_rest| RecordError::Short(bytes.len()))
}

/// Text until the first NUL.
fn text(bytes: &[u8]) -> Vec<u8> {
    CStr::from_bytes_until_nul(bytes).map_or_else(|_no_nul| bytes.to_vec(), |text| text.to_bytes().to_vec())
}

fn process(head: &Head) -> Process {
    Process {
        tgid: head.tgid,
        pid: head.pid,
        mnt_ns: head.mnt_ns,
        cgroup: head.cgroup,
        comm: String::from_utf8_lossy(&text(&head.comm)).into_owned(),
    }
}

/// Decodes a record of the ring buffer.
pub(crate) fn event(bytes: &[u8]) -> Result<Event, RecordError> {
    let head: Head = record(bytes)?;
    if head.version != VERSION {
        return Err(RecordError::Version(head.version));
    }
    let kind = Kind::from_number(head.kind).ok_or(RecordError::Kind(head.kind))?;
    let (dev, what) = match kind {
        Kind::Open => {
            let one: OpenEvent = record(bytes)?;
            (one.dev, What::Open { inode: one.inode })
        }
        Kind::Exec => {
            let one: ExecEvent = record(bytes)?;
            (one.dev, What::Exec { inode: one.inode, path: text(&one.path) })
        }
        Kind::Read => access(record(bytes)?, AccessKind::Read),
        Kind::Fault => access(record(bytes)?, AccessKind::Fault),
        Kind::Fill => access(record(bytes)?, AccessKind::Fill),
        Kind::Around => access(record(bytes)?, AccessKind::Around),
        Kind::Blocked => {
            let one: BlockedEvent = record(bytes)?;
            let BlockedEvent { inode, blocked_ns, .. } = one;
            (one.dev, What::Blocked { inode, offset: one.page.saturating_mul(PAGE), blocked_ns })
        }
        Kind::Failed => {
            let one: FailedEvent = record(bytes)?;
            (one.dev, What::Failed(failed(&one)?))
        }
    };
    Ok(Event { device: Device(dev), record: Record { time_ns: head.time_ns, process: process(&head), what } })
}

fn access(one: AccessEvent, kind: AccessKind) -> (u32, What) {
    let offset = one.first_page.saturating_mul(PAGE);
    (one.dev, What::Access { kind, inode: one.inode, offset, len: u64::from(one.pages) * PAGE })
}

fn failed(one: &FailedEvent) -> Result<FailedCall, RecordError> {
    let call = Call::from_number(one.call).ok_or(RecordError::Call(one.call))?;
    let names: Vec<Vec<u8>> =
        one.base.iter().map(|name| text(name)).take_while(|name| !name.is_empty()).collect();
    let cut = names.iter().any(|name| name.len() + 1 >= sluice_events::NAME_LEN);
    let old = text(&one.old);
    let whole_path =
        names.len() < sluice_events::BASE_DEPTH && !cut && old.len() + 1 < sluice_events::PATH_LEN;
    let mut path: Vec<&[u8]> = names.iter().rev().map(Vec::as_slice).collect();
    for name in old.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            // Only right if what is left is no symbolic link; a path through one is looked up by who resolves it.
            b".." => {
                path.pop();
            }
            name => path.push(name),
        }
    }
    Ok(FailedCall {
        call,
        errno: one.errno,
        flags: one.flags,
        path: path.join(&b'/'),
        whole_path,
        new_path: text(&one.new),
        dev: one.dev,
        magic: one.magic,
        inode: (one.inode != 0).then_some(one.inode),
        mode: (one.mode != 0).then_some(one.mode),
    })
}

/// Decodes an entry of the map of page-cache fills, into one event per run of pages.
pub(crate) fn fills(key: &FillKey, value: &FillValue, device: Device, mut sink: impl FnMut(Event)) {
    let process = Process {
        tgid: value.tgid,
        pid: value.pid,
        mnt_ns: key.mnt_ns,
        cgroup: value.cgroup,
        comm: String::from_utf8_lossy(&text(&value.comm)).into_owned(),
    };
    let chunk = key.chunk.saturating_mul(sluice_events::CHUNK_PAGES as u64);
    let mut page = 0_u64;
    for run in value.pages.chunk_by(|one, next| (*one == 0) == (*next == 0)) {
        if run.first().is_some_and(|byte| *byte != 0) {
            let (offset, len) = ((chunk.saturating_add(page)).saturating_mul(PAGE), run.len() as u64 * PAGE);
            let what = What::Access { kind: AccessKind::Fill, inode: key.inode, offset, len };
            let record = Record { time_ns: value.first_ns, process: process.clone(), what };
            sink(Event { device, record });
        }
        page += run.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use sluice_events::{BASE_DEPTH, CHUNK_PAGES, NAME_LEN, PATH_LEN, level};
    use zerocopy::IntoBytes;

    use super::*;

    fn head(kind: Kind) -> Head {
        let comm = *b"mv\0left over....";
        let (time_ns, cgroup, mnt_ns, kind) = (7, 3, 4, kind as u16);
        Head { time_ns, cgroup, mnt_ns, kind, version: VERSION, level: level::FEXIT, tgid: 1, pid: 2, comm }
    }

    fn field<const N: usize>(text: &[u8]) -> [u8; N] {
        let mut field = [0; N];
        field[..text.len()].copy_from_slice(text);
        field
    }

    fn failure(base: &[&[u8]], old: &[u8]) -> FailedCall {
        let mut names = [[0; NAME_LEN]; BASE_DEPTH];
        for (to, from) in names.iter_mut().zip(base) {
            *to = field(from);
        }
        let one = FailedEvent {
            head: head(Kind::Failed),
            inode: 9,
            magic: 0,
            dev: 5,
            errno: 6,
            call: Call::Rename as u16,
            mode: 0o120_777,
            flags: 1,
            base: names,
            old: field::<PATH_LEN>(old),
            new: field::<PATH_LEN>(b"new"),
        };
        let event = event(one.as_bytes()).expect("understood");
        assert_eq!((event.device, event.record.process.comm.as_str()), (Device(5), "mv"));
        match event.record.what {
            What::Failed(failed) => failed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn paths_of_failures_are_put_together() {
        let deep: Vec<&[u8]> = vec![b"d"; BASE_DEPTH];
        type Case<'a> = (&'a [&'a [u8]], &'a [u8], &'a [u8], bool);
        let cases: [Case<'_>; 6] = [
            (&[b"bin", b"usr"], b"sh", b"usr/bin/sh", true),
            (&[], b"/lib/x", b"lib/x", true),
            (&[b"a"], b"../b//./c/", b"b/c", true),
            (&[], b"../../x", b"x", true),
            (&deep, b"x", b"d/d/d/d/d/d/d/d/d/d/d/d/x", false),
            (&[&[b'n'; NAME_LEN - 1]], b"x", &[&[b'n'; NAME_LEN - 1][..], b"/x"].concat(), false),
        ];
        for (base, old, path, whole) in cases {
            let failed = failure(base, old);
            assert_eq!((failed.path.as_slice(), failed.whole_path), (path, whole));
            assert_eq!(failed.on_symlink(), Some(true));
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        let one = OpenEvent { head: head(Kind::Open), inode: 1, dev: 2, reserved: 0 };
        assert!(matches!(event(one.as_bytes().split_at(60).0), Err(RecordError::Short(60))));
        assert!(matches!(event(&[]), Err(RecordError::Short(0))));
        let newer = OpenEvent { head: Head { version: VERSION + 1, ..one.head }, ..one };
        assert!(matches!(event(newer.as_bytes()), Err(RecordError::Version(_))));
        let odd = OpenEvent { head: Head { kind: 99, ..one.head }, ..one };
        assert!(matches!(event(odd.as_bytes()), Err(RecordError::Kind(99))));
    }

    #[test]
    fn fills_come_as_runs() {
        let mut pages = [0; CHUNK_PAGES];
        (pages[0], pages[1], pages[31]) = (1, 1, 1);
        let key = FillKey { inode: 8, chunk: 2, watch: 1, mnt_ns: 4 };
        let value = FillValue { first_ns: 5, cgroup: 6, tgid: 1, pid: 2, comm: *b"cat\0............", pages };
        let mut ranges = Vec::new();
        fills(&key, &value, Device(3), |event| match event.record.what {
            What::Access { kind: AccessKind::Fill, inode: 8, offset, len } => ranges.push((offset, len)),
            other => panic!("{other:?}"),
        });
        assert_eq!(ranges, [(64 * 4096, 8192), (95 * 4096, 4096)]);
    }
}
