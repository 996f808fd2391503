//! The parser: a state machine over the stream's blocks, fed with slices of any length.

use super::header::Header;
use super::pax::Extensions;
use super::sparse::Pending;
use super::{MAX_EXTENSION, MAX_PATH, TAR_BLOCK, TarEntry, TarError, TarKind, normalise};
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
    pub(super) state: State,
    elided: bool,
    offset: u64,
    pub(super) block: Vec<u8>,
    header_offset: u64,
    extensions: Extensions,
    /// Bytes of extension blocks since the last entry.
    extension_bytes: u64,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    seen_zero_block: bool,
}

#[derive(Debug)]
pub(super) enum State {
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
            // The last padding: Go's archive/tar reads without it, and writers that do not close their archive leave it out.
            State::Skip { left } if left < TAR_BLOCK as u64 && self.extensions_empty() => Ok(()),
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
            if left == 0 {
                self.extension_bytes(&[], type_flag, Vec::new(), 0, 0)?;
            } else {
                self.state = State::Extension { type_flag, data: Vec::new(), left, padding: padding(left) };
            }
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
        if link.contains(&0) {
            return Err(self.bad("link text"));
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

    pub(super) fn begin_file(&mut self, mut entry: TarEntry, content: Content) -> Result<Step, TarError> {
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
    pub(super) fn gather(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(TAR_BLOCK.saturating_sub(self.block.len()));
        self.block.extend_from_slice(input.get(..taken).unwrap_or(input));
        taken
    }

    pub(super) fn skip(&mut self, left: u64) {
        self.state = if left == 0 { State::Header } else { State::Skip { left } };
    }

    pub(super) fn bad(&self, field: &'static str) -> TarError {
        TarError::Field { offset: self.header_offset, field }
    }

    pub(super) fn too_large(&self, what: &'static str, limit: u64) -> TarError {
        TarError::TooLarge { offset: self.header_offset, what, limit }
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % TAR_BLOCK as u64
}

fn padded(size: u64) -> Option<u64> {
    size.checked_add(padding(size))
}
