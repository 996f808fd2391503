//! Directories that a layer's entries are in, and that the layer itself may not describe.
//!
//! A layer is unpacked alone, so a directory of a lower layer has to be made anew, and in overlayfs the new one's attributes are what
//! counts. As containerd's overlay snapshotter does (`mkparent` in its `archive/tar.go`), it gets those that the topmost lower
//! layer with something of that name gives it, symbolic links followed inside that layer. A link there is not followed in this
//! layer: `lib/x` above a lower `lib -> usr/lib` makes a directory that takes the link's place.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sluice_image::entry::Timestamp;

use crate::inside::{fd_path, open_dir_inside};
use crate::unpack::{IMPLIED_MODE, OPAQUE_XATTR, is_absent, is_whiteout, make_way};

/// As many as containerd follows.
const MAX_LINKS: usize = 255;

/// The layer's own directory, and those of the layers below it.
#[derive(Debug)]
pub(crate) struct Parents {
    pub(crate) root: File,
    /// Topmost first.
    below: Vec<File>,
}

/// A directory that was made without an entry, and the time it is to have.
pub(crate) type Implied = (Vec<u8>, Timestamp);

impl Parents {
    pub(crate) fn new(root: File, below: &[impl AsRef<Path>]) -> io::Result<Self> {
        Ok(Self { root, below: below.iter().map(File::open).collect::<io::Result<_>>()? })
    }

    /// Opens a directory of the layer, making what is missing of it; says what was made with the attributes of a lower one.
    pub(crate) fn open(&self, path: &[u8], made: &mut Vec<Implied>) -> io::Result<File> {
        match open_dir_inside(&self.root, path) {
            // A link to what is not there (yet), or perhaps a whiteout of this layer.
            Err(error) if is_absent(&error) && !path.is_empty() => {}
            other => return other,
        }
        let mut dir = self.root.try_clone()?;
        let mut so_far = Vec::new();
        for name in resolve(&self.root, path)? {
            if !so_far.is_empty() {
                so_far.push(b'/');
            }
            so_far.extend_from_slice(&name);
            dir = match fs::symlink_metadata(fd_path(&dir, &name)) {
                Ok(meta) if meta.is_dir() => open_dir_inside(&self.root, &so_far)?,
                Ok(meta) if !is_whiteout(&meta) => return Err(Errno::ENOTDIR.into()),
                // What this layer itself hides is nobody's example.
                Ok(_) => make_dir(&dir, &name)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let new = make_dir(&dir, &name)?;
                    made.extend(self.follow(&new, &so_far)?.map(|time| (so_far.clone(), time)));
                    new
                }
                Err(error) => return Err(error),
            };
        }
        Ok(dir)
    }

    /// Gives a new directory the attributes of the lower one in whose place it is; that one's time.
    fn follow(&self, dir: &File, path: &[u8]) -> io::Result<Option<Timestamp>> {
        for lower in &self.below {
            let found = resolve(lower, path)?.join(&b'/');
            let found = fd_path(lower, &found);
            let meta = match fs::symlink_metadata(&found) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) if is_absent(&error) => return Ok(None),
                meta => meta?,
            };
            if !meta.is_dir() {
                return Ok(None);
            }
            fchown(dir, Some(meta.uid()), Some(meta.gid()))?;
            dir.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))?;
            for name in xattr::list(&found)? {
                if !name.as_bytes().starts_with(b"trusted.")
                    && let Some(value) = xattr::get(&found, &name)?
                {
                    xattr::FileExt::set_xattr(dir, &name, &value)?;
                }
            }
            let nanoseconds = u32::try_from(meta.mtime_nsec()).unwrap_or(0);
            return Ok(Some(Timestamp { seconds: meta.mtime(), nanoseconds }));
        }
        Ok(None)
    }
}

/// The components of `path` inside `root` once symbolic links are followed; what is missing stays as it is named. Nobody else changes
/// these directories.
fn resolve(root: &File, path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let components = |path: &[u8]| {
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        parts.map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let (mut done, mut links) = (Vec::new(), 0);
    let mut left = VecDeque::from(components(path));
    while let Some(name) = left.pop_front() {
        if name == b".." {
            done.pop();
            continue;
        }
        done.push(name);
        let place = fd_path(root, &done.join(&b'/'));
        match fs::symlink_metadata(&place) {
            Ok(meta) if meta.file_type().is_symlink() => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::ELOOP.into());
                }
                let target = fs::read_link(&place)?;
                let target = target.as_os_str().as_bytes();
                done.pop();
                if target.starts_with(b"/") {
                    done.clear();
                }
                for part in components(target).into_iter().rev() {
                    left.push_front(part);
                }
            }
            Err(error) if !is_absent(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(done)
}

/// Makes and opens a directory; one that is there already merges, anything else is replaced.
pub(crate) fn make_dir(parent: &File, name: &[u8]) -> io::Result<File> {
    let path = fd_path(parent, name);
    let (there, hides) = match fs::symlink_metadata(&path) {
        Ok(meta) => (meta.is_dir(), is_whiteout(&meta)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (false, false),
        Err(error) => return Err(error),
    };
    if !there {
        make_way(&path)?;
        fs::create_dir(&path)?;
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let dir = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path)?;
    if !there {
        dir.set_permissions(fs::Permissions::from_mode(IMPLIED_MODE))?;
    }
    if hides {
        xattr::FileExt::set_xattr(&dir, OPAQUE_XATTR, b"y")?;
    }
    Ok(dir)
}
