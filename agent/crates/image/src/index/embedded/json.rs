//! The JSON table of eStargz and zstd:chunked (both descend from CRFS), as entries with chunks.

use serde::Deserialize;

use crate::entry::Timestamp;
use crate::index::IndexError;
use crate::records::BLOCK_SIZE;
use crate::tar::{Content, TarEntry, TarKind, normalise};

/// Most entries accepted, chunks included.
const MAX_ENTRIES: usize = 10_000_000;
/// Largest chunk accepted: it is kept in memory until it is verified.
pub(super) const MAX_CHUNK: u64 = 32 << 20;
/// Files that eStargz adds for its own use.
const LANDMARKS: [&[u8]; 2] = [b".prefetch.landmark", b".no.prefetch.landmark"];

const CORRUPT: IndexError = IndexError::Corrupt("the layer's table of contents contradicts itself");

#[derive(Deserialize)]
struct Table {
    version: u64,
    entries: Vec<Row>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Row {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    size: u64,
    link_name: String,
    mode: u32,
    uid: u32,
    gid: u32,
    modtime: String,
    dev_major: u32,
    dev_minor: u32,
    xattrs: std::collections::BTreeMap<String, String>,
    digest: String,
    offset: u64,
    chunk_offset: u64,
    chunk_size: u64,
    chunk_digest: String,
    chunk_type: String,
    inner_offset: u64,
}

/// An entry of the table.
pub(super) struct TableEntry {
    pub(super) tar: TarEntry,
    /// What verifies the content: `(bytes, SHA-256)`, in order; all but the last multiples of the block size.
    pub(super) chunks: Vec<(u64, [u8; 32])>,
    /// Where the content comes from, in order.
    pub(super) pieces: Vec<Source>,
}

/// A run of content: what decoding gives from `offset` of the layer on; `None`: zeros.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) offset: Option<u64>,
    pub(super) len: u64,
}

/// Reads the table of a layer whose contents end before `end`.
pub(super) fn read(text: &[u8], end: u64) -> Result<Vec<TableEntry>, IndexError> {
    let table: Table = serde_json::from_slice(text)
        .map_err(|_json| IndexError::Corrupt("the layer's table of contents is not the JSON it should be"))?;
    if table.version != 1 {
        return Err(IndexError::Limit("its table of contents has a version that is not known here"));
    }
    if table.entries.len() > MAX_ENTRIES {
        return Err(IndexError::Limit("its table of contents has too many entries"));
    }
    let mut out = Vec::new();
    let mut last_offset = None;
    let mut rows = table.entries.into_iter().peekable();
    while let Some(row) = rows.next() {
        let mut chunks = Vec::new();
        while let Some(chunk) = rows.next_if(|next| next.kind == "chunk") {
            chunks.push(chunk);
        }
        let name = normalise(row.name.as_bytes()).ok_or(CORRUPT)?;
        let (spread, pieces) =
            if row.kind == "reg" { contents(&row, &chunks)? } else { (Vec::new(), Vec::new()) };
        for offset in pieces.iter().filter_map(|piece| piece.offset) {
            if last_offset.is_some_and(|last| offset <= last) || offset >= end {
                return Err(CORRUPT);
            }
            last_offset = Some(offset);
        }
        if !LANDMARKS.contains(&name.as_slice()) {
            out.push(TableEntry { tar: entry(row, name)?, chunks: spread, pieces });
        }
    }
    Ok(out)
}

fn entry(row: Row, path: Vec<u8>) -> Result<TarEntry, IndexError> {
    let link = row.link_name.into_bytes();
    let kind = match row.kind.as_str() {
        "reg" => TarKind::File(Content { size: row.size, stored: row.size, segments: None }),
        "dir" => TarKind::Directory,
        "symlink" => TarKind::Symlink(link),
        "hardlink" => TarKind::HardLink(normalise(&link).ok_or(CORRUPT)?),
        "char" => TarKind::CharDevice(row.dev_major, row.dev_minor),
        "block" => TarKind::BlockDevice(row.dev_major, row.dev_minor),
        "fifo" => TarKind::Fifo,
        _ => {
            return Err(IndexError::Limit(
                "its table of contents has a kind of entry that is not known here",
            ));
        }
    };
    let xattrs = row.xattrs.into_iter().map(|(name, value)| Some((name.into_bytes(), base64(&value)?)));
    Ok(TarEntry {
        path,
        kind,
        mode: row.mode & 0o7777,
        uid: row.uid,
        gid: row.gid,
        mtime: time(&row.modtime).ok_or(CORRUPT)?,
        xattrs: xattrs.collect::<Option<_>>().ok_or(CORRUPT)?,
    })
}

