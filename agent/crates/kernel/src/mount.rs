//! Mounting, and unmounting: EROFS and overlayfs here, FUSE in `fuse`.
//!
//! The new mount interface comes first (Linux 5.2; long option lists, errors in words), `mount(2)` where it is missing
//! or refused by a seccomp filter. Which image is mounted where is decided elsewhere.

use std::ffi::{CStr, CString, OsString};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use thiserror::Error;

use crate::fsopen::{self, Context};
use crate::mountinfo::{MountInfoError, mounts};

/// `mount(2)` copies one page of options, the NUL included.
const MAX_OPTIONS: usize = 4095;

/// What can go wrong with a mount.
#[derive(Debug, Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot mount {kind} on {}{}", target.display(), said(messages))]
    Mount {
        /// `erofs`, `overlay` or `fuse`.
        kind: &'static str,
        /// Where.
        target: PathBuf,
        /// The kernel's words, maybe empty.
        messages: String,
        /// The errno.
        #[source]
        source: Errno,
    },
    /// Too many options for this kernel's interface.
    #[error("the {kind} mount on {} has {length} bytes of options, more than {MAX_OPTIONS}", target.display())]
    OptionsTooLong {
        /// `erofs`, `overlay` or `fuse`.
        kind: &'static str,
        /// Where.
        target: PathBuf,
        /// Bytes.
        length: usize,
    },
    /// A path that an option cannot hold directly could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The mount cannot be taken away.
    #[error("cannot unmount {}", target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// The errno.
        #[source]
        source: Errno,
    },
}

fn said(messages: &str) -> String {
    if messages.is_empty() { String::new() } else { format!(" ({messages})") }
}

/// Restrictions of a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// No writes.
    pub read_only: bool,
    /// Set-id bits and file capabilities have no effect.
    pub no_suid: bool,
    /// Device nodes cannot be opened.
    pub no_dev: bool,
    /// Nothing can be executed.
    pub no_exec: bool,
}

impl Restrictions {
    fn attributes(self) -> u32 {
        [
            (self.read_only, fsopen::ATTR_RDONLY),
            (self.no_suid, fsopen::ATTR_NOSUID),
            (self.no_dev, fsopen::ATTR_NODEV),
            (self.no_exec, fsopen::ATTR_NOEXEC),
        ]
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit)
    }

    fn flags(self) -> MsFlags {
        let mut flags = MsFlags::empty();
        flags.set(MsFlags::MS_RDONLY, self.read_only);
        flags.set(MsFlags::MS_NOSUID, self.no_suid);
        flags.set(MsFlags::MS_NODEV, self.no_dev);
        flags.set(MsFlags::MS_NOEXEC, self.no_exec);
        flags
    }
}

/// An EROFS image on block devices.
#[derive(Debug, Clone)]
pub struct ErofsMount {
    /// Device with the metadata image (or with everything, in the one-device form).
    pub device: PathBuf,
    /// The extra devices in the order of the image's device table; Linux 5.16.
    pub extra_devices: Vec<PathBuf>,
    /// Restrictions; it is read-only in any case.
    pub restrictions: Restrictions,
}

/// An overlay of directories.
#[derive(Debug, Clone)]
pub struct OverlayMount {
    /// Lower directories, the topmost first (as in `lowerdir=`). At least one.
    pub lower: Vec<PathBuf>,
    /// Upper and work directory, on one file system; without them the overlay is read-only (and needs two lowers).
    pub upper_and_work: Option<(PathBuf, PathBuf)>,
    /// Further options without a value or with one, e.g. `("volatile", None)`, `("metacopy", Some("off"))`.
    pub options: Vec<(CString, Option<CString>)>,
    /// Restrictions.
    pub restrictions: Restrictions,
}

/// Mounts an EROFS image.
pub fn mount_erofs(mount: &ErofsMount, target: &Path) -> Result<(), MountError> {
    let restrictions = Restrictions { read_only: true, ..mount.restrictions };
    let mut plan = Plan {
        kind: "erofs",
        name: c"erofs",
        source: mount.device.clone(),
        options: Vec::new(),
        restrictions,
    };
    for device in &mount.extra_devices {
        plan.push(c"device", device.as_os_str().as_bytes());
    }
    plan.mount_new(target).or_else(|failure| plan.fall_back(target, failure, true))
}

