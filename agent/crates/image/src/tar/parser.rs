//! The parser: a state machine over the stream's blocks, fed with slices of any length.

use super::header::{Dialect, Header, parse_segment};
use super::pax::{Extensions, decimal};
use super::{MAX_EXTENSION, MAX_PATH, MAX_SEGMENTS, TAR_BLOCK, TarEntry, TarError, TarKind, normalise};
use crate::entry::Timestamp;

/// A regular file's content as the tar holds it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Content {
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Bytes in the tar.
    pub stored: u64,
    /// Sparse files: `(offset in the file, bytes)` in tar order, ascending, not overlapping; their sum is `stored`.
    pub segments: Option<Vec<(u64, u64)>>,
}

impl Content {
    /// Segments of any file, `(offset in the file, bytes)`: a dense one has one.
    pub fn segments(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let dense = self.segments.is_none().then_some((0, self.stored));
        dense.into_iter().chain(self.segments.iter().flatten().copied()).filter(|(_, len)| *len > 0)
    }
}

/// What [`TarParser::step`] found in the bytes it consumed.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Headers, padding or the end of the input: nothing to do.
    Skeleton,
    /// An entry; its content, if any, follows.
    Entry(Box<TarEntry>),
    /// All consumed bytes are content of the last entry, from `offset` of the file on.
    Content {
        /// Offset in the file, holes included.
        offset: u64,
    },
}

/// See the module text. With `elided` content is taken to be absent from the stream (a skeleton).
#[derive(Debug)]
pub struct TarParser {
    state: State,
    elided: bool,
    offset: u64,
    block: Vec<u8>,
    header_offset: u64,
    extensions: Extensions,
    /// Bytes of extension blocks since the last entry.
    extension_bytes: u64,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    seen_zero_block: bool,
}

#[derive(Debug)]
enum State {
    /// A header block.
    Header,
    /// The body of an extension of this type, `left` bytes to come.
    Extension { type_flag: u8, data: Vec<u8>, left: u64, padding: u64 },
    /// Extension blocks of an old GNU sparse map.
    GnuSparse { pending: Box<Pending> },
    /// A PAX 1.0 sparse map in front of the data.
    MapInData { pending: Box<Pending>, text: Vec<u8> },
    /// Content of a file; `at` counts stored bytes.
    Content { content: Content, segment: usize, in_segment: u64, padding: u64 },
    /// Bytes without meaning.
    Skip { left: u64 },
    /// After the end mark.
    End,
}

/// An entry whose sparse map is not complete.
#[derive(Debug)]
struct Pending {
    entry: TarEntry,
    segments: Vec<(u64, u64)>,
    stored: u64,
    real_size: u64,
}

impl TarParser {
    /// A parser of a whole stream, or of a skeleton (`elided`).
    pub fn new(elided: bool) -> Self {
        Self {
            state: State::Header,
            elided,
            offset: 0,
            block: Vec::with_capacity(TAR_BLOCK),
            header_offset: 0,
            extensions: Extensions::default(),
            extension_bytes: 0,
            long_name: None,
            long_link: None,
            seen_zero_block: false,
        }
    }

    /// Consumes bytes from the front of `input`: returns how many, and what they were. Consumes at least one byte unless
    /// it returns an entry or `input` is empty.
    pub fn step(&mut self, input: &[u8]) -> Result<(usize, Step), TarError> {
        let (consumed, step) = match std::mem::replace(&mut self.state, State::End) {
            State::Header => self.header_bytes(input)?,
            State::Extension { type_flag, data, left, padding } => {
                self.extension_bytes(input, type_flag, data, left, padding)?
            }
            State::GnuSparse { pending } => self.gnu_sparse_bytes(input, pending)?,
            State::MapInData { pending, text } => self.map_bytes(input, pending, text)?,
            State::Content { content, segment, in_segment, padding } => {
                self.content_bytes(input, content, segment, in_segment, padding)
            }
            State::Skip { left } => {
                let taken = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                self.skip(left - taken as u64);
                (taken, Step::Skeleton)
            }
            State::End => (input.len(), Step::Skeleton),
        };
        self.offset += consumed as u64;
        Ok((consumed, step))
    }

    /// Says that the stream has ended; an error if it ended inside an entry.
    pub fn finish(&self) -> Result<(), TarError> {
        match self.state {
            State::End => Ok(()),
            State::Header if self.block.is_empty() && self.extensions_empty() => Ok(()),
            _ => Err(TarError::Truncated { offset: self.offset }),
        }
    }

