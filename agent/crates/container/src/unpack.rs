//! The ordinary pull's unpacking: a layer to a directory in overlayfs form.
//!
//! Paths are resolved inside the directory by the kernel (`openat2`, RESOLVE_IN_ROOT, Linux 5.6), so no link leads out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use sluice_image::decode::{Compression, DecodeError, Decoder};
use sluice_image::entry::Timestamp;
use sluice_image::tar::{Step, TarEntry, TarError, TarKind, TarParser};

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The layer cannot be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    /// Its compression is damaged.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Its tar is damaged.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be made.
    #[error("cannot make `{path}`")]
    Entry {
        /// Inside the layer.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The bytes are not the layer.
    #[error("{what} mismatch: expected {expected}, the bytes have {actual}")]
    Digest {
        /// `layer digest` or `diffID`.
        what: &'static str,
        /// From manifest or configuration.
        expected: String,
        /// Of what came.
        actual: String,
    },
}

/// Unpacks the layer that `reader` gives into the empty directory `dir`, and verifies both digests. On an error what was made so
/// far is left for the caller to remove.
pub fn unpack_layer(mut reader: impl Read, dir: &Path, digest: &str, diff_id: &str) -> Result<(), UnpackError> {
    let mut unpacker = Unpacker::new(dir)?;
    let mut compressed = ring::digest::Context::new(&ring::digest::SHA256);
    let mut tar = ring::digest::Context::new(&ring::digest::SHA256);
    let mut parser = TarParser::new(false);
    let mut decoder: Option<Decoder> = None;
    let mut buffer = vec![0; 256 * 1024];
    let mut filled = 0;
    loop {
        let room = buffer.get_mut(filled..).unwrap_or(&mut []);
        let len = reader.read(room).map_err(UnpackError::Read)?;
        filled += len;
        if len > 0 && filled < 4 {
            continue; // Too little to tell the compression by.
        }
        let mut input = buffer.get(..filled).unwrap_or(&[]);
        compressed.update(input);
        if filled > 0 {
            let decoder = match &mut decoder {
                Some(decoder) => decoder,
                None => decoder.insert(Decoder::new(Compression::sniff(input))?),
            };
            loop {
                let step = decoder.step(input)?;
                input = input.get(step.consumed..).unwrap_or(&[]);
                let output = decoder.output();
                if step.consumed == 0 && output.is_empty() && !step.boundary {
                    break;
                }
                tar.update(output);
                unpacker.take(&mut parser, output)?;
            }
        }
        filled = 0;
        if len == 0 {
            break;
        }
    }
    if let Some(decoder) = &decoder {
        decoder.finish()?;
    }
    parser.finish()?;
    compare("layer digest", digest, compressed)?;
    compare("diffID", diff_id, tar)?;
    unpacker.finish()
}