/// Mounts an overlay. Any number of layers and any path works on Linux 6.8; before, the options must fit a page, to which
/// end long ones are named by descriptor.
pub fn mount_overlay(mount: &OverlayMount, target: &Path) -> Result<(), MountError> {
    let mut plan = mount.plan(c"lowerdir+", |path| !is_plain(path) || path.len() >= fsopen::MAX_VALUE)?;
    let failure = match plan.0.mount_new(target) {
        Ok(()) => return Ok(()),
        Err(failure) => failure,
    };
    // EINVAL may mean that `lowerdir+` is unknown; mount(2) then decides.
    if !matches!(failure.errno, Errno::ENOSYS | Errno::EPERM | Errno::EINVAL) {
        return Err(plan.0.error(target, failure));
    }
    plan = mount.joined_plan(|path| !is_plain(path))?;
    if plan.0.data().len() > MAX_OPTIONS {
        plan = mount.joined_plan(|_| true)?;
    }
    let first = failure.messages.clone();
    plan.0.fall_back(target, Failure { errno: Errno::ENOSYS, messages: first }, false)
}

/// Unmount flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UnmountOptions {
    /// Out of the tree now, cleaned up when the last user goes.
    pub lazy: bool,
    /// Abort what is in flight (network and FUSE file systems).
    pub force: bool,
}

/// Whether a mount stands exactly at `path` (absolute, without symbolic links).
pub fn is_mount_point(path: &Path) -> Result<bool, MountInfoError> {
    Ok(mounts()?.iter().any(|mount| mount.target == path))
}

/// Gives the calling thread, and those it starts, a mount namespace of its own: what they mount is seen by nobody else and goes
/// with the last of them, however it ends. Mounts made elsewhere come and go in it as they do there.
pub fn enter_own_namespace() -> Result<(), Errno> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
}

/// Unmounts what is on top at `target`; a symbolic link there is not followed.
pub fn unmount(target: &Path, options: UnmountOptions) -> Result<(), MountError> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_DETACH, options.lazy);
    flags.set(MntFlags::MNT_FORCE, options.force);
    nix::mount::umount2(target, flags).map_err(|source| MountError::Unmount { target: target.into(), source })
}

/// Bind-mounts `source` on `target` with `restrictions`.
pub fn mount_bind(source: &Path, target: &Path, restrictions: Restrictions) -> Result<(), MountError> {
    let fail =
        |source| MountError::Mount { kind: "bind", target: target.into(), messages: String::new(), source };
    let none: Option<&Path> = None;
    nix::mount::mount(Some(source), target, none, MsFlags::MS_BIND, none).map_err(fail)?;
    if restrictions == Restrictions::default() {
        return Ok(());
    }
    // A bind ignores flags until it is remounted.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | restrictions.flags();
    let Err(errno) = nix::mount::mount(none, target, none, flags, none) else { return Ok(()) };
    unmount(target, UnmountOptions { lazy: true, force: false })?;
    Err(fail(errno))
}

/// Paths that need no escaping in overlay options.
fn is_plain(path: &[u8]) -> bool {
    !path.iter().any(|byte| matches!(byte, b':' | b',' | b'\\' | b'"'))
}

impl OverlayMount {
    /// One option per lower directory.
    fn plan(
        &self,
        key: &'static CStr,
        by_descriptor: impl Fn(&[u8]) -> bool,
    ) -> Result<(Plan, Vec<File>), MountError> {
        let mut held = Vec::new();
        let mut plan = self.empty_plan();
        for path in &self.lower {
            plan.push(key, &name_for(path, &by_descriptor, &mut held)?);
        }
        self.finish(&mut plan, by_descriptor, &mut held)?;
        Ok((plan, held))
    }

    /// All lower directories in one option, as before Linux 6.8.
    fn joined_plan(&self, by_descriptor: impl Fn(&[u8]) -> bool) -> Result<(Plan, Vec<File>), MountError> {
        let mut held = Vec::new();
        let mut plan = self.empty_plan();
        let mut joined = Vec::new();
        for path in &self.lower {
            if !joined.is_empty() {
                joined.push(b':');
            }
            joined.extend(name_for(path, &by_descriptor, &mut held)?);
        }
        plan.push(c"lowerdir", &joined);
        self.finish(&mut plan, by_descriptor, &mut held)?;
        Ok((plan, held))
    }

