//! Sparse files: old GNU headers, and the GNU keys of PAX headers in formats 0.0, 0.1 and 1.0.

use super::header::{Dialect, Header, parse_segment};
use super::parser::{Content, State, Step, TarParser};
use super::pax::{Sparse, decimal};
use super::{MAX_EXTENSION, MAX_SEGMENTS, TAR_BLOCK, TarEntry, TarError};

/// An entry whose sparse map is not complete.
#[derive(Debug)]
pub(super) struct Pending {
    entry: TarEntry,
    segments: Vec<(u64, u64)>,
    stored: u64,
    real_size: u64,
}

impl TarParser {
    pub(super) fn begin_gnu_sparse(
        &mut self,
        header: &Header<'_>,
        entry: TarEntry,
        stored: u64,
    ) -> Result<Step, TarError> {
        if header.dialect() != Dialect::Gnu {
            return Err(self.bad("sparse"));
        }
        let (segments, more) = header.gnu_segments()?;
        let pending = Box::new(Pending { entry, segments, stored, real_size: header.gnu_real_size()? });
        if more {
            self.state = State::GnuSparse { pending };
            return Ok(Step::Skeleton);
        }
        self.begin_sparse(*pending)
    }

    pub(super) fn begin_pax_sparse(
        &mut self,
        sparse: Sparse,
        entry: TarEntry,
        stored: u64,
    ) -> Result<Step, TarError> {
        let real_size = sparse.real_size.ok_or_else(|| self.bad("sparse"))?;
        let pending = Pending { entry, segments: sparse.segments, stored, real_size };
        if sparse.map_in_data {
            self.state = State::MapInData { pending: Box::new(pending), text: Vec::new() };
            return Ok(Step::Skeleton);
        }
        self.begin_sparse(pending)
    }

    /// Checks a complete sparse map and begins the file's content.
    pub(super) fn begin_sparse(&mut self, pending: Pending) -> Result<Step, TarError> {
        let mut end = 0_u64;
        let mut sum = 0_u64;
        for (start, len) in &pending.segments {
            let segment_end = start.checked_add(*len).ok_or_else(|| self.bad("sparse"))?;
            if *start < end || segment_end > pending.real_size {
                return Err(self.bad("sparse"));
            }
            end = segment_end;
            sum += len;
        }
        if sum != pending.stored {
            return Err(self.bad("sparse"));
        }
        let content =
            Content { size: pending.real_size, stored: pending.stored, segments: Some(pending.segments) };
        self.begin_file(pending.entry, content)
    }

    pub(super) fn gnu_sparse_bytes(
        &mut self,
        input: &[u8],
        mut pending: Box<Pending>,
    ) -> Result<(usize, Step), TarError> {
        let taken = self.gather(input);
        if self.block.len() < TAR_BLOCK {
            self.state = State::GnuSparse { pending };
            return Ok((taken, Step::Skeleton));
        }
        let block = std::mem::take(&mut self.block);
        for segment in block.chunks_exact(24).take(21).take_while(|segment| segment.first() != Some(&0)) {
            pending.segments.push(parse_segment(segment).ok_or_else(|| self.bad("sparse"))?);
        }
        if pending.segments.len() > MAX_SEGMENTS {
            return Err(self.too_large("sparse map", MAX_SEGMENTS as u64));
        }
        if block.get(504).is_some_and(|more| *more != 0) {
            self.state = State::GnuSparse { pending };
            return Ok((taken, Step::Skeleton));
        }
        Ok((taken, self.begin_sparse(*pending)?))
    }

    pub(super) fn map_bytes(
        &mut self,
        input: &[u8],
        mut pending: Box<Pending>,
        mut text: Vec<u8>,
    ) -> Result<(usize, Step), TarError> {
        let taken = self.gather(input);
        if self.block.len() < TAR_BLOCK {
            self.state = State::MapInData { pending, text };
            return Ok((taken, Step::Skeleton));
        }
        text.append(&mut self.block);
        pending.stored = pending.stored.checked_sub(TAR_BLOCK as u64).ok_or_else(|| self.bad("sparse"))?;
        if text.len() as u64 > MAX_EXTENSION {
            return Err(self.too_large("sparse map", MAX_EXTENSION));
        }
        match parse_map(&text) {
            Err(()) => Err(self.bad("sparse")),
            Ok(None) => {
                self.state = State::MapInData { pending, text };
                Ok((taken, Step::Skeleton))
            }
            Ok(Some(segments)) => {
                pending.segments = segments;
                Ok((taken, self.begin_sparse(*pending)?))
            }
        }
    }
}

/// A PAX 1.0 map: a count, then that many pairs, one decimal number a line. `None`: not complete yet.
fn parse_map(text: &[u8]) -> Result<Option<Vec<(u64, u64)>>, ()> {
    let mut lines = text.split_inclusive(|byte| *byte == b'\n');
    let mut number = || -> Result<Option<u64>, ()> {
        match lines.next().map(|line| line.strip_suffix(b"\n")) {
            Some(Some(line)) => decimal(line).ok_or(()).map(Some),
            Some(None) | None => Ok(None),
        }
    };
    let Some(count) = number()? else { return Ok(None) };
    if count > MAX_SEGMENTS as u64 {
        return Err(());
    }
    let mut segments = Vec::new();
    for _ in 0..count {
        let (Some(start), Some(len)) = (number()?, number()?) else { return Ok(None) };
        segments.push((start, len));
    }
    Ok(Some(segments))
}

#[cfg(test)]
mod tests {
    use super::parse_map;

    #[test]
    fn maps_in_data() {
        assert_eq!(parse_map(b"2\n0\n5\n10\n1\n\0\0"), Ok(Some(vec![(0, 5), (10, 1)])));
        assert_eq!(parse_map(b"2\n0\n5\n1"), Ok(None));
        assert_eq!(parse_map(b"x\n"), Err(()));
        assert_eq!(parse_map(b"0\n\0"), Ok(Some(Vec::new())));
    }
}
