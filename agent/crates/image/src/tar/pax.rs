//! PAX extended headers (POSIX.1-2001, `%d %s=%s\n` records) and the GNU sparse keys among them.

use std::collections::BTreeMap;

use super::TarError;
use crate::entry::Timestamp;

/// What the extended headers before an entry say of it.
#[derive(Debug, Default, Clone)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// GNU sparse keys, formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default, Clone)]
pub(super) struct Sparse {
    /// Format 1.0: the map stands at the beginning of the data.
    pub(super) map_in_data: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Formats 0.0 and 0.1.
    pub(super) segments: Vec<(u64, u64)>,
    pending_offset: Option<u64>,
}

impl Extensions {
    /// Takes the records of one extended header that stands at `offset`.
    pub(super) fn read(mut records: &[u8], offset: u64) -> Result<Self, TarError> {
        let mut extensions = Self::default();
        while !records.is_empty() {
            // Some writers pad the records with NULs.
            if records.iter().all(|byte| *byte == 0) {
                break;
            }
            let (key, value, rest) =
                record(records).ok_or(TarError::Field { offset, field: "pax record" })?;
            extensions.take(key, value).ok_or(TarError::Field { offset, field: "pax value" })?;
            records = rest;
        }
        Ok(extensions)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(name.to_vec(), value.to_vec());
            return Some(());
        }
        if value.is_empty() {
            // POSIX: an empty value takes the record back.
            match key {
                b"path" => self.path = None,
                b"linkpath" => self.link_path = None,
                b"size" => self.size = None,
                b"uid" => self.uid = None,
                b"gid" => self.gid = None,
                b"mtime" => self.mtime = None,
                _ => {}
            }
            return Some(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link_path = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(u32::try_from(decimal(value)?).ok()?),
            b"gid" => self.gid = Some(u32::try_from(decimal(value)?).ok()?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.map_in_data = value == b"1",
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = Some(decimal(value)?),
            b"GNU.sparse.offset" => self.sparse.pending_offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => {
                let start = self.sparse.pending_offset.take()?;
                self.sparse.push(start, decimal(value)?)?;
            }
            b"GNU.sparse.map" => {
                let mut numbers = value.split(|byte| *byte == b',');
                while let Some(start) = numbers.next() {
                    self.sparse.push(decimal(start)?, decimal(numbers.next()?)?)?;
                }
            }
            _ => {}
        }
        Some(())
    }
}

impl Sparse {
    fn push(&mut self, start: u64, len: u64) -> Option<()> {
        if self.segments.len() >= super::MAX_SEGMENTS {
            return None;
        }
        self.segments.push((start, len));
        Some(())
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.map_in_data || !self.segments.is_empty() || self.real_size.is_some()
    }
}

/// Splits one `LEN KEY=VALUE\n` record off.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(bytes.get(..space)?)?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((body.get(..equals)?, body.get(equals + 1..)?, rest))
}

/// A decimal number without sign.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// Seconds with an optional fraction; `-1.5` is a second and a half before the epoch.
fn time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanoseconds: u32 = 0;
    let fraction = parts.next().unwrap_or(&[]);
    for at in 0..9 {
        let digit = match fraction.get(at) {
            Some(byte) => byte.checked_sub(b'0').filter(|digit| *digit < 10)?,
            None => 0,
        };
        nanoseconds = nanoseconds * 10 + u32::from(digit);
    }
    match (negative, nanoseconds) {
        (false, _) => Some(Timestamp { seconds, nanoseconds }),
        (true, 0) => Some(Timestamp { seconds: -seconds, nanoseconds: 0 }),
        (true, _) => Some(Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let text = b"12 path=a/b\n19 mtime=-1.250000\n29 SCHILY.xattr.user.x=a=b\n\x00\n";
        let extensions = Extensions::read(text, 0).expect("valid");
        assert_eq!(extensions.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(extensions.mtime, Some(Timestamp { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(extensions.xattrs.len(), 1);
    }

    #[test]
    fn a_lying_length_is_refused() {
        for text in [&b"99 path=a\n"[..], b"5 path=a\n", b"x path=a\n", b"9 path=a"] {
            assert!(Extensions::read(text, 7).is_err());
        }
    }

    #[test]
    fn sparse_maps() {
        let mut extensions = Extensions::default();
        assert_eq!(extensions.take(b"GNU.sparse.map", b"0,10,100,5"), Some(()));
        assert_eq!(extensions.sparse.segments, [(0, 10), (100, 5)]);
        assert_eq!(extensions.take(b"GNU.sparse.map", b"0,10,100"), None);
    }
}
