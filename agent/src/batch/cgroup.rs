//! Control groups of a job: one for each task, with its limits, and below it one for each runnable, which can so be ended
//! with everything it started.
//!
//! Version 2 has one hierarchy; version 1 one for each controller, and the OCI runtime makes a container's group in all of them.
//! Limits stand on the task's group, processes only in those below it: version 2 wants it so (cgroup-v2(7), "no internal
//! processes").

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MOUNT: &str = "/sys/fs/cgroup";
/// Controllers whose groups a script joins in version 1; the first that is there also tells which processes there are.
const JOINED: [&str; 3] = ["pids", "memory", "cpu"];
/// Period of processor shares, microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// How long killed processes may take to be gone, and a group to become free.
const PATIENCE: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(5);

/// What a task may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Thousandths of a processor.
    pub(super) cpu_milli: Option<u64>,
    pub(super) memory_mib: Option<u64>,
}

/// The machine's hierarchies.
#[derive(Debug, Clone)]
pub(super) enum Hierarchies {
    /// Version 2.
    One(PathBuf),
    /// Version 1: directories of controllers, without those that are links to others.
    Many(Vec<PathBuf>),
}

impl Hierarchies {
    /// Looks at what is mounted where every distribution mounts it.
    pub(super) fn find() -> Self {
        Self::find_at(Path::new(MOUNT))
    }

    fn find_at(mount: &Path) -> Self {
        if mount.join("cgroup.controllers").exists() {
            return Self::One(mount.to_path_buf());
        }
        let entries = fs::read_dir(mount).into_iter().flatten().flatten();
        let own = |entry: &fs::DirEntry| {
            entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.path().join("cgroup.procs").exists()
        };
        Self::Many(entries.filter(own).map(|entry| entry.path()).collect())
    }

    fn all(&self) -> &[PathBuf] {
        match self {
            Self::One(root) => std::slice::from_ref(root),
            Self::Many(roots) => roots,
        }
    }

