//! Tar headers for entries that a table of contents gives: a PAX header with everything, and the block it belongs to.

use crate::entry::Timestamp;
use crate::index::IndexError;
use crate::tar::{TAR_BLOCK, TarEntry, TarKind};

/// Appends an entry's headers; [`crate::tar::TarParser`] reads the entry back from them.
pub(super) fn put_headers(out: &mut Vec<u8>, entry: &TarEntry) -> Result<(), IndexError> {
    let (type_flag, link, device, size): (u8, &[u8], (u32, u32), u64) = match &entry.kind {
        TarKind::File(content) => (b'0', &[], (0, 0), content.size),
        TarKind::HardLink(target) => (b'1', target, (0, 0), 0),
        TarKind::Symlink(target) => (b'2', target, (0, 0), 0),
        TarKind::CharDevice(major, minor) => (b'3', &[], (*major, *minor), 0),
        TarKind::BlockDevice(major, minor) => (b'4', &[], (*major, *minor), 0),
        TarKind::Directory => (b'5', &[], (0, 0), 0),
        TarKind::Fifo => (b'6', &[], (0, 0), 0),
        TarKind::Unknown(_) => return Err(IndexError::Corrupt("an entry has no kind")),
    };
    let mut records = Vec::new();
    // The root's path is empty, which a record cannot be.
    put_record(&mut records, b"path", if entry.path.is_empty() { b"./" } else { &entry.path });
    if !link.is_empty() {
        put_record(&mut records, b"linkpath", link);
    }
    put_record(&mut records, b"uid", entry.uid.to_string().as_bytes());
    put_record(&mut records, b"gid", entry.gid.to_string().as_bytes());
    put_record(&mut records, b"size", size.to_string().as_bytes());
    put_record(&mut records, b"mtime", decimal(entry.mtime).as_bytes());
    for (name, value) in &entry.xattrs {
        // A record's key ends at the first one.
        if name.contains(&b'=') {
            return Err(IndexError::Limit("the name of an extended attribute has a `=`"));
        }
        put_record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    put_block(out, b'x', records.len() as u64, 0, (0, 0));
    out.extend_from_slice(&records);
    out.resize(out.len().next_multiple_of(TAR_BLOCK), 0);
    put_block(out, type_flag, 0, entry.mode, device);
    Ok(())
}

fn put_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // Length, space, key, `=`, value, line end; the length counts its own digits.
    let body = key.len() + value.len() + 3;
    let mut len = body;
    while body + len.to_string().len() != len {
        len = body + len.to_string().len();
    }
    out.extend_from_slice(format!("{len} ").as_bytes());
    out.extend_from_slice(&[key, b"=", value, b"\n"].concat());
}

fn put_block(out: &mut Vec<u8>, type_flag: u8, size: u64, mode: u32, device: (u32, u32)) {
    let mut block = [0; TAR_BLOCK];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = block.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(100, format!("{mode:07o}").as_bytes());
    put(124, format!("{size:011o}").as_bytes());
    put(148, b"        ");
    put(156, &[type_flag]);
    put(257, b"ustar\x0000");
    // Base-256: any 32-bit number fits.
    for (at, number) in [(329, device.0), (337, device.1)] {
        let [a, b, c, d] = number.to_be_bytes();
        put(at, &[0x80, 0, 0, 0, a, b, c, d]);
    }
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    if let Some(field) = block.get_mut(148..155) {
        field.copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
    out.extend_from_slice(&block);
}

fn decimal(time: Timestamp) -> String {
    match (time.seconds, time.nanoseconds) {
        (seconds, 0) => seconds.to_string(),
        (seconds, nanoseconds) if seconds >= 0 => format!("{seconds}.{nanoseconds:09}"),
        (seconds, nanoseconds) => {
            format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{Content, Step, TarParser};

    #[test]
    fn entries_come_back() {
        let entry = |kind| TarEntry {
            path: "long/".repeat(90).trim_end_matches('/').as_bytes().to_vec(),
            kind,
            mode: 0o4755,
            uid: u32::MAX,
            gid: 70_000,
            mtime: Timestamp { seconds: -2, nanoseconds: 250_000_000 },
            xattrs: vec![(b"user.a".to_vec(), b"\0\n=".to_vec()), (b"user.b".to_vec(), vec![7; 300])],
        };
        let mut root = entry(TarKind::Directory);
        root.path.clear();
        let big = 9 << 30;
        let entries = [
            root,
            entry(TarKind::File(Content { size: big, stored: big, segments: None })),
            entry(TarKind::HardLink(b"a/b".to_vec())),
            entry(TarKind::Symlink(b"../x".to_vec())),
            entry(TarKind::CharDevice(4095, 1_048_575)),
            entry(TarKind::BlockDevice(u32::MAX, 0)),
            entry(TarKind::Fifo),
        ];
        for entry in entries {
            let mut tar = Vec::new();
            put_headers(&mut tar, &entry).expect("headers");
            let mut parser = TarParser::new(true);
            let mut found = None;
            let mut input = tar.as_slice();
            while !input.is_empty() {
                let (consumed, step) = parser.step(input).expect("parses");
                if let Step::Entry(entry) = step {
                    found = Some(*entry);
                }
                input = &input[consumed..];
            }
            assert_eq!(found, Some(entry));
        }
        let mut odd = entry(TarKind::Fifo);
        odd.xattrs = vec![(b"user.a=".to_vec(), Vec::new())];
        assert!(put_headers(&mut Vec::new(), &odd).is_err());
    }
}
