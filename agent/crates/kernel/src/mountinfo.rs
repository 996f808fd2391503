//! What is mounted: `/proc/self/mountinfo`, parsed (proc(5); the format is stable since Linux 2.6.26).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use thiserror::Error;

/// `/proc/self/mountinfo` cannot be read or understood.
#[derive(Debug, Error)]
pub enum MountInfoError {
    /// It cannot be read.
    #[error("cannot read /proc/self/mountinfo")]
    Read(#[source] io::Error),
    /// A line does not have the documented form.
    #[error("line {line} of mountinfo is malformed")]
    Malformed {
        /// From 1.
        line: usize,
    },
}

/// One mount of this process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Identifier of the mount.
    pub id: u64,
    /// Identifier of the mount it is on.
    pub parent_id: u64,
    /// `st_dev` of its files: major, minor.
    pub device: (u32, u32),
    /// The directory within the file system that is the mount's root.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Per-mount options, comma-separated.
    pub mount_options: Vec<u8>,
    /// `erofs`, `fuse`, `overlay`...
    pub kind: Vec<u8>,
    /// Device or a word of the file system's.
    pub source: Vec<u8>,
    /// Options of the file system, comma-separated.
    pub super_options: Vec<u8>,
}

/// All mounts of this process's mount namespace, in the kernel's order: later ones stand on earlier ones.
pub fn mounts() -> Result<Vec<MountEntry>, MountInfoError> {
    parse(&std::fs::read("/proc/self/mountinfo").map_err(MountInfoError::Read)?)
}

/// Parses the text of a mountinfo file.
pub fn parse(text: &[u8]) -> Result<Vec<MountEntry>, MountInfoError> {
    text.split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(number, line)| parse_line(line).ok_or(MountInfoError::Malformed { line: number + 1 }))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent_id = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = path(fields.next()?);
    let target = path(fields.next()?);
    let mount_options = fields.next()?.to_vec();
    // Optional fields end with a lone hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next().unwrap_or_default());
    Some(MountEntry { id, parent_id, device, root, target, mount_options, kind, source, super_options })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's `\ooo` for blanks, newlines, hashes and backslashes; anything else stays as it is.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if first == b'\\' => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_optional_fields_parses() {
        let text = b"36 35 98:0 /a\\040b /mnt\\011x\\134y rw,noatime master:1 shared:2 - ext3 /dev/root\\040x rw,errors=continue\n";
        let all = parse(text).expect("parses");
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].root, PathBuf::from("/a b"));
        assert_eq!(all[0].target, PathBuf::from("/mnt\tx\\y"));
        assert_eq!(all[0].device, (98, 0));
        assert_eq!(all[0].kind, b"ext3");
        assert_eq!(all[0].source, b"/dev/root x");
        assert_eq!(all[0].super_options, b"rw,errors=continue");
    }

    #[test]
    fn malformed_lines_are_told_by_number() {
        for text in [&b"x"[..], b"1 2 3", b"1 2 3:4 / /mnt rw shared:2 ext3 x y", b"1 2 a:b / / rw - x y z"] {
            assert!(matches!(parse(text), Err(MountInfoError::Malformed { line: 1 })), "{text:?}");
        }
    }

    #[test]
    fn a_lone_backslash_survives() {
        assert_eq!(unescape(b"a\\b\\04\\999\\"), b"a\\b\\04\\999\\");
    }

    #[test]
    fn the_own_mounts_parse() {
        let all = mounts().expect("proc is mounted");
        assert!(all.iter().any(|mount| mount.target.as_os_str() == "/"));
    }
}
