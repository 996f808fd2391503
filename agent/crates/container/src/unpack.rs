//! The ordinary pull's unpacking: a layer to a directory in overlayfs form.
//!
//! A layer's bytes are not trusted: paths are resolved inside the directory by the kernel, and what only overlayfs itself may
//! say (`trusted.overlay.*`) is not taken from the layer. Both digests are verified; the caller publishes the directory after.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink,
};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, futimens, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use sluice_image::decode::{Compression, DecodeError, Decoder};
use sluice_image::entry::Timestamp;
use sluice_image::tar::{Step, TarEntry, TarError, TarKind, TarParser};

use crate::inside::{fd_path, open_dir_inside, split};
use crate::parents::{Parents, make_dir};

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The directory cannot be opened or synced.
    #[error("cannot {what} the directory")]
    Directory {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The layer cannot be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    /// Its compression is damaged.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Its tar is damaged.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be made or filled.
    #[error("cannot unpack `{path}`")]
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

const OPAQUE: &[u8] = b".wh..wh..opq";
pub(crate) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// Directories that no entry describes, in this layer or below.
pub(crate) const IMPLIED_MODE: u32 = 0o755;
const BUFFER: usize = 256 * 1024;

/// Unpacks the layer that `reader` gives (gzip, zstd or plain) into the empty directory `dir`, verifies both digests
/// (`sha256:…`, of the compressed bytes and of the tar), and makes it durable. Directories that it does not describe are as in the
/// layers `below` it, topmost first. On an error what was made so far is left for the
/// caller to remove. Needs root and `/proc`; blocks.
pub fn unpack_layer(
    mut reader: impl Read,
    dir: &Path,
    below: &[impl AsRef<Path>],
    digest: &str,
    diff_id: &str,
) -> Result<(), UnpackError> {
    let mut layer = LayerStream {
        unpacker: Unpacker::new(dir, below)?,
        parser: TarParser::new(false),
        decoder: None,
        tar: ring::digest::Context::new(&ring::digest::SHA256),
    };
    let mut compressed = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; BUFFER];
    let mut filled = 0;
    loop {
        let room = buffer.get_mut(filled..).unwrap_or(&mut []);
        let len = match reader.read(room) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map_err(UnpackError::Read)?,
        };
        filled += len;
        if len > 0 && filled < 4 {
            continue; // Too little to tell the compression by.
        }
        let input = buffer.get(..filled).unwrap_or(&[]);
        compressed.update(input);
        layer.take(input)?;
        filled = 0;
        if len == 0 {
            break;
        }
    }
    layer.finish(digest, compressed, diff_id)
}

/// The way of a layer's bytes: decoder, digest, tar parser, directory.
struct LayerStream {
    unpacker: Unpacker,
    parser: TarParser,
    /// Known with the first bytes.
    decoder: Option<Decoder>,
    tar: ring::digest::Context,
}

impl LayerStream {
    fn take(&mut self, mut input: &[u8]) -> Result<(), UnpackError> {
        if input.is_empty() {
            return Ok(());
        }
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            None => self.decoder.insert(Decoder::new(Compression::sniff(input))?),
        };
        loop {
            let step = decoder.step(input)?;
            input = input.get(step.consumed..).unwrap_or(&[]);
            let output = decoder.output();
            if step.consumed == 0 && output.is_empty() && !step.boundary {
                return Ok(());
            }
            self.tar.update(output);
            self.unpacker.take(&mut self.parser, output)?;
        }
    }

    fn finish(
        self,
        digest: &str,
        compressed: ring::digest::Context,
        diff_id: &str,
    ) -> Result<(), UnpackError> {
        // A layer that was cut short is told by its digest first: that names the cause.
        compare("layer digest", digest, compressed)?;
        if let Some(decoder) = &self.decoder {
            decoder.finish()?;
        }
        self.parser.finish()?;
        compare("diffID", diff_id, self.tar)?;
        self.unpacker.finish()
    }
}

fn compare(what: &'static str, expected: &str, context: ring::digest::Context) -> Result<(), UnpackError> {
    let sum = context.finish();
    let hex: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let actual = format!("sha256:{hex}");
    if actual == expected {
        return Ok(());
    }
    Err(UnpackError::Digest { what, expected: expected.to_owned(), actual })
}

