//! What this kernel does to symbolic links (and named pipes) of lower directories, found out by doing it.
//!
//! Tried in scratch overlays: on an EROFS mount made as the images' are, which says whether containers on streamed images are safe, and
//! on a directory whose files have the `noatime` attribute, which shows the fault of [`super::fault`] where the kernel has it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat};
use serde::Serialize;
use sluice_blockfs::ImageMount;
use sluice_image::entry::{Entry, EntryKind, Timestamp};
use sluice_image::erofs::{self, Form};
use sluice_image::merge::{MergeError, Tree};
use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{OverlayMount, mount_overlay, unmount};

/// A rename that takes longer waits for somebody to open the pipe.
const PATIENCE: Duration = Duration::from_secs(2);
const PIPE: &str = "pipe";
/// What the names of scratch directories begin with.
const SCRATCH: &str = "sluice-doctor-";
/// An attempt that is older was killed.
const LONGEST: Duration = Duration::from_secs(60);

/// What came of one operation on a lower file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Tried {
    pub(crate) operation: &'static str,
    /// None: it worked.
    pub(crate) failure: Option<String>,
}

/// What came of all on one kind of lower directory; or why they could not be tried.
pub(crate) type Outcome = Result<Vec<Tried>, String>;

/// What was found out.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    /// On our kind of mount.
    pub(crate) on_erofs: Outcome,
    /// Where the fault shows, if the kernel has it.
    pub(crate) on_noatime: Outcome,
}

impl Links {
    /// Tries everything in the first of `rooms` where it can be tried: directories on a disk or in memory.
    pub(crate) fn probe(rooms: &[&Path]) -> Self {
        // A thread of its own, with its own mounts: they and their devices go when this process is killed in the midst of it.
        let probe = || {
            sluice_kernel::mount::enter_own_namespace().map_err(|errno| format!("no own mounts: {errno}"))?;
            Ok(Self { on_erofs: in_rooms(rooms, on_erofs), on_noatime: in_rooms(rooms, on_noatime) })
        };
        let probed = std::thread::scope(|scope| scope.spawn(probe).join());
        probed
            .unwrap_or_else(|_panic| Err("the attempt failed".to_owned()))
            .unwrap_or_else(|reason: String| Self { on_erofs: Err(reason.clone()), on_noatime: Err(reason) })
    }

    /// Operations that fail on our mounts: containers on them would not be safe.
    pub(crate) fn broken_on_ours(&self) -> Vec<&Tried> {
        failed(&self.on_erofs)
    }

    /// Whether this kernel has the fault; none: it could not be found out.
    pub(crate) fn has_fault(&self) -> Option<bool> {
        self.on_noatime.as_ref().ok().map(|_| !failed(&self.on_noatime).is_empty())
    }
}

fn failed(outcome: &Outcome) -> Vec<&Tried> {
    outcome.iter().flatten().filter(|one| one.failure.is_some()).collect()
}

fn in_rooms(rooms: &[&Path], probe: impl Fn(&Path) -> Result<Vec<Tried>>) -> Outcome {
    let mut reasons = Vec::new();
    for room in rooms.iter().filter(|room| room.is_dir()) {
        sweep(room);
        let tried = tempfile::Builder::new()
            .prefix(SCRATCH)
            .tempdir_in(room)
            .context("cannot make a directory")
            .and_then(|scratch| probe(scratch.path()));
        match tried {
            Ok(tried) => return Ok(tried),
            Err(error) => reasons.push(format!("{}: {error:#}", room.display())),
        }
    }
    Err(reasons.join("; "))
}

/// Removes the files of attempts that were killed.
fn sweep(room: &Path) {
    let old = |entry: &fs::DirEntry| {
        let ours = entry.file_name().as_encoded_bytes().starts_with(SCRATCH.as_bytes());
        let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|made| made.elapsed());
        ours && age.is_ok_and(|age| age.is_ok_and(|age| age > LONGEST))
    };
    for left in fs::read_dir(room).into_iter().flatten().flatten().filter(old) {
        if let Err(error) = fs::remove_dir_all(left.path()) {
            tracing::debug!(%error, path = %left.path().display(), "a scratch directory stays");
        }
    }
}

/// The operations, each on a link of its own.
const OPERATIONS: [(&str, Operation); 7] = [
    ("rename", |dir, link| nix_io(fs::rename(dir.join(link), dir.join("renamed")))),
    ("renameat2", |dir, link| rename_with(dir, link, RenameFlags::empty())),
    ("renameat2 NOREPLACE", |dir, link| rename_with(dir, link, RenameFlags::RENAME_NOREPLACE)),
    ("renameat2 EXCHANGE", |dir, link| {
        nix_io(fs::write(dir.join(format!("{link}-new")), b""))?;
        rename_with(dir, link, RenameFlags::RENAME_EXCHANGE)
    }),
    ("link", |dir, link| {
        let new = dir.join(format!("{link}-new"));
        linkat(AT_FDCWD, &dir.join(link), AT_FDCWD, &new, AtFlags::empty())
    }),
    ("lchown", |dir, link| {
        let (user, group) = (Uid::from_raw(1), Gid::from_raw(1));
        fchownat(AT_FDCWD, &dir.join(link), Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)
    }),
    ("utimensat", |dir, link| {
        let time = TimeSpec::new(1_000_000_000, 0);
        utimensat(AT_FDCWD, &dir.join(link), &time, &time, UtimensatFlags::NoFollowSymlink)
    }),
];

