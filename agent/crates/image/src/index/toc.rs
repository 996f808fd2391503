//! The table of contents of an index, entry by entry.

use super::IndexError;
use super::frame::{Frame, slice};
use super::layout::{Layout, extents};
use super::read::LayerIndex;
use crate::entry::{Entry, EntryKind};
use crate::records::{BLOCK_SIZE, ChunkRecord, ExtentRecord};
use crate::tar::{Content, Step, TarKind, TarParser};
use crate::varint;

/// An entry of the table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocItem {
    /// The entry; `None` for kinds that images do not use.
    pub entry: Option<Entry>,
    /// Where its content stands, if it has content of its own.
    pub extents: Vec<ExtentRecord>,
    /// The chunks of its own content.
    pub chunks: Vec<ChunkRecord>,
    /// `(store offset, bytes)` in tar order, own content or not.
    pub(super) segments: Vec<(u64, u64)>,
}

/// Iterator over the table of contents; memory does not grow with it but for 16 bytes a file.
pub struct TocReader<'a> {
    index: &'a LayerIndex,
    skeleton: Frame<'a>,
    parser: TarParser,
    files: Frame<'a>,
    digests: &'a [u8],
    layout: Layout,
    tar_offset: u64,
    entries: u64,
    ended: bool,
}

impl std::fmt::Debug for TocReader<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TocReader").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl<'a> TocReader<'a> {
    pub(super) fn new(index: &'a LayerIndex) -> Result<Self, IndexError> {
        let header = index.header();
        Ok(Self {
            index,
            skeleton: Frame::new(index.blob(), &header.skeleton)?,
            parser: TarParser::new(true),
            files: Frame::new(index.blob(), &header.files)?,
            digests: slice(index.blob(), &header.digests)?,
            layout: Layout::default(),
            tar_offset: 0,
            entries: 0,
            ended: false,
        })
    }

    /// The next entry; skeleton bytes on the way go to `skeleton_bytes`.
    pub(super) fn next_step(
        &mut self,
        mut skeleton_bytes: impl FnMut(&[u8]),
    ) -> Result<Option<TocItem>, IndexError> {
        loop {
            let input = self.skeleton.bytes()?;
            if input.is_empty() {
                return self.end();
            }
            let (consumed, step) = self.parser.step(input)?;
            skeleton_bytes(input.get(..consumed).unwrap_or(input));
            self.skeleton.consume(consumed);
            self.tar_offset += consumed as u64;
            match step {
                Step::Skeleton => {}
                Step::Entry(entry) => return self.item(*entry).map(Some),
                Step::Content { .. } => return Err(IndexError::Corrupt("its skeleton holds content")),
            }
        }
    }

    fn end(&mut self) -> Result<Option<TocItem>, IndexError> {
        self.parser.finish()?;
        let header = self.index.header();
        if !self.files.bytes()?.is_empty()
            || self.tar_offset != header.tar_size.get()
            || self.layout.next() != header.store_size.get()
            || !self.digests.is_empty()
            || self.entries != header.entry_count.get()
        {
            return Err(IndexError::Corrupt("its sections do not fit each other"));
        }
        Ok(None)
    }

    fn item(&mut self, tar: crate::tar::TarEntry) -> Result<TocItem, IndexError> {
        self.entries += 1;
        let mut item = TocItem { entry: None, extents: Vec::new(), chunks: Vec::new(), segments: Vec::new() };
        let kind = match tar.kind {
            TarKind::File(content) => self.file(&content, &mut item)?,
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink(target) => EntryKind::Symlink { target },
            TarKind::HardLink(target) => EntryKind::HardLink { target },
            TarKind::CharDevice(major, minor) => EntryKind::CharDevice { major, minor },
            TarKind::BlockDevice(major, minor) => EntryKind::BlockDevice { major, minor },
            TarKind::Fifo => EntryKind::Fifo,
            TarKind::Unknown(_) => return Ok(item),
        };
        item.entry = Some(Entry {
            path: tar.path,
            kind,
            mode: tar.mode,
            uid: tar.uid,
            gid: tar.gid,
            mtime: tar.mtime,
            xattrs: tar.xattrs,
        });
        Ok(item)
    }

    fn file(&mut self, content: &Content, item: &mut TocItem) -> Result<EntryKind, IndexError> {
        let size = content.size;
        if size == 0 {
            return Ok(EntryKind::File { size: 0, store_offset: 0 });
        }
        let store_offset = match self.number()? {
            0 => {
                let store_offset = self.layout.place(size)?;
                if self.layout.next() > self.index.header().store_size.get() {
                    return Err(IndexError::Corrupt("its files are larger than the layer's file"));
                }
                item.extents = extents(content, self.tar_offset, store_offset);
                item.chunks = self.chunks(size, store_offset)?;
                store_offset
            }
            number => match self.layout.own(number - 1) {
                Some((store_offset, own_size)) if own_size == size => store_offset,
                _ => return Err(IndexError::Corrupt("a file shares content that is not there")),
            },
        };
        item.segments = content.segments().map(|(offset, len)| (store_offset + offset, len)).collect();
        self.tar_offset = self
            .tar_offset
            .checked_add(content.stored)
            .filter(|offset| *offset <= self.index.header().tar_size.get())
            .ok_or(IndexError::Corrupt("its files are larger than the layer"))?;
        Ok(EntryKind::File { size, store_offset })
    }

    /// Chunks of a file with content of its own: cut at `chunk_size`, or listed.
    fn chunks(&mut self, size: u64, store_offset: u64) -> Result<Vec<ChunkRecord>, IndexError> {
        let mut out = Vec::new();
        let limit = u64::from(self.index.header().chunk_size.get());
        let listed = self.index.lists_chunks();
        let count = if listed { self.number()? } else { size.div_ceil(limit) };
        let mut at = 0;
        for _ in 0..count {
            let left = size - at;
            let len = if listed { self.number()? } else { left.min(limit) };
            // A chunk that ends inside a block is the file's last, so that no block has two.
            let fits =
                len > 0 && len <= limit && (len == left || len < left && len.is_multiple_of(BLOCK_SIZE));
            let (Some(digest), true) = (take_digest(&mut self.digests), fits) else {
                return Err(IndexError::Corrupt("its chunks do not fit its files"));
            };
            out.push(ChunkRecord {
                store_offset: (store_offset + at).into(),
                len: (len as u32).into(),
                reserved: 0.into(),
                digest,
            });
            at += len;
        }
        if at == size { Ok(out) } else { Err(IndexError::Corrupt("its chunks do not fit its files")) }
    }

    /// The next number of the files section.
    fn number(&mut self) -> Result<u64, IndexError> {
        let mut failed = None;
        let files = &mut self.files;
        let number = varint::read(|| match files.bytes().map(|bytes| bytes.first().copied()) {
            Ok(byte) => {
                files.consume(1);
                byte
            }
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        match (number, failed) {
            (Some(number), None) => Ok(number),
            (_, Some(error)) => Err(error),
            (None, None) => {
                Err(IndexError::Corrupt("its list of files is cut short, or has too long a number"))
            }
        }
    }
}

impl Iterator for TocReader<'_> {
    type Item = Result<TocItem, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.next_step(|_| {}).transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

fn take_digest(digests: &mut &[u8]) -> Option<[u8; 32]> {
    let (digest, rest) = digests.split_first_chunk()?;
    *digests = rest;
    Some(*digest)
}
