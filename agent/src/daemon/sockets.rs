//! Sockets that systemd listens on for the daemon (`sluice.socket`, sd_listen_fds(3)): they outlive it, so that whoever connects
//! while no daemon runs waits for the next one instead of being refused.

use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};

/// Whether the service manager listens for this process.
pub(crate) fn are_inherited() -> bool {
    number("LISTEN_PID") == Some(std::process::id())
}

fn number(name: &str) -> Option<u32> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// See the module text. Empty without systemd.
#[derive(Debug)]
pub(super) struct Inherited(Vec<UnixListener>);

impl Inherited {
    /// Takes what the environment speaks of, if it speaks of this process.
    pub(super) fn take() -> Result<Self> {
        if !are_inherited() {
            return Ok(Self(Vec::new()));
        }
        let count = u16::try_from(number("LISTEN_FDS").unwrap_or(0)).context("LISTEN_FDS")?;
        let taken = sluice_kernel::inherited::take(count).context("cannot take over systemd's sockets")?;
        Ok(Self(taken.into_iter().map(UnixListener::from).collect()))
    }

    /// The socket at `path`, not blocking.
    pub(super) fn get(&self, path: &Path) -> Result<Option<UnixListener>> {
        let here =
            |one: &&UnixListener| one.local_addr().is_ok_and(|address| address.as_pathname() == Some(path));
        let found = self.0.iter().find(here).map(UnixListener::try_clone).transpose();
        let found = found.with_context(|| format!("cannot use systemd's socket {}", path.display()))?;
        if let Some(listener) = &found {
            listener.set_nonblocking(true)?;
        }
        Ok(found)
    }
}
