//! One entry of a layer: what the tar parser yields and the merge takes.

/// A time stamp as tar and EROFS have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 UTC; may be negative.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// A file-system object in a layer, whiteouts included (they are ordinary names here; the merge gives them meaning).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, `/`-separated, no empty, `.` or `..` components; the root itself is empty.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission, set-id and sticky bits (0o7777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes with their full names (`security.capability`), sorted by name, no name twice.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The kinds of file-system objects that layers hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file: `size` bytes from `store_offset` of the layer's file (offset 0 when empty).
    File {
        /// Bytes.
        size: u64,
        /// Multiple of the block size.
        store_offset: u64,
    },
    /// A directory.
    Directory,
    /// A symbolic link and its text.
    Symlink {
        /// As written, not normalised.
        target: Vec<u8>,
    },
    /// Another name of an entry of this layer or a lower one.
    HardLink {
        /// Normalised like [`Entry::path`].
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}