/// Done to the link of this name in this directory.
type Operation = fn(&Path, &str) -> Result<(), Errno>;

fn nix_io(result: std::io::Result<()>) -> Result<(), Errno> {
    result.map_err(|error| error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
}

fn rename_with(dir: &Path, link: &str, flags: RenameFlags) -> Result<(), Errno> {
    renameat2(AT_FDCWD, &dir.join(link), AT_FDCWD, &dir.join(format!("{link}-new")), flags)
}

fn names() -> impl Iterator<Item = String> {
    (0..OPERATIONS.len()).map(|number| format!("link{number}"))
}

fn on_erofs(room: &Path) -> Result<Vec<Tried>> {
    let entry = |path: String, kind| Entry {
        path: path.into_bytes(),
        kind,
        mode: 0o777,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
    };
    let target = || EntryKind::Symlink { target: b"target".to_vec() };
    let mut entries: Vec<_> = names().map(|name| entry(name, target())).collect();
    entries.push(entry(PIPE.to_owned(), EntryKind::Fifo));
    let mut tree = Tree::new();
    tree.apply::<MergeError>(entries.into_iter().map(Ok))?;
    let image = room.join("image");
    let mut file = std::io::BufWriter::new(File::create(&image)?);
    erofs::write(&tree, &[0], Form::Devices, &mut file)?;
    file.into_inner().context("cannot write the scratch image")?;
    let mount = ImageMount::mount(&image, Vec::new(), &room.join("lower"))?;
    let tried = on_lower(room, mount.dir());
    mount.unmount()?;
    tried
}

fn on_noatime(room: &Path) -> Result<Vec<Tried>> {
    let lower = room.join("lower");
    fs::create_dir(&lower)?;
    // What is made in it gets the attribute too (ext4, btrfs; tmpfs since Linux 6.0).
    sluice_kernel::file::set_no_atime(File::open(&lower)?.as_fd()).context("no noatime attribute")?;
    for name in names() {
        symlink("target", lower.join(name))?;
    }
    nix::unistd::mkfifo(&lower.join(PIPE), Mode::from_bits_truncate(0o666))?;
    on_lower(room, &lower)
}

fn on_lower(room: &Path, lower: &Path) -> Result<Vec<Tried>> {
    let overlay = Overlay::mount(room, lower)?;
    let mut tried: Vec<Tried> = names()
        .zip(OPERATIONS)
        .map(|(link, (operation, done))| {
            let failure = done(&overlay.merged, &link).err().map(|errno| errno.to_string());
            Tried { operation, failure }
        })
        .collect();
    tried.push(Tried { operation: "rename of a named pipe", failure: pipe(&overlay.merged, lower)? });
    Ok(tried)
}

/// Renames the pipe, on a thread of its own: on kernels with the fault that waits until somebody writes to it.
fn pipe(merged: &Path, lower: &Path) -> Result<Option<String>> {
    let (from, to) = (merged.join(PIPE), merged.join("pipe-new"));
    let (sender, receiver) = mpsc::channel();
    let renaming = std::thread::spawn(move || {
        let renamed = fs::rename(from, to);
        // Nobody listens any more if it took too long.
        drop(sender.send(renamed.map_err(|error| error.to_string())));
    });
    let failure = match receiver.recv_timeout(PATIENCE) {
        Ok(renamed) => renamed.err(),
        Err(_elapsed) => {
            let deadline = Instant::now() + PATIENCE;
            while !renaming.is_finished() && Instant::now() < deadline {
                // A writer that comes and goes lets the reader in the kernel go on.
                let writer =
                    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(lower.join(PIPE));
                drop(writer);
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(format!("it blocks for more than {} s", PATIENCE.as_secs()))
        }
    };
    if renaming.is_finished() {
        renaming.join().map_err(|_panic| anyhow::anyhow!("the attempt failed"))?;
    }
    Ok(failure)
}

/// A scratch overlay, unmounted when dropped.
struct Overlay {
    merged: PathBuf,
}

impl Overlay {
    fn mount(room: &Path, lower: &Path) -> Result<Self> {
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| room.join(name));
        for dir in [&upper, &work, &merged] {
            fs::create_dir(dir)?;
        }
        let overlay = OverlayMount {
            lower: vec![lower.to_path_buf()],
            upper_and_work: Some((upper, work)),
            options: Vec::new(),
            restrictions: Restrictions::default(),
        };
        mount_overlay(&overlay, &merged)?;
        Ok(Self { merged })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // Lazily: a rename that blocks may still be in it.
        if let Err(error) = unmount(&self.merged, UnmountOptions { lazy: true, force: false }) {
            tracing::warn!(%error, "a scratch overlay stays");
        }
    }
}