fn at_entry(path: &[u8]) -> impl FnOnce(io::Error) -> UnpackError {
    |source| UnpackError::Entry { path: String::from_utf8_lossy(path).into_owned(), source }
}

struct Unpacker {
    parents: Parents,
    /// The file whose content comes. It gets its attributes when it is full: writing would change its times, and take its
    /// capabilities away.
    open: Option<(File, TarEntry)>,
    /// Directories get their times last, when nothing is made in them any more.
    directories: Vec<(Vec<u8>, Timestamp)>,
}

impl Unpacker {
    fn new(dir: &Path, below: &[impl AsRef<Path>]) -> Result<Self, UnpackError> {
        let failed = |source| UnpackError::Directory { what: "open", source };
        let root = File::open(dir).map_err(failed)?;
        // Most layers do not describe the root; in overlayfs the topmost layer's attributes are the container's.
        root.set_permissions(fs::Permissions::from_mode(IMPLIED_MODE)).map_err(failed)?;
        let parents = Parents::new(root, below).map_err(failed)?;
        Ok(Self { parents, open: None, directories: Vec::new() })
    }

    fn take(&mut self, parser: &mut TarParser, mut tar: &[u8]) -> Result<(), UnpackError> {
        while !tar.is_empty() {
            let (consumed, step) = parser.step(tar)?;
            let (bytes, rest) = tar.split_at_checked(consumed).unwrap_or((tar, &[]));
            tar = rest;
            match step {
                Step::Skeleton => {}
                Step::Content { offset } => {
                    if let Some((file, entry)) = &self.open {
                        file.write_all_at(bytes, offset).map_err(at_entry(&entry.path))?;
                    }
                }
                Step::Entry(entry) => {
                    self.close()?;
                    let path = entry.path.clone();
                    self.entry(*entry).map_err(at_entry(&path))?;
                }
            }
        }
        Ok(())
    }

    /// Ends the open file.
    fn close(&mut self) -> Result<(), UnpackError> {
        match self.open.take() {
            Some((file, entry)) => set_open_attributes(&file, &entry).map_err(at_entry(&entry.path)),
            None => Ok(()),
        }
    }

    fn entry(&mut self, entry: TarEntry) -> io::Result<()> {
        let (parent, name) = split(&entry.path);
        if name.is_empty() {
            return self.directory(self.parents.root.try_clone()?, entry);
        }
        let parent = self.parents.open(parent, &mut self.directories)?;
        if name == OPAQUE {
            return xattr::FileExt::set_xattr(&parent, OPAQUE_XATTR, b"y");
        }
        if name.starts_with(b".wh..wh.") {
            return Ok(()); // AUFS' own records, which no other driver needs.
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return white_out(&parent, hidden);
        }
        if matches!(entry.kind, TarKind::Directory) {
            let dir = make_dir(&parent, name)?;
            return self.directory(dir, entry);
        }
        self.other(&parent, entry)
    }

    fn directory(&mut self, dir: File, entry: TarEntry) -> io::Result<()> {
        set_open_attributes(&dir, &entry)?;
        self.directories.push((entry.path, entry.mtime));
        Ok(())
    }

