//! What this kernel can do, found out in one place.
//!
//! Nothing is assumed from a version number where it can be tried. Each answer carries its reason, to be logged and
//! shown as it is.

use std::fmt;
use std::path::Path;

use nix::errno::Errno;

use crate::fsopen::Context;
use crate::fuse::{self, URING_PARAMETER};

/// One thing the kernel can or cannot do, and how we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ability {
    /// Whether it can be used now.
    pub available: bool,
    /// One clause, for people.
    pub reason: String,
}

impl Ability {
    fn yes(reason: impl Into<String>) -> Self {
        Self { available: true, reason: reason.into() }
    }

    fn no(reason: impl Into<String>) -> Self {
        Self { available: false, reason: reason.into() }
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", if self.available { "yes" } else { "no" }, self.reason)
    }
}

/// A kernel release such as 6.18.44.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// 6
    pub major: u32,
    /// 18
    pub minor: u32,
}

impl KernelVersion {
    /// Parses the beginning of a release string.
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
    }

    /// Whether this is `major.minor` or newer.
    pub fn at_least(self, major: u32, minor: u32) -> bool {
        self >= Self { major, minor }
    }
}

/// Which cgroup hierarchy is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupLayout {
    /// Version 2 only.
    Unified,
    /// Version 1, maybe with an empty version 2 beside it.
    Legacy,
    /// None is mounted.
    Missing,
}

/// Everything that decides which way an image is served.
#[derive(Debug, Clone)]
pub struct Abilities {
    /// As `uname -r` prints it.
    pub release: String,
    /// Its beginning; `None` when it is no version.
    pub version: Option<KernelVersion>,
    /// `/dev/fuse` can be opened.
    pub fuse: Ability,
    /// FUSE over io_uring (Linux 6.14; the module's switch is turned on when it is used).
    pub fuse_uring: Ability,
    /// EROFS can be mounted.
    pub erofs: Ability,
    /// EROFS with extra devices (Linux 5.16).
    pub erofs_devices: Ability,
    /// Loop devices can be made.
    pub loop_control: Ability,
    /// overlayfs can be mounted.
    pub overlay: Ability,
    /// The mount interface of Linux 5.2.
    pub new_mount: Ability,
    /// Control groups.
    pub cgroup: CgroupLayout,
}

impl Abilities {
    /// Asks the kernel. Loads the erofs, overlay and fuse modules as a side effect where they are modules.
    pub fn probe() -> Self {
        let release = match nix::sys::utsname::uname() {
            Ok(name) => name.release().to_string_lossy().into_owned(),
            Err(errno) => format!("unknown: {errno}"),
        };
        let version = KernelVersion::parse(&release);
        let fuse = openable("/dev/fuse", "modprobe fuse");
        let erofs = file_system(c"erofs", "erofs");
        Self {
            fuse_uring: fuse_uring(&fuse),
            erofs_devices: erofs_devices(&erofs, version, &release),
            loop_control: openable("/dev/loop-control", "modprobe loop"),
            overlay: file_system(c"overlay", "overlay"),
            new_mount: new_mount(),
            cgroup: cgroup_layout(),
            release,
            version,
            fuse,
            erofs,
        }
    }
}

fn openable(path: &str, remedy: &str) -> Ability {
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ability::yes(format!("{path} opens")),
        Err(error) => Ability::no(format!("{path}: {error}; as root: {remedy}")),
    }
}

fn fuse_uring(fuse: &Ability) -> Ability {
    if !fuse.available {
        return Ability::no(fuse.reason.clone());
    }
    let parameter = match std::fs::read_to_string(URING_PARAMETER) {
        Ok(text) => text.trim().to_owned(),
        Err(error) => return Ability::no(format!("{URING_PARAMETER}: {error}; Linux 6.14 has it")),
    };
    if let Err(error) = crate::fuse_ring::probe() {
        return Ability::no(format!("io_uring_setup: {error}; see sysctl kernel.io_uring_disabled"));
    }
    match parameter.as_str() {
        "Y" | "1" => Ability::yes(format!("{URING_PARAMETER} is Y")),
        // Whoever mounts writes it; that needs root and a sysfs that is not read-only.
        other => Ability::yes(format!("{URING_PARAMETER} is {other}, and is set to Y when it is first used")),
    }
}

