//! The server of block files as a process of its own: found, or started.
//!
//! It is this binary again (`sluice block-server`), in a session of its own, so that what ends the agent does not end it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sluice_blockfs::{BlockFs, BlockFsError};
use tokio::runtime::Handle;

use super::recover::{private, unmount_below};
use crate::config::Config;

/// Its socket.
pub(crate) fn socket(config: &Config) -> PathBuf {
    config.state.join("blocks.sock")
}

/// Connects to the server that there is, mounted on `dir`, or starts one and says so. Blocks the thread.
pub(super) fn connect(config: &Config, dir: &Path, runtime: Handle) -> Result<(BlockFs, bool)> {
    match BlockFs::connect(dir, &socket(config), runtime.clone()) {
        Ok(blockfs) => return Ok((blockfs, false)),
        Err(BlockFsError::Server { source, .. })
            if matches!(
                source.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
            ) => {}
        Err(error) => return Err(error.into()),
    }
    // A dead FUSE mount answers even `stat` with an error: it goes first.
    unmount_below(dir, &[])?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    private(dir)?;
    start(config)?;
    Ok((BlockFs::connect(dir, &socket(config), runtime)?, true))
}

/// Starts a server and waits until it is ready.
fn start(config: &Config) -> Result<()> {
    let log_path = config.state.join("blocks.log");
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("cannot open {}", log_path.display()))?;
    let mut command = Command::new(crate::program::own()?);
    if let Some(file) = &config.file {
        command.arg("--config").arg(file);
    }
    let mut server = command
        .args(["--log-format", config.log_format.name(), "block-server"])
        .args([Path::new("--root"), &config.root, Path::new("--state"), &config.state])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/")
        .process_group(0)
        .spawn()
        .context("cannot start the server of block files")?;
    let mut line = String::new();
    if let Some(stdout) = server.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot hear from the server of block files")?;
    }
    if line.trim() != "ready" {
        let log = std::fs::read_to_string(&log_path).unwrap_or_default();
        bail!("the server of block files did not start: {}", log.lines().last().unwrap_or("it wrote no log"));
    }
    // Its end is of no interest to this process, but the kernel wants to tell somebody.
    std::thread::spawn(move || server.wait());
    Ok(())
}
