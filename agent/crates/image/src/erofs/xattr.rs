//! Extended attributes, inline behind their inode.

use super::format::NAME_MAX;
use super::{ErofsError, limit};

/// EROFS's number of an attribute's prefix, and the rest of its name. `None`: no kernel keeps such a name.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
            .into_iter()
            .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
            .filter(|(_, rest)| !rest.is_empty()),
    }
}

pub(super) fn xattr_bytes(set: &[(Vec<u8>, Vec<u8>)]) -> Result<u64, ErofsError> {
    let mut bytes = 0;
    for (name, value) in set {
        let Some((_, rest)) = xattr_prefix(name) else { continue };
        if rest.len() > NAME_MAX || value.len() > usize::from(u16::MAX) {
            return Err(limit(name, "an extended attribute's name has at most 255 bytes, its value 65,535"));
        }
        bytes += (4 + rest.len() + value.len()).next_multiple_of(4) as u64;
    }
    if bytes > 4 * u64::from(u16::MAX - 1) {
        return Err(ErofsError::TooLarge("a file's extended attributes take more than 256 KiB"));
    }
    Ok(if bytes == 0 { 0 } else { 12 + bytes })
}

pub(super) fn encode_xattrs(set: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<u8>, ErofsError> {
    let len = xattr_bytes(set)? as usize;
    let mut out = Vec::with_capacity(len);
    if len == 0 {
        return Ok(out);
    }
    // The header: no name filter, no shared attributes.
    out.resize(12, 0);
    for (name, value) in set {
        let Some((index, rest)) = xattr_prefix(name) else { continue };
        out.extend_from_slice(&[rest.len() as u8, index]);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    Ok(out)
}
