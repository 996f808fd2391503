//! The daemon's place taken by another version of the program: by `exec`, so that it stays the same process for whoever watches it, or
//! by the service manager if that holds the daemon's sockets.
//!
//! Images in use are left to the new one as `sluice stop` leaves them to the next daemon. It is asked before anything ends whether
//! it can follow: it must take this daemon's configuration, and understand the server of block files, which stays.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::has_inherited_sockets;
use crate::program;

/// The hidden command that asks a program whether it can follow.
const CHECK: &str = "can-follow";
/// What it answers if it can: programs that are not this one exist.
pub(crate) const CAN_FOLLOW: &str = "it can";
/// With this exit status the daemon wants the service manager to start the next one (`RestartForceExitStatus=` of the unit).
pub(crate) const RESTART: u8 = 75;
/// How long the answer may take.
const LONGEST_CHECK: Duration = Duration::from_secs(30);

/// The program that is to follow: `wanted`, or what stands in this one's place by now.
pub(super) async fn successor(wanted: Option<PathBuf>) -> Result<PathBuf> {
    let place = program::place()?;
    let program = wanted.unwrap_or_else(|| place.clone());
    if has_inherited_sockets() && program != place {
        bail!("the service manager starts {}: the new program belongs there", place.display());
    }
    let check = tokio::process::Command::new(&program)
        .args(own_arguments().map(|word| if word == "daemon" { CHECK.into() } else { word }))
        .arg(sluice_blockfs::PROTOCOL_VERSION.to_string())
        .kill_on_drop(true)
        .output();
    let said = tokio::time::timeout(LONGEST_CHECK, check).await;
    let said = said.with_context(|| format!("{} gives no answer", program.display()))?;
    let said = said.with_context(|| format!("cannot run {}", program.display()))?;
    if !said.status.success() || said.stdout.trim_ascii() != CAN_FOLLOW.as_bytes() {
        let reason = String::from_utf8_lossy(&said.stderr);
        let reason = reason.trim().trim_start_matches("sluice: ");
        let reason = if reason.is_empty() { "it is another program" } else { reason };
        bail!("{} cannot follow: {reason}", program.display());
    }
    Ok(program)
}

/// Becomes the program, or ends for the service manager to start it. Returns only if it cannot.
pub(crate) fn become_successor(program: &Path) -> Result<std::convert::Infallible> {
    if has_inherited_sockets() {
        std::process::exit(i32::from(RESTART));
    }
    Err(std::process::Command::new(program).args(own_arguments()).exec())
        .with_context(|| format!("cannot become {}", program.display()))
}

/// Without the announcement: whoever waited for it has heard it.
pub(crate) fn own_arguments() -> impl Iterator<Item = OsString> {
    std::env::args_os().skip(1).filter(|argument| argument != "--announce")
}