    fn extensions_empty(&self) -> bool {
        self.long_name.is_none() && self.long_link.is_none() && self.extensions.path.is_none()
    }

    fn header_bytes(&mut self, input: &[u8]) -> Result<(usize, Step), TarError> {
        if self.block.is_empty() {
            self.header_offset = self.offset;
        }
        let taken = self.gather(input);
        self.state = State::Header;
        let Ok(block) = <&[u8; TAR_BLOCK]>::try_from(self.block.as_slice()) else {
            return Ok((taken, Step::Skeleton));
        };
        let block = *block;
        self.block.clear();
        if block == [0; TAR_BLOCK] {
            self.state = if self.seen_zero_block { State::End } else { State::Header };
            self.seen_zero_block = true;
            return Ok((taken, Step::Skeleton));
        }
        if self.seen_zero_block {
            return Err(self.bad("end mark"));
        }
        let header = Header::parse(&block, self.header_offset)?;
        let step = self.take_header(&header)?;
        Ok((taken, step))
    }

    fn take_header(&mut self, header: &Header<'_>) -> Result<Step, TarError> {
        let type_flag = header.type_flag();
        if matches!(type_flag, b'L' | b'K' | b'x' | b'g') {
            let left = header.size()?;
            self.extension_bytes = self.extension_bytes.saturating_add(left);
            if self.extension_bytes > MAX_EXTENSION {
                return Err(self.too_large("extended header", MAX_EXTENSION));
            }
            self.state = State::Extension { type_flag, data: Vec::new(), left, padding: padding(left) };
            return Ok(Step::Skeleton);
        }
        let extensions = std::mem::take(&mut self.extensions);
        self.extension_bytes = 0;
        let raw_name =
            self.long_name.take().or_else(|| extensions.path.clone()).unwrap_or_else(|| header.name());
        let raw_name = extensions.sparse.name.clone().unwrap_or(raw_name);
        let raw_link = self
            .long_link
            .take()
            .or_else(|| extensions.link_path.clone())
            .unwrap_or_else(|| header.link_name());
        let mtime = match extensions.mtime {
            Some(mtime) => mtime,
            None => Timestamp { seconds: header.mtime()?, nanoseconds: 0 },
        };
        let size = match extensions.size {
            Some(size) => size,
            None => header.size()?,
        };
        let kind = self.kind(header, &raw_name, raw_link, size)?;
        let entry = TarEntry {
            path: self.path(&raw_name)?,
            kind,
            mode: header.mode()?,
            uid: extensions.uid.map_or_else(|| header.uid(), Ok)?,
            gid: extensions.gid.map_or_else(|| header.gid(), Ok)?,
            mtime,
            xattrs: extensions.xattrs.into_iter().collect(),
        };
        match &entry.kind {
            TarKind::File(_) if type_flag == b'S' => self.begin_gnu_sparse(header, entry, size),
            TarKind::File(_) if extensions.sparse.is_sparse() => {
                self.begin_pax_sparse(extensions.sparse, entry, size)
            }
            TarKind::File(_) => self.begin_file(entry, Content { size, stored: size, segments: None }),
            TarKind::Unknown(_) => {
                self.skip(padded(size).ok_or_else(|| self.bad("size"))?);
                Ok(Step::Entry(Box::new(entry)))
            }
            // As Go's archive/tar: these have no data, whatever their size field says.
            _ => {
                self.state = State::Header;
                Ok(Step::Entry(Box::new(entry)))
            }
        }
    }

    fn kind(&self, header: &Header<'_>, name: &[u8], link: Vec<u8>, size: u64) -> Result<TarKind, TarError> {
        if link.len() >= MAX_PATH {
            return Err(self.too_large("link text", MAX_PATH as u64));
        }
        Ok(match header.type_flag() {
            // As Go's archive/tar: only the type of the oldest archives; `0` is a file, whatever its name ends with.
            0 if name.ends_with(b"/") => TarKind::Directory,
            0 | b'0' | b'7' | b'S' => TarKind::File(Content { size, stored: size, segments: None }),
            b'1' => TarKind::HardLink(self.path(&link)?),
            b'2' => TarKind::Symlink(link),
            b'3' => header.device().map(|(major, minor)| TarKind::CharDevice(major, minor))?,
            b'4' => header.device().map(|(major, minor)| TarKind::BlockDevice(major, minor))?,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            other => TarKind::Unknown(other),
        })
    }