    /// Makes what is no directory.
    fn other(&mut self, parent: &File, entry: TarEntry) -> io::Result<()> {
        let path = fd_path(parent, split(&entry.path).1);
        let device = |kind, major: u32, minor: u32| {
            mknod(&path, kind, Mode::empty(), makedev(u64::from(major), u64::from(minor)))
        };
        match &entry.kind {
            TarKind::File(content) => {
                make_way(&path)?;
                let mut options = OpenOptions::new();
                options.write(true).create_new(true).custom_flags(OFlag::O_NOFOLLOW.bits()).mode(0o600);
                let file = options.open(&path)?;
                file.set_len(content.size)?;
                self.open = Some((file, entry));
                return Ok(());
            }
            TarKind::HardLink(target) => {
                let (target_parent, target_name) = split(target);
                let target_parent = open_dir_inside(&self.parents.root, target_parent)?;
                make_way(&path)?;
                return fs::hard_link(fd_path(&target_parent, target_name), path);
            }
            TarKind::Symlink(target) => {
                make_way(&path)?;
                symlink(std::ffi::OsStr::from_bytes(target), &path)?;
            }
            TarKind::CharDevice(major, minor) => {
                make_way(&path)?;
                device(SFlag::S_IFCHR, *major, *minor)?;
            }
            TarKind::BlockDevice(major, minor) => {
                make_way(&path)?;
                device(SFlag::S_IFBLK, *major, *minor)?;
            }
            TarKind::Fifo => {
                make_way(&path)?;
                device(SFlag::S_IFIFO, 0, 0)?;
            }
            TarKind::Directory | TarKind::Unknown(_) => return Ok(()),
        }
        set_attributes(&path, &entry)
    }

    fn finish(mut self) -> Result<(), UnpackError> {
        self.close()?;
        for (path, mtime) in &self.directories {
            match open_dir_inside(&self.parents.root, path) {
                Ok(dir) => futimens(&dir, &spec(*mtime), &spec(*mtime)).map_err(io::Error::from),
                // A later entry replaced the directory.
                Err(error) if is_absent(&error) => Ok(()),
                Err(error) => Err(error),
            }
            .map_err(at_entry(path))?;
        }
        nix::unistd::syncfs(&self.parents.root)
            .map_err(|errno| UnpackError::Directory { what: "sync", source: errno.into() })
    }
}

pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

pub(crate) fn is_whiteout(meta: &fs::Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

/// Hides `name` of the lower layers. What this layer itself has of that name stays, wherever in the layer the whiteout stands:
/// a directory then does not merge with the lower one.
fn white_out(parent: &File, name: &[u8]) -> io::Result<()> {
    if matches!(name, b"" | b"." | b"..") {
        return Err(Errno::EINVAL.into());
    }
    let path = fd_path(parent, name);
    match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => xattr::set(&path, OPAQUE_XATTR, b"y"),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?)
        }
        Err(error) => Err(error),
    }
}

/// Removes what stands where a new entry goes.
pub(crate) fn make_way(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn set_open_attributes(file: &File, entry: &TarEntry) -> io::Result<()> {
    fchown(file, Some(entry.uid), Some(entry.gid))?;
    file.set_permissions(fs::Permissions::from_mode(entry.mode))?;
    set_xattrs(entry, |name, value| xattr::FileExt::set_xattr(file, name, value))?;
    Ok(futimens(file, &spec(entry.mtime), &spec(entry.mtime))?)
}

/// Of what cannot be opened without effect: links, devices, FIFOs.
fn set_attributes(path: &Path, entry: &TarEntry) -> io::Result<()> {
    lchown(path, Some(entry.uid), Some(entry.gid))?;
    if !matches!(entry.kind, TarKind::Symlink(_)) {
        fs::set_permissions(path, fs::Permissions::from_mode(entry.mode))?;
    }
    set_xattrs(entry, |name, value| xattr::set(path, name, value))?;
    let time = spec(entry.mtime);
    Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

/// After the owner, whose change drops capabilities.
fn set_xattrs(entry: &TarEntry, set: impl Fn(&std::ffi::OsStr, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let regular = matches!(entry.kind, TarKind::File(_) | TarKind::Directory);
    for (name, value) in &entry.xattrs {
        let skipped = || {
            let path = String::from_utf8_lossy(&entry.path);
            tracing::debug!(%path, name = %String::from_utf8_lossy(name), "extended attribute not kept");
        };
        if name.starts_with(b"trusted.overlay.") {
            skipped(); // It would redirect overlayfs to other files.
            continue;
        }
        match set(std::ffi::OsStr::from_bytes(name), value) {
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => skipped(),
            // Only files and directories have `user.` attributes (xattr(7)).
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) && !regular => skipped(),
            other => other?,
        }
    }
    Ok(())
}

fn spec(time: Timestamp) -> TimeSpec {
    TimeSpec::new(time.seconds, i64::from(time.nanoseconds))
}
