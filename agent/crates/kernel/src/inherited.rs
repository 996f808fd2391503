//! Descriptors that a service manager hands to the process it starts (sd_listen_fds(3)): from 3 on, so many of them.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;

/// Takes them over, once in a process: a second call gives none. Children do not inherit them.
pub fn take(count: u16) -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    (FIRST..FIRST + RawFd::from(count)).map(own).collect()
}

fn own(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes no pointers; a number that is no open descriptor gives EBADF.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as fcntl said; the service manager made it for us to own, and `take` runs once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