    fn path(&self, raw: &[u8]) -> Result<Vec<u8>, TarError> {
        if raw.len() > MAX_PATH {
            return Err(self.too_large("path", MAX_PATH as u64));
        }
        if raw.contains(&0) {
            return Err(self.bad("path"));
        }
        normalise(raw).ok_or_else(|| TarError::Escape {
            offset: self.header_offset,
            path: String::from_utf8_lossy(raw).into_owned(),
        })
    }

    fn begin_file(&mut self, mut entry: TarEntry, content: Content) -> Result<Step, TarError> {
        let after = padding(content.stored);
        content.stored.checked_add(after).ok_or_else(|| self.bad("size"))?;
        entry.kind = TarKind::File(content.clone());
        if self.elided || content.stored == 0 {
            self.skip(after);
        } else {
            self.state = State::Content { content, segment: 0, in_segment: 0, padding: after };
        }
        Ok(Step::Entry(Box::new(entry)))
    }

    fn begin_gnu_sparse(
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

    fn begin_pax_sparse(
        &mut self,
        sparse: super::pax::Sparse,
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
    fn begin_sparse(&mut self, pending: Pending) -> Result<Step, TarError> {
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

    fn extension_bytes(
        &mut self,
        input: &[u8],
        type_flag: u8,
        mut data: Vec<u8>,
        left: u64,
        padding: u64,
    ) -> Result<(usize, Step), TarError> {
        let taken = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        data.extend_from_slice(input.get(..taken).unwrap_or(input));
        let left = left - taken as u64;
        if left > 0 {
            self.state = State::Extension { type_flag, data, left, padding };
            return Ok((taken, Step::Skeleton));
        }
        let text = || data.split(|byte| *byte == 0).next().unwrap_or(&data).to_vec();
        match type_flag {
            b'L' => self.long_name = Some(text()),
            b'K' => self.long_link = Some(text()),
            // As Go's archive/tar: a second one replaces the first.
            b'x' => self.extensions = Extensions::read(&data, self.header_offset)?,
            // Global headers: ignored, as containerd does.
            _ => {}
        }
        self.skip(padding);
        Ok((taken, Step::Skeleton))
    }

    fn gnu_sparse_bytes(
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

    fn map_bytes(
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

    fn content_bytes(
        &mut self,
        input: &[u8],
        content: Content,
        mut segment: usize,
        mut in_segment: u64,
        padding: u64,
    ) -> (usize, Step) {
        let dense = [(0, content.stored)];
        let segments = content.segments.as_deref().unwrap_or(&dense);
        while segments.get(segment).is_some_and(|(_, len)| in_segment == *len) {
            segment += 1;
            in_segment = 0;
        }
        let Some((start, len)) = segments.get(segment).copied() else {
            self.skip(padding);
            return (0, Step::Skeleton);
        };
        let taken = input.len().min(usize::try_from(len - in_segment).unwrap_or(usize::MAX));
        let offset = start + in_segment;
        in_segment += taken as u64;
        let last = in_segment == len && segments.iter().skip(segment + 1).all(|(_, len)| *len == 0);
        if last {
            self.skip(padding);
        } else {
            self.state = State::Content { content, segment, in_segment, padding };
        }
        (taken, if taken == 0 { Step::Skeleton } else { Step::Content { offset } })
    }

    /// Adds to the current block up to its end; returns how many bytes of `input` that took.
    fn gather(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(TAR_BLOCK.saturating_sub(self.block.len()));
        self.block.extend_from_slice(input.get(..taken).unwrap_or(input));
        taken
    }

    fn skip(&mut self, left: u64) {
        self.state = if left == 0 { State::Header } else { State::Skip { left } };
    }

    fn bad(&self, field: &'static str) -> TarError {
        TarError::Field { offset: self.header_offset, field }
    }

    fn too_large(&self, what: &'static str, limit: u64) -> TarError {
        TarError::TooLarge { offset: self.header_offset, what, limit }
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % TAR_BLOCK as u64
}

fn padded(size: u64) -> Option<u64> {
    size.checked_add(padding(size))
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
    use super::*;

    /// Entries and contents of a stream fed in pieces of `piece` bytes.
    fn parse(tar: &[u8], piece: usize) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
        let mut parser = TarParser::new(false);
        let mut found: Vec<(TarEntry, Vec<u8>)> = Vec::new();
        for mut input in tar.chunks(piece) {
            while !input.is_empty() {
                let (consumed, step) = parser.step(input)?;
                match step {
                    Step::Entry(entry) => found.push((*entry, Vec::new())),
                    Step::Content { offset } => {
                        let content = &mut found.last_mut().expect("content after an entry").1;
                        content.resize(offset as usize, 0);
                        content.extend_from_slice(&input[..consumed]);
                    }
                    Step::Skeleton => {}
                }
                input = &input[consumed..];
            }
        }
        parser.finish()?;
        Ok(found)
    }

    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, format!("{}/file", "long".repeat(60)), &b"hello"[..])
            .expect("append");
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, "link", "some/target").expect("append");
        builder.into_inner().expect("finish")
    }

    #[test]
    fn the_pieces_do_not_matter() {
        let tar = sample();
        let whole = parse(&tar, tar.len()).expect("parse");
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[0].1, b"hello");
        assert_eq!(whole[1].0.kind, TarKind::Symlink(b"some/target".to_vec()));
        for piece in [1, 7, 511, 512, 513] {
            assert_eq!(parse(&tar, piece).expect("parse"), whole, "{piece}");
        }
    }

    #[test]
    fn damage_and_truncation_are_named() {
        let mut tar = sample();
        assert!(matches!(parse(&tar[..700], 512), Err(TarError::Truncated { .. })));
        tar[10] ^= 1;
        assert_eq!(parse(&tar, 512), Err(TarError::Checksum { offset: 0 }));
    }

    #[test]
    fn maps_in_data() {
        assert_eq!(parse_map(b"2\n0\n5\n10\n1\n\0\0"), Ok(Some(vec![(0, 5), (10, 1)])));
        assert_eq!(parse_map(b"2\n0\n5\n1"), Ok(None));
        assert_eq!(parse_map(b"x\n"), Err(()));
        assert_eq!(parse_map(b"0\n\0"), Ok(Some(Vec::new())));
    }

    fn member(type_flag: u8, name: &str, data: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[156] = type_flag;
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut out = [header.as_bytes(), data].concat();
        out.resize(out.len().next_multiple_of(TAR_BLOCK), 0);
        out
    }

    fn xattr_record(name: &str, len: usize) -> Vec<u8> {
        let body = format!(" SCHILY.xattr.user.{name}={}\n", "v".repeat(len));
        let len =
            (1..9).map(|digits| body.len() + digits).find(|len| len.to_string().len() + body.len() == *len);
        format!("{}{body}", len.expect("a length")).into_bytes()
    }

    #[test]
    fn extended_headers_before_an_entry_do_not_accumulate() {
        let second =
            [member(b'x', "x", &xattr_record("a", 9)), member(b'x', "x", &xattr_record("b", 9))].concat();
        let entries = parse(&[second, member(b'0', "f", b"")].concat(), 512).expect("parse");
        assert_eq!(entries[0].0.xattrs, [(b"user.b".to_vec(), b"v".repeat(9))]);
        let large = member(b'x', "x", &xattr_record("a", 400_000));
        let entry = member(b'0', "f", b"");
        let apart =
            [large.clone(), entry.clone(), large.clone(), entry.clone(), large.clone(), entry].concat();
        assert_eq!(parse(&apart, 4096).expect("parse").len(), 3);
        for block in [b'x', b'g', b'L', b'K'] {
            let tar = [large.clone(), large.clone(), member(block, "x", &[b'a'; 400_000])].concat();
            assert!(
                matches!(parse(&tar, 4096), Err(TarError::TooLarge { limit: MAX_EXTENSION, .. })),
                "{block}"
            );
        }
    }

    #[test]
    fn a_name_that_ends_with_a_slash_is_a_directory_in_old_archives_only() {
        let tar =
            [member(b'0', "file/", b"data"), member(0, "dir/", b""), member(b'5', "dir2", b"")].concat();
        let found = parse(&tar, 512).expect("parse");
        assert!(matches!(&found[0].0.kind, TarKind::File(content) if content.size == 4), "{found:?}");
        assert_eq!((found[0].0.path.as_slice(), found[0].1.as_slice()), (&b"file"[..], &b"data"[..]));
        assert_eq!(found[1].0.kind, TarKind::Directory);
        assert_eq!(found[2].0.kind, TarKind::Directory);
    }
}