    /// Where `controller` is. In version 1 the directory may be named after several: `cpu,cpuacct`.
    fn of(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::One(root) => Some(root),
            Self::Many(roots) => {
                let named = |root: &&PathBuf| {
                    let name = root.file_name().and_then(|name| name.to_str()).unwrap_or("");
                    name.split(',').any(|one| one == controller)
                };
                roots.iter().find(named).map(PathBuf::as_path)
            }
        }
    }

    fn joined(&self) -> Vec<&Path> {
        let found: BTreeSet<&Path> = JOINED.iter().filter_map(|controller| self.of(controller)).collect();
        found.into_iter().collect()
    }

    /// Makes the group `path` (relative, as in `sluice/batch-x/0`) with limits. An error: a limit cannot be set here.
    pub(super) fn create(&self, path: &Path, limits: Limits) -> Result<()> {
        for root in self.joined() {
            let dir = root.join(path);
            fs::create_dir_all(&dir)
                .with_context(|| format!("cannot make the control group {}", dir.display()))?;
        }
        let settings = self.settings(limits);
        if let (Self::One(root), false) = (self, settings.is_empty()) {
            delegate(root, path, &settings)?;
        }
        for (controller, file, value, needed) in settings {
            let root = self.of(controller).with_context(|| {
                format!("this machine has no control groups for {controller}, which computeResource needs")
            })?;
            let file = root.join(path).join(file);
            match fs::write(&file, &value) {
                // Swap is not counted where the kernel was told not to.
                Err(error) if !needed && error.kind() == io::ErrorKind::NotFound => {}
                written => written.with_context(|| format!("cannot write {value} to {}", file.display()))?,
            }
        }
        Ok(())
    }

    /// Controller, file, value, and whether it must be there.
    fn settings(&self, limits: Limits) -> Vec<(&'static str, &'static str, String, bool)> {
        let two = matches!(self, Self::One(_));
        let mut settings = Vec::new();
        if let Some(milli) = limits.cpu_milli {
            let quota = milli.saturating_mul(PERIOD_US / 1000).max(1000);
            if two {
                settings.push(("cpu", "cpu.max", format!("{quota} {PERIOD_US}"), true));
            } else {
                settings.push(("cpu", "cpu.cfs_period_us", PERIOD_US.to_string(), true));
                settings.push(("cpu", "cpu.cfs_quota_us", quota.to_string(), true));
            }
        }
        if let Some(mib) = limits.memory_mib {
            let bytes = mib.saturating_mul(1 << 20).to_string();
            if two {
                settings.push(("memory", "memory.max", bytes, true));
                settings.push(("memory", "memory.swap.max", "0".to_owned(), false));
            } else {
                settings.push(("memory", "memory.limit_in_bytes", bytes.clone(), true));
                settings.push(("memory", "memory.memsw.limit_in_bytes", bytes, false));
            }
        }
        settings
    }

    /// Makes the group `path`; the files that a process writes `0` to in order to join it.
    pub(super) fn entrances(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for root in self.joined() {
            let dir = root.join(path);
            fs::create_dir_all(&dir)
                .with_context(|| format!("cannot make the control group {}", dir.display()))?;
            files.push(dir.join("cgroup.procs"));
        }
        Ok(files)
    }

    /// Kills every process at and below `path`, and waits until they are gone. Blocks.
    pub(super) fn kill(&self, path: &Path) -> Result<()> {
        let Some(root) = JOINED.iter().find_map(|controller| self.of(controller)) else { return Ok(()) };
        let dir = root.join(path);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = processes(&dir)?;
            if left.is_empty() {
                return Ok(());
            }
            for pid in &left {
                match kill(*pid, Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => return Err(errno).with_context(|| format!("cannot kill process {pid}")),
                }
            }
            if Instant::now() > deadline {
                bail!("processes {left:?} of {} do not end", dir.display());
            }
            // Nothing tells of version 1 that a group became empty.
            std::thread::sleep(INTERVAL);
        }
    }

    /// Removes the group and all below it from every hierarchy; its processes are gone. Blocks.
    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for root in self.all() {
            let dir = root.join(path);
            loop {
                match remove_tree(&dir) {
                    Ok(()) => break,
                    // A process that ended a moment ago.
                    Err(error) if busy(&error) && Instant::now() < deadline => std::thread::sleep(INTERVAL),
                    Err(error) => {
                        return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Lets the groups on the way to `path` hand on the controllers that are needed (cgroup-v2(7), `cgroup.subtree_control`).
fn delegate(root: &Path, path: &Path, settings: &[(&str, &str, String, bool)]) -> Result<()> {
    let controllers: BTreeSet<&str> = settings.iter().map(|(controller, ..)| *controller).collect();
    let mut dir = root.to_path_buf();
    for part in path {
        let file = dir.join("cgroup.subtree_control");
        for controller in &controllers {
            fs::write(&file, format!("+{controller}"))
                .with_context(|| format!("cannot hand on `{controller}` by {}", file.display()))?;
        }
        dir.push(part);
    }
    Ok(())
}

fn busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EBUSY as i32)
}

/// Those at and below a group; none if it is not there.
fn processes(dir: &Path) -> Result<Vec<Pid>> {
    let read = |dir: &Path| match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => Ok(text),
        // ENODEV: it is removed at this moment.
        Err(error) if gone(&error) || error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read the processes of {}", dir.display())),
    };
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        found.extend(read(&dir)?.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
        dirs.extend(below(&dir)?);
    }
    Ok(found)
}

fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect()),
        Err(error) if gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot list {}", dir.display())),
    }
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// Groups are removed as directories that look full are: from below.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if gone(&error) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if gone(&error) => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_both_versions() {
        let limits = Limits { cpu_milli: Some(1500), memory_mib: Some(64) };
        let said = |groups: Hierarchies| -> Vec<String> {
            let settings = groups.settings(limits);
            settings.into_iter().map(|(_, file, value, _)| format!("{file}={value}")).collect()
        };
        assert_eq!(
            said(Hierarchies::One("/x".into())),
            ["cpu.max=150000 100000", "memory.max=67108864", "memory.swap.max=0"]
        );
        assert_eq!(
            said(Hierarchies::Many(Vec::new())),
            [
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=150000",
                "memory.limit_in_bytes=67108864",
                "memory.memsw.limit_in_bytes=67108864"
            ]
        );
        assert!(Hierarchies::One("/x".into()).settings(Limits::default()).is_empty());
    }

    #[test]
    fn version_1_directories_may_be_named_after_several_controllers() {
        let groups = Hierarchies::Many(vec!["/c/cpu,cpuacct".into(), "/c/memory".into()]);
        assert_eq!(groups.of("cpu"), Some(Path::new("/c/cpu,cpuacct")));
        assert_eq!(groups.of("pids"), None);
        assert_eq!(groups.joined().len(), 2);
    }

    #[test]
    fn a_group_is_joined_killed_and_removed() {
        let groups = Hierarchies::find();
        let task = PathBuf::from(format!("sluice/batch-unit-{}/0", std::process::id()));
        let group = task.join("1");
        groups.create(&task, Limits { cpu_milli: Some(500), memory_mib: Some(32) }).expect("made");
        let entrances = groups.entrances(&group).expect("made");
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        for file in &entrances {
            fs::write(file, sleeper.id().to_string()).expect("joined");
        }
        let memory = groups.of("memory").expect("there is one").join(&task);
        let file = ["memory.max", "memory.limit_in_bytes"].map(|name| memory.join(name));
        let limit = file.iter().find_map(|file| fs::read_to_string(file).ok()).expect("a limit");
        assert_eq!(limit.trim(), (32 << 20).to_string());
        // Waits for the process: it must be reaped meanwhile.
        let reaper = std::thread::spawn(move || sleeper.wait());
        groups.kill(&task).expect("killed");
        assert!(!reaper.join().expect("joined").expect("waited").success());
        groups.remove(task.parent().expect("a parent")).expect("removed");
        assert!(groups.all().iter().all(|root| !root.join(&task).exists()));
        groups.kill(&task).expect("nothing to kill");
        groups.remove(&task).expect("nothing to remove");
    }
}
