//! A fault of some kernels: calls on symbolic links of an overlay fail with ENXIO, because copying them up opens them.
//!
//! Linux bug 217850, "overlayfs: cannot rename symlink if lower filesystem is FUSE/NFS". Brought by 72db82115d2b (5.15), mended by
//! ab048302026d (6.6-rc2) and its backports to 5.15.133, 6.1.55 and 6.5.5. It takes a lower file whose inode has `S_NOATIME`: FUSE and
//! NFS set it on all of theirs, EROFS on none.

/// Versions that have it: from the first until before the second.
const AFFECTED: [([u32; 3], [u32; 3]); 3] =
    [([5, 15, 0], [5, 15, 133]), ([5, 16, 0], [6, 1, 55]), ([6, 2, 0], [6, 5, 5])];

/// The same in words.
pub(crate) const AFFECTED_TEXT: &str =
    "5.15.0 to 5.15.132, 5.16 to 6.0, 6.1.0 to 6.1.54, 6.2 to 6.4, 6.5.0 to 6.5.4";
/// Where it is mended.
pub(crate) const FIXED_TEXT: &str = "5.15.133, 6.1.55, 6.5.5 and 6.6";

/// Whether a release of Linux is among the affected ones, going by its number alone: distributions mend without changing it.
/// `None`: it is no version.
pub(crate) fn is_affected(release: &str) -> Option<bool> {
    let mut numbers = release.split(['.', '-', '+', '~']).map_while(|part| part.parse::<u32>().ok());
    let version = [numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0)];
    Some(AFFECTED.iter().any(|(first, fixed)| version >= *first && version < *fixed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        let affected =
            ["5.15.0-91-generic", "5.15.132", "5.19.17", "6.0.0", "6.1.54", "6.2.16", "6.4.3", "6.5.4"];
        let fixed =
            ["5.10.223", "5.14.21", "5.15.133", "6.1.55-1", "6.5.5", "6.6.0-rc2", "6.18.44-x", "7.2.1"];
        for release in affected {
            assert_eq!(is_affected(release), Some(true), "{release}");
        }
        for release in fixed {
            assert_eq!(is_affected(release), Some(false), "{release}");
        }
        assert_eq!(is_affected("unknown"), None);
    }
}