    fn empty_plan(&self) -> Plan {
        let restrictions = self.restrictions;
        Plan {
            kind: "overlay",
            name: c"overlay",
            source: "overlay".into(),
            options: Vec::new(),
            restrictions,
        }
    }

    fn finish(
        &self,
        plan: &mut Plan,
        by_descriptor: impl Fn(&[u8]) -> bool,
        held: &mut Vec<File>,
    ) -> Result<(), MountError> {
        if let Some((upper, work)) = &self.upper_and_work {
            plan.push(c"upperdir", &name_for(upper, &by_descriptor, held)?);
            plan.push(c"workdir", &name_for(work, &by_descriptor, held)?);
        }
        for (key, value) in &self.options {
            plan.options.push((key.clone(), value.as_ref().map(|value| value.as_bytes().to_vec())));
        }
        Ok(())
    }
}

/// The path, or `/proc/self/fd/N` of a descriptor that lives in `held`.
fn name_for(
    path: &Path,
    by_descriptor: impl Fn(&[u8]) -> bool,
    held: &mut Vec<File>,
) -> Result<Vec<u8>, MountError> {
    let bytes = path.as_os_str().as_bytes();
    if !by_descriptor(bytes) {
        return Ok(bytes.to_vec());
    }
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
    let file = opened.map_err(|source| MountError::Open { path: path.into(), source })?;
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    held.push(file);
    Ok(name.into_bytes())
}

/// One mount in terms that both interfaces understand.
pub(crate) struct Plan {
    pub(crate) kind: &'static str,
    pub(crate) name: &'static CStr,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<(CString, Option<Vec<u8>>)>,
    pub(crate) restrictions: Restrictions,
}

pub(crate) struct Failure {
    errno: Errno,
    messages: String,
}

impl Plan {
    pub(crate) fn push(&mut self, key: &CStr, value: &[u8]) {
        self.options.push((key.to_owned(), Some(value.to_vec())));
    }

    pub(crate) fn mount_new(&self, target: &Path) -> Result<(), Failure> {
        let silent = |errno| Failure { errno, messages: String::new() };
        let mut context = Context::open(self.name).map_err(silent)?;
        match self.configure(&context).and_then(|()| context.create(self.restrictions.attributes())) {
            Ok(detached) => detached.attach(target).map_err(silent),
            Err(errno) => Err(Failure { errno, messages: context.messages() }),
        }
    }

    fn configure(&self, context: &Context) -> Result<(), Errno> {
        context.string(c"source", self.source.as_os_str().as_bytes())?;
        if self.restrictions.read_only {
            context.flag(c"ro")?;
        }
        for (key, value) in &self.options {
            match value {
                Some(value) => context.string(key, value)?,
                None => context.flag(key)?,
            }
        }
        Ok(())
    }

    /// Tries `mount(2)` if the failure says that the new interface is not to be had.
    pub(crate) fn fall_back(&self, target: &Path, failure: Failure, check: bool) -> Result<(), MountError> {
        if check && !matches!(failure.errno, Errno::ENOSYS | Errno::EPERM) {
            return Err(self.error(target, failure));
        }
        let data = self.data();
        if data.len() > MAX_OPTIONS {
            let (kind, target) = (self.kind, target.into());
            return Err(MountError::OptionsTooLong { kind, target, length: data.len() });
        }
        let data = OsString::from_vec(data);
        let (flags, source) = (self.restrictions.flags(), Some(self.source.as_path()));
        nix::mount::mount(source, target, Some(self.name), flags, Some(data.as_os_str()))
            .map_err(|errno| self.error(target, Failure { errno, messages: failure.messages }))
    }

    fn data(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for (key, value) in &self.options {
            if !data.is_empty() {
                data.push(b',');
            }
            data.extend(key.as_bytes());
            if let Some(value) = value {
                data.push(b'=');
                data.extend(value);
            }
        }
        data
    }

    fn error(&self, target: &Path, failure: Failure) -> MountError {
        let Failure { errno: source, messages } = failure;
        MountError::Mount { kind: self.kind, target: target.into(), messages, source }
    }
}
