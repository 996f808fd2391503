//! The 512-byte header block: fixed fields of POSIX.1-1988 ustar and their GNU variants.

use super::{TAR_BLOCK, TarError};

/// A header block whose checksum matched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a> {
    block: &'a [u8; TAR_BLOCK],
    offset: u64,
}

/// The dialect a header's magic names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
}

impl<'a> Header<'a> {
    /// Checks the checksum of `block`, which stands at `offset`.
    pub(super) fn parse(block: &'a [u8; TAR_BLOCK], offset: u64) -> Result<Self, TarError> {
        let header = Self { block, offset };
        let stored = header.number(148, 8, "checksum")?;
        // The field itself counts as spaces. Simple sums over all of the block are a few vector instructions.
        let field = header.bytes(148, 8);
        let spaces = 8 * i64::from(b' ');
        let sum = |bytes: &[u8]| i64::from(bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>());
        if stored == sum(block) - sum(field) + spaces {
            return Ok(header);
        }
        // Some old programs took bytes for signed.
        let sum =
            |bytes: &[u8]| i64::from(bytes.iter().map(|byte| i32::from(byte.cast_signed())).sum::<i32>());
        if stored == sum(block) - sum(field) + spaces {
            Ok(header)
        } else {
            Err(TarError::Checksum { offset })
        }
    }

    pub(super) fn dialect(&self) -> Dialect {
        match self.bytes(257, 8) {
            b"ustar  \0" => Dialect::Gnu,
            magic if magic.starts_with(b"ustar\0") => Dialect::Ustar,
            _ => Dialect::V7,
        }
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.bytes(156, 1).first().copied().unwrap_or(0)
    }

    /// Name, with the ustar prefix where the dialect has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        if self.dialect() == Dialect::Ustar {
            let prefix = self.text(345, 155);
            if !prefix.is_empty() {
                return [prefix, b"/", name].concat();
            }
        }
        name.to_vec()
    }

    pub(super) fn link_name(&self) -> Vec<u8> {
        self.text(157, 100).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u32, TarError> {
        Ok((self.number(100, 8, "mode")? & 0o7777) as u32)
    }

    pub(super) fn uid(&self) -> Result<u32, TarError> {
        self.unsigned(108, 8, "uid")
    }

    pub(super) fn gid(&self) -> Result<u32, TarError> {
        self.unsigned(116, 8, "gid")
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        u64::try_from(self.number(124, 12, "size")?).map_err(|_range| self.bad("size"))
    }

    pub(super) fn mtime(&self) -> Result<i64, TarError> {
        self.number(136, 12, "mtime")
    }

    pub(super) fn device(&self) -> Result<(u32, u32), TarError> {
        Ok((self.unsigned(329, 8, "devmajor")?, self.unsigned(337, 8, "devminor")?))
    }

    /// Old GNU sparse: the segments in this header, and whether extension blocks follow.
    pub(super) fn gnu_segments(&self) -> Result<(Vec<(u64, u64)>, bool), TarError> {
        let mut segments = Vec::new();
        for slot in 0..4 {
            if let Some(segment) = self.segment(386 + slot * 24)? {
                segments.push(segment);
            }
        }
        Ok((segments, self.bytes(482, 1) != [0]))
    }

    /// Old GNU sparse: the file's size with its holes.
    pub(super) fn gnu_real_size(&self) -> Result<u64, TarError> {
        u64::try_from(self.number(483, 12, "realsize")?).map_err(|_range| self.bad("realsize"))
    }

    fn segment(&self, at: usize) -> Result<Option<(u64, u64)>, TarError> {
        parse_segment(self.bytes(at, 24)).ok_or_else(|| self.bad("sparse")).map(|(offset, len)| {
            let empty = self.bytes(at, 1) == [0];
            if empty { None } else { Some((offset, len)) }
        })
    }

    fn unsigned(&self, at: usize, len: usize, field: &'static str) -> Result<u32, TarError> {
        u32::try_from(self.number(at, len, field)?).map_err(|_range| self.bad(field))
    }

    fn number(&self, at: usize, len: usize, field: &'static str) -> Result<i64, TarError> {
        parse_number(self.bytes(at, len)).ok_or_else(|| self.bad(field))
    }

    fn text(&self, at: usize, len: usize) -> &'a [u8] {
        let bytes = self.bytes(at, len);
        bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
    }

    fn bytes(&self, at: usize, len: usize) -> &'a [u8] {
        self.block.get(at..at + len).unwrap_or(&[])
    }

    fn bad(&self, field: &'static str) -> TarError {
        TarError::Field { offset: self.offset, field }
    }
}

/// One `offset, length` pair of an old GNU sparse map (12 bytes each).
pub(super) fn parse_segment(bytes: &[u8]) -> Option<(u64, u64)> {
    let (offset, len) = bytes.split_at_checked(12)?;
    Some((u64::try_from(parse_number(offset)?).ok()?, u64::try_from(parse_number(len)?).ok()?))
}

/// A numeric field: octal text, or base-256 when the first bit is set (two's complement, GNU).
fn parse_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 && !negative { byte & 0x7f } else { *byte };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let text = field.split(|byte| *byte == 0).next().unwrap_or(field).trim_ascii();
    if text.is_empty() {
        return Some(0);
    }
    let mut value: i64 = 0;
    for byte in text {
        let digit = match byte {
            b'0'..=b'7' => byte - b'0',
            _ => return None,
        };
        value = value.checked_mul(8)?.checked_add(i64::from(digit))?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::parse_number;

    #[test]
    fn numbers() {
        assert_eq!(parse_number(b"0000644\0"), Some(0o644));
        assert_eq!(parse_number(b" 644 \0\0\0"), Some(0o644));
        assert_eq!(parse_number(b"\0\0\0\0"), Some(0));
        assert_eq!(parse_number(b"8"), None);
        assert_eq!(parse_number(&[0x80, 0, 0, 1, 0]), Some(256));
        assert_eq!(parse_number(&[0xff; 12]), Some(-1));
        assert_eq!(parse_number(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