/// FUSE over io_uring with zero copy (Linux 7.3), where io_uring is as in [`Abilities::fuse_uring`]. Makes a FUSE file system to ask, and is
/// therefore no part of what a daemon's start waits for.
pub fn fuse_zero_copy(fuse_uring: &Ability) -> Ability {
    if !fuse_uring.available {
        return Ability::no(fuse_uring.reason.clone());
    }
    match fuse::offered() {
        Ok(flags) if flags & fuse::IO_URING_BUFPOOL != 0 => {
            Ability::yes("the kernel offers FUSE_HAS_IO_URING_BUFPOOL")
        }
        Ok(flags) if flags & fuse::OVER_IO_URING == 0 => {
            Ability::no(format!("not known until {URING_PARAMETER} is Y; Linux 7.3 has it"))
        }
        Ok(_) => Ability::no("the kernel does not offer FUSE_HAS_IO_URING_BUFPOOL; Linux 7.3 has it"),
        Err(error) => Ability::no(format!("the kernel cannot be asked: {error}")),
    }
}

/// Opening a context loads the module, and says ENODEV when there is none.
fn file_system(kind: &std::ffi::CStr, name: &str) -> Ability {
    if registered(name) {
        return Ability::yes(format!("/proc/filesystems lists {name}"));
    }
    match Context::open(kind) {
        Ok(_) => Ability::yes(format!("the {name} module was loaded")),
        Err(Errno::ENODEV) => Ability::no(format!("this kernel has no {name}; as root: modprobe {name}")),
        Err(errno) => Ability::no(format!("/proc/filesystems does not list {name}, and fsopen: {errno}")),
    }
}

fn registered(name: &str) -> bool {
    // Without /proc the answer is that of fsopen.
    std::fs::read_to_string("/proc/filesystems")
        .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().next_back() == Some(name)))
}

fn erofs_devices(erofs: &Ability, version: Option<KernelVersion>, release: &str) -> Ability {
    // From 6.x on sysfs names the feature; an old kernel without the file may still have it.
    if !erofs.available {
        return Ability::no(erofs.reason.clone());
    }
    if Path::new("/sys/fs/erofs/features/device_table").exists() {
        return Ability::yes("/sys/fs/erofs/features/device_table exists");
    }
    match version {
        Some(version) if version.at_least(5, 16) => Ability::yes(format!("Linux {release} is 5.16 or newer")),
        _ => Ability::no(format!("Linux {release} is older than 5.16")),
    }
}

fn new_mount() -> Ability {
    match Context::open(c"tmpfs") {
        Ok(_) => Ability::yes("fsopen works"),
        Err(errno) => Ability::no(format!("fsopen: {errno}")),
    }
}

fn cgroup_layout() -> CgroupLayout {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        CgroupLayout::Unified
    } else if root.join("memory").exists() || root.join("cpu").exists() || root.join("systemd").exists() {
        CgroupLayout::Legacy
    } else {
        CgroupLayout::Missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_parse() {
        for (text, expected) in [
            ("6.18.44-fc", Some((6, 18))),
            ("5.4.0-150-generic", Some((5, 4))),
            ("7.3-rc1", Some((7, 3))),
            ("", None),
            ("x.y", None),
        ] {
            let expected = expected.map(|(major, minor)| KernelVersion { major, minor });
            assert_eq!(KernelVersion::parse(text), expected, "{text}");
        }
        assert!(KernelVersion { major: 5, minor: 16 }.at_least(5, 16));
        assert!(!KernelVersion { major: 4, minor: 19 }.at_least(5, 4));
    }

    #[test]
    fn every_answer_has_a_reason() {
        let found = Abilities::probe();
        for ability in [
            &found.fuse,
            &found.fuse_uring,
            &fuse_zero_copy(&found.fuse_uring),
            &found.erofs,
            &found.erofs_devices,
            &found.loop_control,
            &found.overlay,
            &found.new_mount,
        ] {
            assert!(!ability.reason.is_empty(), "{ability:?}");
        }
        assert!(found.version.is_some(), "{}", found.release);
    }
}
