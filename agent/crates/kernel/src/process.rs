//! Processes: descriptors for them, orphans, dying with the parent, and the heap and the clock of this one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// A descriptor that becomes readable when `pid` ends (Linux 5.3). `ESRCH`: no such process.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two numbers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_range| Errno::EBADF)?;
    // SAFETY: the kernel just returned this descriptor to us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks until the process ended, at most `timeout` (for ever if none); says whether it did.
pub fn wait_for_end(pidfd: &OwnedFd, timeout: Option<Duration>) -> Result<bool, Errno> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map_or(PollTimeout::NONE, |left| left.try_into().unwrap_or(PollTimeout::MAX));
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], left) {
            Err(Errno::EINTR) => {}
            ended => return ended.map(|ended| ended > 0),
        }
    }
}

/// Sends a signal through a pidfd: cannot hit a process that took the number over.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: Signal) -> Result<(), Errno> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open; a null siginfo means the one that kill(2) sends.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, info, 0) };
    Errno::result(result).map(drop)
}

/// Orphaned descendants become children of this process instead of init's (Linux 3.4).
pub fn become_subreaper() -> Result<(), Errno> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// This process gets `signal` when the thread that made it ends. May be called between fork and exec.
pub fn die_with_parent(signal: Signal) -> Result<(), Errno> {
    nix::sys::prctl::set_pdeathsig(Some(signal))
}

/// Copies of this process's descriptors whose numbers, and names in `/proc` (`anon_inode:[perf_event]`, say), satisfy `wanted`.
pub fn copy_descriptors(mut wanted: impl FnMut(RawFd, &str) -> bool) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        let name = std::fs::read_link(entry.path()).ok();
        let (Some(number), Some(name)) = (number, name) else { continue };
        if name.to_str().is_some_and(|name| wanted(number, name)) {
            found.push(number);
        }
    }
    // Only now: the directory would show the copies too.
    let mut copies = Vec::with_capacity(found.len());
    for number in found {
        // SAFETY: F_DUPFD_CLOEXEC takes no pointers; a number that was closed meanwhile gives EBADF.
        match Errno::result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) }) {
            // SAFETY: the kernel just returned this descriptor to us and nobody else owns it.
            Ok(copy) => copies.push(unsafe { OwnedFd::from_raw_fd(copy) }),
            Err(Errno::EBADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(copies)
}

/// Gives all freed memory back now, holes within the heap too (malloc_trim(3)): after work that took much and is not done again.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes a number and locks the heap's own state.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds: what `Instant` counts, and what eBPF programs stamp their records with.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to the structure, which is ours. It cannot fail with this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanoseconds.unwrap_or(0))
}

/// Keeps freed memory from staying with the process for long: few arenas, and blocks from 1 MiB on given back at once (mallopt(3)); the rest
/// by [`trim_heap`] now and then. Buffers come and go by hundreds of KiB: given back each time, their pages cost a start some hundredths of
/// its time; glibc would raise the limit by itself and keep tens of MiB of holes.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 4), (libc::M_MMAP_THRESHOLD, 1 << 20), (libc::M_TRIM_THRESHOLD, 8 << 20)]
    {
        // SAFETY: mallopt takes two numbers and locks the heap's own state.
        unsafe { libc::mallopt(parameter, value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pidfd_kills_its_process_and_no_other() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("pid"));
        let pidfd = pidfd_open(pid).expect("pidfd");
        pidfd_send_signal(&pidfd, Signal::SIGKILL).expect("sent");
        assert!(!child.wait().expect("waited").success());
        assert_eq!(pidfd_send_signal(&pidfd, Signal::SIGKILL), Err(Errno::ESRCH));
        assert_eq!(pidfd_open(pid).map(drop), Err(Errno::ESRCH));
    }

    #[test]
    fn each_descriptor_is_copied_once() {
        use nix::unistd::{pipe, write};
        let (reader, writer) = pipe().expect("a pipe");
        // So many that copies make the kernel enlarge the table of descriptors: only those in the new part would be seen.
        let writers: Vec<OwnedFd> = (0..300).map(|_| writer.try_clone().expect("a copy")).collect();
        let numbers: std::collections::HashSet<RawFd> = writers.iter().map(AsRawFd::as_raw_fd).collect();
        let name = std::fs::read_link(format!("/proc/self/fd/{}", writer.as_raw_fd())).expect("a name");
        let wanted = |number, found: &str| Some(found) == name.to_str() && number != reader.as_raw_fd();
        let copies = copy_descriptors(wanted).expect("copied");
        assert_eq!(copies.len(), numbers.len() + 1);
        assert!(copies.iter().all(|copy| !numbers.contains(&copy.as_raw_fd())));
        assert_eq!(
            copies.iter().map(|copy| write(copy, b"1").expect("written")).sum::<usize>(),
            copies.len()
        );
    }
}
