//! Calls that failed in containers, as probes see them: what is a known fault of the kernel is reported.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use sluice_probes::{Event, mount_namespace_of, processes};
use sluice_trace::{FailedCall, Process, What};

use super::Node;
use crate::doctor::fault;
use crate::journal::Reason;

/// The same call on the same path is not reported again for so long.
const AGAIN: Duration = Duration::from_secs(600);
/// Reports per [`AGAIN`] at most: one says what to do.
const MOST: usize = 100;

/// What was reported, and when.
#[derive(Debug)]
pub(super) struct Reported {
    calls: Mutex<HashMap<(u32, Vec<u8>), Instant>>,
    /// Whether this kernel has the fault, as far as it could be tried.
    has_fault: Option<bool>,
}

impl Reported {
    pub(super) fn new(has_fault: Option<bool>) -> Self {
        Self { calls: Mutex::default(), has_fault }
    }
}

impl Node {
    /// Reports a call that failed if it is the fault of renamed symbolic links. May look through `/proc`.
    pub(super) fn report_failed_call(&self, event: &Event) {
        let What::Failed(call) = &event.record.what else { return };
        let process = &event.record.process;
        tracing::debug!(?call, ?process, "a call failed");
        if !is_the_fault(call) || !self.is_new(process.mnt_ns, &call.path) {
            return;
        }
        let container = Container::of(process, call.dev);
        let image = self.image_on(&container.lower);
        let message = describe(call, process, &container, self.faults.has_fault);
        self.journal.emit(Reason::RenameFault, image.as_deref().unwrap_or("-"), message);
    }

    fn is_new(&self, mnt_ns: u32, path: &[u8]) -> bool {
        let mut reported = self.lock(&self.faults.calls);
        reported.retain(|_, when| when.elapsed() < AGAIN);
        if reported.len() >= MOST {
            return false;
        }
        reported.insert((mnt_ns, path.to_vec()), Instant::now()).is_none()
    }

    /// The image whose mount is a lower directory.
    fn image_on(&self, lower: &str) -> Option<String> {
        let images = self.lock(&self.images);
        let on = |dir: &PathBuf| dir.to_str().is_some_and(|dir| lower.contains(dir));
        images.values().find(|image| image.lower_dirs.iter().any(on)).map(|image| image.reference.clone())
    }
}

/// Nothing else lets these calls fail with ENXIO on a symbolic link. What could not be looked at any more counts too.
fn is_the_fault(call: &FailedCall) -> bool {
    call.errno == Errno::ENXIO as u32 && call.on_symlink() != Some(false)
}

/// Where a call failed, as far as its mount namespace can still be seen.
#[derive(Debug, Default)]
struct Container {
    /// The end of its control group's path, which runtimes name after the container.
    name: Option<String>,
    /// Options of the overlay: its directories.
    lower: String,
}

impl Container {
    fn of(process: &Process, dev: u32) -> Self {
        let inside = |pid: &u32| mount_namespace_of(*pid) == Some(process.mnt_ns);
        let Some(pid) = Some(process.tgid).filter(inside).or_else(|| processes().find(inside)) else {
            return Self::default();
        };
        // What is gone is left out of the report.
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let paths = text.lines().filter_map(|line| line.rsplit('/').next());
        let name = paths.filter(|name| !name.is_empty()).max_by_key(|name| name.len()).map(str::to_owned);
        let mounts = std::fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let mounts = sluice_kernel::mountinfo::parse(&mounts).unwrap_or_default();
        let overlay = mounts.iter().find(|mount| mount.device.0 << 20 | mount.device.1 == dev);
        let options = overlay.map(|mount| String::from_utf8_lossy(&mount.super_options).into_owned());
        Self { name, lower: options.unwrap_or_default() }
    }
}

/// A kernel's number tells little: Debian calls its 6.1.176 6.1.0-50.
fn describe(call: &FailedCall, process: &Process, container: &Container, has_fault: Option<bool>) -> String {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_else(|errno| format!("unknown ({errno})"));
    let whole = if call.whole_path { "/" } else { "…" };
    let path = String::from_utf8_lossy(&call.path);
    let namespace = format!("mount namespace {}", process.mnt_ns);
    let name = container.name.as_ref().map_or(namespace, |name| format!("container {name}"));
    let cause = match has_fault.or(fault::is_affected(&release)) {
        Some(false) => format!(
            "this kernel ({release}) has the fix of that fault: the file system below the overlay answered ENXIO by itself, so look there"
        ),
        _ => format!(
            "Linux {release} fails to copy symbolic links up from lower directories on FUSE or NFS (bug 217850, in {}); \
             it is mended in {}: update the kernel, or keep such file systems from below overlays (what Sluice streams is on EROFS)",
            fault::AFFECTED_TEXT,
            fault::FIXED_TEXT
        ),
    };
    format!(
        "{} of symbolic link {whole}{path} failed with ENXIO in {name}, by {} (pid {}): {cause}",
        call.call.name(),
        process.comm,
        process.tgid
    )
}

#[cfg(test)]
mod tests {
    use sluice_trace::Call;

    use super::*;

    fn call(errno: u32, mode: Option<u16>) -> FailedCall {
        FailedCall {
            call: Call::Renameat2,
            errno,
            flags: 0,
            path: b"usr/lib/libz.so".to_vec(),
            whole_path: true,
            new_path: b"x".to_vec(),
            dev: 5,
            magic: 0x794C_7630,
            inode: None,
            mode,
        }
    }

    #[test]
    fn only_the_fault_is_one() {
        assert!(is_the_fault(&call(6, Some(0o120_777))));
        assert!(is_the_fault(&call(6, None)));
        assert!(!is_the_fault(&call(6, Some(0o100_644))));
        assert!(!is_the_fault(&call(2, Some(0o120_777))));
    }

    #[test]
    fn a_report_says_who_what_and_where() {
        let process = Process { tgid: 7, comm: "mv".to_owned(), mnt_ns: 9, ..Process::default() };
        let container = Container { name: Some("web-1".to_owned()), lower: String::new() };
        let said = describe(&call(6, None), &process, &container, Some(true));
        for part in ["renameat2", "/usr/lib/libz.so", "ENXIO", "container web-1", "mv (pid 7)"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(said.contains("bug 217850"), "{said}");
        let healthy = describe(&call(6, None), &process, &container, Some(false));
        assert!(
            healthy.contains("has the fix of that fault"),
            "what was tried counts, not the number: {healthy}"
        );
    }
}
