//! Opens paths inside a root directory that others wrote, so that no link, no `..` and no absolute target leads out.
//!
//! The kernel does the walk (`openat2` with RESOLVE_IN_ROOT, Linux 5.6). Used for unpacking and for an image's own files.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// The kernel answers EAGAIN when anything was renamed or mounted on the node while it walked over a `..` (openat2(2)).
const ATTEMPTS: usize = 128;

/// Opens `path` for reading; symbolic links and `..` are resolved as if `root` were `/`. An empty path is the root itself.
/// A FIFO does not block the caller.
pub(crate) fn open_inside(root: &File, path: &[u8], flags: OFlag) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = OsStr::from_bytes(if path.is_empty() { b"." } else { path });
    let mut left = ATTEMPTS;
    loop {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN) if left > 0 => left -= 1,
            other => return Ok(File::from(other?)),
        }
    }
}

/// Opens a directory; see [`open_inside`].
pub(crate) fn open_dir_inside(root: &File, path: &[u8]) -> io::Result<File> {
    open_inside(root, path, OFlag::O_DIRECTORY)
}

/// A path to `name` (one component) in an open directory; to the directory itself if the name is empty.
pub(crate) fn fd_path(dir: &File, name: &[u8]) -> PathBuf {
    let base = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    if name.is_empty() { base.join(".") } else { base.join(OsStr::from_bytes(name)) }
}

/// A path's parent and last component.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/').and_then(|at| path.split_at_checked(at)) {
        Some((parent, name)) => (parent, name.get(1..).unwrap_or(&[])),
        None => (&[], path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_inside() {
        let outer = tempfile::tempdir().expect("dir");
        let root = outer.path().join("root");
        std::fs::create_dir_all(root.join("deep/er")).expect("create");
        std::fs::write(outer.path().join("secret"), "outside").expect("write");
        std::fs::write(root.join("secret"), "inside").expect("write");
        symlink("/secret", root.join("absolute")).expect("link");
        symlink("../../../../secret", root.join("deep/er/relative")).expect("link");
        symlink("/proc/self/root/etc", root.join("magic")).expect("link");
        let root = File::open(root).expect("open");
        for path in ["absolute", "deep/er/relative", "../../secret", "/secret", "deep/../../secret"] {
            let mut text = String::new();
            let mut file = open_inside(&root, path.as_bytes(), OFlag::empty()).expect(path);
            file.read_to_string(&mut text).expect("read");
            assert_eq!(text, "inside", "{path}");
        }
        assert!(open_inside(&root, b"magic/passwd", OFlag::empty()).is_err());
    }

    #[test]
    fn paths_split_at_the_last_slash() {
        for (path, parent, name) in [("a/b/c", "a/b", "c"), ("a", "", "a"), ("", "", ""), ("a/", "a", "")] {
            assert_eq!(split(path.as_bytes()), (parent.as_bytes(), name.as_bytes()), "{path}");
        }
    }
}
