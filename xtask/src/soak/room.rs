//! Where a soak runs: a mount namespace of its own, with its own `/etc/hosts` and no name server.
//!
//! What it mounts is seen by nobody else and goes with its last process; names go away without the machine noticing.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::script;

/// The registry's name.
pub(crate) const HOST: &str = "registry.soak.internal";

/// Becomes the same command in a namespace of its own; gives only errors back.
pub(crate) fn enter() -> Result<()> {
    let error = Command::new("unshare")
        .args(["--mount", "--propagation", "slave", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .exec();
    Err(error).context("cannot start unshare")
}

/// Gives up what others of the machine have mounted, which would stay in use as long as we run, and takes the names over.
pub(crate) fn furnish(dir: &Path) -> Result<()> {
    script(
        "awk '$2 != \"/\" && ($1 ~ /^\\/dev\\/loop/ || $3 ~ /^(erofs|overlay|fuse.*)$/) { print $2 }' /proc/self/mounts | tac | while read -r at; do
             case \"$1/\" in \"$at\"/*) ;; *) umount -l \"$at\" || : ;; esac
         done
         echo 'nameserver 127.0.0.1
         options attempts:1 timeout:1' > \"$1/resolv.conf\"
         : > \"$1/hosts\"
         [ -n \"$(ls /sys/fs/fuse/connections)\" ] || mount -t fusectl fusectl /sys/fs/fuse/connections
         for name in hosts resolv.conf; do mount --bind \"$1/$name\" \"/etc/$name\"; done",
        &[dir],
    )
    .context("cannot make a place for the soak")?;
    names(dir, true)
}

/// Whether the registry's name has an address from now on.
pub(crate) fn names(dir: &Path, known: bool) -> Result<()> {
    let registry = if known { format!("127.0.0.1 {HOST}\n") } else { String::new() };
    // In place: it is the file that is bound.
    Ok(std::fs::write(dir.join("hosts"), format!("127.0.0.1 localhost\n{registry}"))?)
}
