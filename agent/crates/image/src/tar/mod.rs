//! Reads tar streams as image layers use them: ustar, GNU and PAX, sparse files and extended attributes included.
//!
//! The parser is driven by slices and keeps only the header it is in, so the same code reads a whole layer, and the
//! *skeleton* of one, from which the contents of regular files were taken out. Where dialects differ, Go's
//! `archive/tar` decides, since containerd unpacks with it.

mod header;
mod parser;
#[cfg(test)]
mod parser_tests;
mod pax;
mod sparse;

pub use parser::{Content, Step, TarParser};

use crate::entry::Timestamp;

/// A tar block: headers and padding come in multiples of it.
pub const TAR_BLOCK: usize = 512;
/// Longest path or link text accepted, in bytes (PATH_MAX).
pub const MAX_PATH: usize = 4096;
/// Most PAX and GNU extension blocks accepted before an entry, in bytes together; also bounds its extended attributes.
pub const MAX_EXTENSION: u64 = 1 << 20;
/// Most data segments accepted in a sparse file.
pub const MAX_SEGMENTS: usize = 1 << 16;

/// Why a tar stream is refused. Offsets are byte offsets in the uncompressed stream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TarError {
    /// A header's checksum does not match.
    #[error("tar header at offset {offset} is damaged (checksum mismatch)")]
    Checksum {
        /// Where the header begins.
        offset: u64,
    },
    /// A field does not hold what it must.
    #[error("tar header at offset {offset}: field {field} is invalid")]
    Field {
        /// Where the header begins.
        offset: u64,
        /// The field's name.
        field: &'static str,
    },
    /// A path leaves the root.
    #[error("tar entry at offset {offset}: path `{path}` leaves the root directory")]
    Escape {
        /// Where the header begins.
        offset: u64,
        /// The path, lossily.
        path: String,
    },
    /// Something is larger than accepted.
    #[error("tar entry at offset {offset}: {what} is larger than {limit} bytes")]
    TooLarge {
        /// Where the header begins.
        offset: u64,
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The stream ends inside an entry.
    #[error("tar stream ends at offset {offset}, inside an entry")]
    Truncated {
        /// Where it ends.
        offset: u64,
    },
}

/// An entry as the tar has it: no store offset yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Normalised: see [`crate::entry::Entry::path`].
    pub path: Vec<u8>,
    /// What it is.
    pub kind: TarKind,
    /// Permission, set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name, no name twice.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a tar entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File(Content),
    /// A directory.
    Directory,
    /// A symbolic link and its text.
    Symlink(Vec<u8>),
    /// Another name of the entry with this normalised path.
    HardLink(Vec<u8>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A type that images do not use (a socket, a volume label): skipped with a note.
    Unknown(u8),
}

/// `path` split at `/`, without empty and `.` components, `..` resolved by text as Go's `filepath.Clean` does.
/// `None` when it leaves the root.
pub(crate) fn normalise(path: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if out.is_empty() {
                    return None;
                }
                let end = out.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                out.truncate(end);
            }
            part => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::normalise;

    #[test]
    fn paths_are_normalised_and_kept_inside() {
        for (path, want) in [
            ("./", Some("")),
            ("/etc//passwd", Some("etc/passwd")),
            ("./a/./b/", Some("a/b")),
            ("a/../b", Some("b")),
            ("a/b/../../c", Some("c")),
            ("../x", None),
            ("a/../../x", None),
        ] {
            assert_eq!(normalise(path.as_bytes()).as_deref(), want.map(str::as_bytes), "{path}");
        }
    }
}
