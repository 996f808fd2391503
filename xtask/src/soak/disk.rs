//! The node's disk: ext4 on a loop device over a file that a process of ours serves, so that it can be slow and fail.

pub(crate) mod server;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use self::server::{DiskFaults, FILE_NAME, Failed};
use super::lock;
use crate::run::script;

/// See the module text. Dropped without [`Disk::end`] its server clears everything away.
#[derive(Debug)]
pub(crate) struct Disk {
    server: Child,
    talk: Mutex<Option<Talk>>,
    at: PathBuf,
    fuse: PathBuf,
}

#[derive(Debug)]
struct Talk {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Talk {
    fn answer(&mut self) -> Result<Failed> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        serde_json::from_str(&line).context("the disk's server does not answer")
    }
}

impl Disk {
    /// Makes it in `room` and mounts it at `at`.
    pub(crate) fn make(room: &Path, at: &Path, mib: u64) -> Result<Self> {
        let (image, fuse) = (room.join("disk.img"), room.join("fuse"));
        std::fs::create_dir_all(&fuse)?;
        // Journal, tables and bitmaps at the beginning, away from contents.
        script(
            &format!("truncate -s {mib}M \"$1\"; mkfs.ext4 -q -E nodiscard,packed_meta_blocks=1 \"$1\""),
            &[&image],
        )?;
        let mut server = Command::new(std::env::current_exe()?)
            .arg("soak-disk")
            .args([&image, &fuse])
            .arg(room)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What ends the soak from the keyboard must not end the disk under it first.
            .process_group(0)
            .spawn()
            .context("cannot start the disk's server")?;
        let (to, from) =
            (server.stdin.take().context("no input")?, server.stdout.take().context("no output")?);
        let mut talk = Talk { to, from: BufReader::new(from) };
        talk.answer()?;
        let disk = Self { server, talk: Mutex::new(Some(talk)), at: at.to_path_buf(), fuse };
        // Direct I/O: what the page cache had of the file would hide the faults. No merging: a request is of contents or of the
        // file system, not of both.
        script(
            "device=$(losetup --find --show --direct-io=on \"$1\"); echo 2 > /sys/block/\"${device#/dev/}\"/queue/nomerges
             mount \"$device\" \"$2\"; losetup --detach \"$device\"",
            &[&disk.fuse.join(FILE_NAME), at],
        )
        .context("cannot mount the disk")?;
        Ok(disk)
    }

    /// From now on; what failed before.
    pub(crate) fn faults(&self, faults: DiskFaults) -> Result<Failed> {
        let mut talk = lock(&self.talk);
        let talk = talk.as_mut().context("the disk is gone")?;
        writeln!(talk.to, "{}", serde_json::to_string(&faults)?)?;
        talk.answer()
    }

    /// Kills the server: all that waits for the disk fails at once.
    pub(crate) fn abort(&self) {
        // Its input ends; it aborts the connection.
        *lock(&self.talk) = None;
    }

    /// Unmounts it in good order; an error if somebody still has it.
    pub(crate) fn end(mut self) -> Result<()> {
        script("umount \"$1\"", &[&self.at])?;
        self.abort();
        let status = self.server.wait()?;
        if !status.success() {
            bail!("the disk's server ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.abort();
        if let Err(error) = self.server.wait() {
            eprintln!("cannot wait for the disk's server: {error}");
        }
    }
}

/// Kills what of a node runs in `room`: nobody else ends daemons whose soak is gone.
fn end_processes(room: &Path) {
    for pid in super::watch::processes(&room.join("state").to_string_lossy()) {
        if let Err(error) = Command::new("kill").args(["-9", &pid]).status() {
            eprintln!("cannot kill {pid}: {error}");
        }
    }
}