/// Chunks and pieces of a regular file, from its own row and the chunk rows after it.
#[expect(clippy::type_complexity, reason = "two halves of a TableEntry")]
fn contents(row: &Row, more: &[Row]) -> Result<(Vec<(u64, [u8; 32])>, Vec<Source>), IndexError> {
    if row.size == 0 {
        return if more.is_empty() { Ok((Vec::new(), Vec::new())) } else { Err(CORRUPT) };
    }
    let mut chunks = Vec::new();
    let mut pieces = Vec::new();
    let mut at = 0;
    let mut aligned = true;
    let rows: Vec<&Row> = std::iter::once(row).chain(more).collect();
    for (number, chunk) in rows.iter().enumerate() {
        let end = rows.get(number + 1).map_or(row.size, |next| next.chunk_offset);
        if chunk.chunk_offset != at || end <= at || end > row.size {
            return Err(CORRUPT);
        }
        let len = end - at;
        if chunk.chunk_size != 0 && chunk.chunk_size != len {
            return Err(CORRUPT);
        }
        if chunk.inner_offset != 0 {
            return Err(IndexError::Limit("several contents share a gzip member of the layer"));
        }
        let zeros = chunk.chunk_type == "zeros";
        pieces.push(Source { offset: (!zeros).then_some(chunk.offset), len });
        match super::sha256(&chunk.chunk_digest) {
            Some(digest) if at % BLOCK_SIZE == 0 && len <= MAX_CHUNK => chunks.push((len, digest)),
            _ => aligned = false,
        }
        at = end;
    }
    if aligned {
        return Ok((chunks, pieces));
    }
    // Chunks of zstd:chunked end anywhere, blocks do not: the file is verified as a whole.
    if row.size > MAX_CHUNK {
        return Err(IndexError::Limit("it has a file above 32 MiB whose chunks do not end at blocks"));
    }
    let digest = super::sha256(&row.digest).ok_or(CORRUPT)?;
    Ok((vec![(row.size, digest)], pieces))
}

/// Standard base64 with padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let data = text.trim_end_matches('=').as_bytes();
    if !digits.len().is_multiple_of(4) || digits.len() - data.len() > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(digits.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for digit in data {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

/// RFC 3339 as Go writes it; the empty text and Go's zero time (year 1) mean none.
fn time(text: &str) -> Option<Timestamp> {
    if text.is_empty() || text.starts_with("0001-") {
        return Some(Timestamp::default());
    }
    let (date, rest) = text.split_once('T')?;
    let split = rest.find(['Z', '+', '-'])?;
    let (clock, zone) = rest.split_at_checked(split)?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let [year, month, day] = three(date, '-')?;
    let [hour, minute, second] = three(clock, ':')?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let zone = match zone.split_at_checked(1)? {
        ("Z", "") => 0,
        (sign, zone) => {
            let [hours, minutes, _] = three(&format!("{zone}:0"), ':')?;
            (hours * 3600 + minutes * 60) * if sign == "-" { -1 } else { 1 }
        }
    };
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - zone;
    Some(Timestamp { seconds, nanoseconds: digits.parse().ok()? })
}

fn three(text: &str, separator: char) -> Option<[i64; 3]> {
    let number = |part: &str| {
        let digits = !part.is_empty() && part.len() <= 9 && part.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten()
    };
    text.split(separator).map(number).collect::<Option<Vec<i64>>>()?.try_into().ok()
}

/// Days since 1970-01-01 of a date of the Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the leap day is their last.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, want) in [
            ("1970-01-01T00:00:00Z", Some((0, 0))),
            ("2023-11-14T22:13:20Z", Some((1_700_000_000, 0))),
            ("2001-02-03T04:05:06.789Z", Some((981_173_106, 789_000_000))),
            ("2001-02-03T05:35:06.789+01:30", Some((981_173_106, 789_000_000))),
            ("1969-12-31T23:59:58.5Z", Some((-2, 500_000_000))),
            ("2000-02-29T00:00:00-05:00", Some((951_800_400, 0))),
            ("0001-01-01T00:00:00Z", Some((0, 0))),
            ("", Some((0, 0))),
            ("2001-13-03T04:05:06Z", None),
            ("2001-02-03 04:05:06Z", None),
            ("2001-02-03T04:05:06", None),
            ("2001-02-03T04:05:06.x9Z", None),
        ] {
            assert_eq!(time(text).map(|time| (time.seconds, time.nanoseconds)), want, "{text}");
        }
    }

    #[test]
    fn base64_values() {
        for (text, want) in [
            ("", Some(&b""[..])),
            ("d29yZA==", Some(b"word")),
            ("AQAAAgAEAAA=", Some(&[1, 0, 0, 2, 0, 4, 0, 0])),
            ("+/+/", Some(&[0xfb, 0xff, 0xbf])),
            ("abc", None),
            ("a===", None),
            ("ab*=", None),
        ] {
            assert_eq!(base64(text).as_deref(), want, "{text}");
        }
    }
}