fn compare(what: &'static str, expected: &str, context: ring::digest::Context) -> Result<(), UnpackError> {
    let sum = context.finish();
    let actual = format!("sha256:{}", sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    if actual == expected {
        return Ok(());
    }
    Err(UnpackError::Digest { what, expected: expected.to_owned(), actual })
}

struct Unpacker {
    root: File,
    open: Option<File>,
    /// Directories get their times last, when nothing is made in them any more.
    directories: Vec<(Vec<u8>, Timestamp)>,
}

impl Unpacker {
    fn new(dir: &Path) -> Result<Self, UnpackError> {
        let root = File::open(dir).map_err(UnpackError::Read)?;
        Ok(Self { root, open: None, directories: Vec::new() })
    }

    fn take(&mut self, parser: &mut TarParser, mut tar: &[u8]) -> Result<(), UnpackError> {
        while !tar.is_empty() {
            let (consumed, step) = parser.step(tar)?;
            let (bytes, rest) = tar.split_at_checked(consumed).unwrap_or((tar, &[]));
            tar = rest;
            match step {
                Step::Skeleton => {}
                Step::Content { offset } => {
                    if let Some(file) = &self.open {
                        file.write_all_at(bytes, offset).map_err(UnpackError::Read)?;
                    }
                }
                Step::Entry(entry) => {
                    self.open = None;
                    let path = String::from_utf8_lossy(&entry.path).into_owned();
                    self.entry(*entry).map_err(|source| UnpackError::Entry { path, source })?;
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: TarEntry) -> io::Result<()> {
        if entry.path.is_empty() {
            let root = fd_path(&self.root, b"");
            set_attributes(&root, &entry, true)?;
            self.directories.push((entry.path, entry.mtime));
            return Ok(());
        }
        let at = entry.path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = match at {
            Some(at) => (entry.path.get(..at).unwrap_or(&[]), entry.path.get(at + 1..).unwrap_or(&[])),
            None => (&[][..], entry.path.as_slice()),
        };
        let parent = self.make_dirs(parent)?;
        if name == b".wh..wh..opq" {
            return xattr::set(fd_path(&parent, b""), "trusted.overlay.opaque", b"y");
        }
        if name.starts_with(b".wh..wh.") {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            let path = fd_path(&parent, hidden);
            // What this layer itself has of that name stays: a whiteout hides lower layers only.
            return match mknod(&path, SFlag::S_IFCHR, Mode::empty(), 0) {
                Err(nix::errno::Errno::EEXIST) => Ok(()),
                other => Ok(other?),
            };
        }
        let path = fd_path(&parent, name);
        let is_dir = matches!(entry.kind, TarKind::Directory);
        self.make_way(&path, is_dir)?;
        match &entry.kind {
            TarKind::File(content) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .custom_flags(OFlag::O_NOFOLLOW.bits())
                    .mode(0o600)
                    .open(&path)?;
                file.set_len(content.size)?;
                self.open = Some(file);
            }
            TarKind::Directory => match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            },
            TarKind::Symlink(target) => {
                use std::os::unix::ffi::OsStrExt;
                symlink(std::ffi::OsStr::from_bytes(target), &path)?;
            }
            TarKind::HardLink(target) => return self.hard_link(target, &path),
            TarKind::CharDevice(major, minor) => {
                mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(u64::from(*major), u64::from(*minor)))?;
            }
            TarKind::BlockDevice(major, minor) => {
                mknod(&path, SFlag::S_IFBLK, Mode::empty(), makedev(u64::from(*major), u64::from(*minor)))?;
            }
            TarKind::Fifo => mknod(&path, SFlag::S_IFIFO, Mode::empty(), 0)?,
            TarKind::Unknown(_) => return Ok(()),
        }
        set_attributes(&path, &entry, is_dir)?;
        if is_dir {
            self.directories.push((entry.path, entry.mtime));
        }
        Ok(())
    }

    /// Removes what stands where a new entry goes; directories merge.
    fn make_way(&self, path: &Path, is_dir: bool) -> io::Result<()> {
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() && is_dir => Ok(()),
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(_) => Ok(()),
        }
    }

    fn hard_link(&self, target: &[u8], path: &Path) -> io::Result<()> {
        let at = target.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = match at {
            Some(at) => (target.get(..at).unwrap_or(&[]), target.get(at + 1..).unwrap_or(&[])),
            None => (&[][..], target),
        };
        let parent = self.open_dir(parent)?;
        fs::hard_link(fd_path(&parent, name), path)
    }

    fn open_dir(&self, path: &[u8]) -> io::Result<File> {
        use std::os::unix::ffi::OsStrExt;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let path = if path.is_empty() { b"." } else { path };
        let fd: OwnedFd = openat2(&self.root, std::ffi::OsStr::from_bytes(path), how)?;
        Ok(File::from(fd))
    }

    /// Opens a directory, making what is missing of it (0755).
    fn make_dirs(&self, path: &[u8]) -> io::Result<File> {
        match self.open_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => {}
            other => return other,
        }
        let at = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = match at {
            Some(at) => (path.get(..at).unwrap_or(&[]), path.get(at + 1..).unwrap_or(&[])),
            None => (&[][..], path),
        };
        let parent = self.make_dirs(parent)?;
        let dir = fd_path(&parent, name);
        fs::create_dir(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        self.open_dir(path)
    }

    fn finish(self) -> Result<(), UnpackError> {
        for (path, mtime) in self.directories.iter().rev() {
            let failed = |source: io::Error| UnpackError::Entry { path: String::from_utf8_lossy(path).into_owned(), source };
            // A later entry may have replaced the directory.
            if let Ok(dir) = self.open_dir(path) {
                set_time(&fd_path(&dir, b""), *mtime, false).map_err(failed)?;
            }
        }
        self.root.sync_all().map_err(UnpackError::Read)
    }
}

/// A path to `name` in an open directory, or to the directory itself.
fn fd_path(dir: &File, name: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let base = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    if name.is_empty() { base.join(".") } else { base.join(std::ffi::OsStr::from_bytes(name)) }
}

fn set_attributes(path: &Path, entry: &TarEntry, is_dir: bool) -> io::Result<()> {
    if is_dir {
        chown(path, Some(entry.uid), Some(entry.gid))?;
    } else {
        lchown(path, Some(entry.uid), Some(entry.gid))?;
    }
    if !matches!(entry.kind, TarKind::Symlink(_)) {
        fs::set_permissions(path, fs::Permissions::from_mode(entry.mode))?;
    }
    // After the owner: changing that drops capabilities.
    for (name, value) in &entry.xattrs {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(name);
        match xattr::set(path, name, value) {
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EOPNOTSUPP as i32) => {
                tracing::debug!(name = %name.to_string_lossy(), "this file system keeps no such attribute");
            }
            other => other?,
        }
    }
    set_time(path, entry.mtime, true)
}

fn set_time(path: &Path, time: Timestamp, no_follow: bool) -> io::Result<()> {
    let time = TimeSpec::new(time.seconds, i64::from(time.nanoseconds));
    let flag = if no_follow { UtimensatFlags::NoFollowSymlink } else { UtimensatFlags::FollowSymlink };
    Ok(utimensat(AT_FDCWD, path, &time, &time, flag)?)
}
