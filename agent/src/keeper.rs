//! Daemons that no service manager has: started by the command that needs one first, and again when they die.
//!
//! The keeper (`sluice keep-daemon`) does nothing but wait for its daemon's end. One that was told to stop ends with it; one that
//! was killed, or failed, is followed by the next, for which reads of what is not local wait. As long as it lives it holds a lock, by
//! which others know that a daemon is about to come.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::Global;
use crate::config::Config;

/// The hidden command.
const COMMAND: &str = "keep-daemon";
/// Before the next daemon is started; twice as long after each that did not get ready.
const PAUSE: Duration = Duration::from_millis(50);
/// A daemon that is not ready after this time is not waited for any more. It may wait for the end of the one before.
pub(crate) const LONGEST_START: Duration = Duration::from_secs(60);
/// How much longer its keeper is waited for, which says how it ended.
const LAST_WORD: Duration = Duration::from_secs(10);
/// How often a lock that another has is tried.
const INTERVAL: Duration = Duration::from_millis(20);
/// Locked by who starts a daemon.
const STARTING: &str = "daemon.starting";
/// Locked by keepers, which may be several for a moment.
const KEPT: &str = "daemon.kept";
/// So many in a row that did not get ready are enough.
const FAILURES: u32 = 8;

/// Starts a daemon with its keeper, in a session of their own, and waits until its socket is open.
pub(crate) fn start(config: &Config, global: &Global) -> Result<()> {
    std::fs::create_dir_all(&config.state)
        .with_context(|| format!("cannot create the state directory {}", config.state.display()))?;
    let _turn = turn(config)?;
    if is_there(config) {
        return Ok(());
    }
    let log_path = config.state.join("daemon.log");
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("cannot open the daemon's log {}", log_path.display()))?;
    let mut command = Command::new(crate::program::own()?);
    command.arg(COMMAND).arg("--root").arg(&config.root).arg("--state").arg(&config.state);
    if let Some(path) = &global.config {
        let path = std::path::absolute(path).context("cannot tell where the configuration is")?;
        command.arg("--config").arg(path);
    }
    for host in &global.plain_http {
        command.arg(format!("--plain-http={host}"));
    }
    if let Some(format) = global.log_format {
        command.args(["--log-format", format.name()]);
    }
    for _ in 0..global.verbose {
        command.arg("--verbose");
    }
    command.stderr(log).current_dir("/").process_group(0);
    let (_keeper, ready) = spawn(&mut command, LONGEST_START + LAST_WORD)?;
    if !ready {
        let tail = std::fs::read_to_string(&log_path).unwrap_or_default();
        let reason = tail.lines().last().unwrap_or("it wrote no log");
        bail!("the daemon did not start: {reason} (log: {})", log_path.display());
    }
    Ok(())
}

/// Starts the daemon, with this process's arguments, again and again until one ends as it was told to.
pub(crate) fn keep(config: &Config) -> Result<ExitCode> {
    let binary = crate::program::place()?;
    let arguments =
        std::env::args_os().skip(1).map(|word| if word == COMMAND { "daemon".into() } else { word });
    let mut command = Command::new(binary);
    command.args(arguments).arg("--announce");
    // Who started this process has the turn.
    let _kept = keeping(config)?;
    let (mut daemon, ready) = spawn(&mut command, LONGEST_START)?;
    if !ready {
        // It said why.
        let code = daemon.wait()?.code().and_then(|code| u8::try_from(code).ok());
        return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
    }
    let mut stdout = std::io::stdout();
    if let Err(error) = writeln!(stdout, "ready").and_then(|()| stdout.flush()) {
        // Who needed it first was interrupted: others will.
        tracing::debug!(%error, "nobody listens to the announcement");
    }
    let mut failures = 0;
    loop {
        let status = daemon.wait().context("cannot wait for the daemon")?;
        if status.success() {
            return Ok(ExitCode::SUCCESS);
        }
        tracing::error!(%status, "the daemon died: the next one is started");
        std::thread::sleep(PAUSE * 2_u32.pow(failures));
        let _turn = turn(config)?;
        if is_there(config) {
            // Somebody needed it earlier; it has its own keeper.
            return Ok(ExitCode::SUCCESS);
        }
        let (next, ready) = spawn(&mut command, LONGEST_START)?;
        daemon = next;
        failures = if ready { 0 } else { failures + 1 };
        if failures == FAILURES {
            bail!("{FAILURES} daemons in a row did not get ready: {}", daemon.wait()?);
        }
    }
}

/// Whether somebody starts a daemon, or will do so if the one that was there died.
pub(crate) fn is_at_work(config: &Config) -> bool {
    let held = |name, lock: fn(&File) -> Result<(), TryLockError>| {
        let file = File::open(config.state.join(name));
        file.is_ok_and(|file| matches!(lock(&file), Err(TryLockError::WouldBlock)))
    };
    held(STARTING, File::try_lock_shared) || held(KEPT, File::try_lock)
}

/// Held by a keeper as long as it lives.
fn keeping(config: &Config) -> Result<File> {
    let (path, lock) = open_lock(config, KEPT)?;
    lock.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

/// Whoever starts a daemon does it alone, and finds the one that another has started.
fn turn(config: &Config) -> Result<File> {
    let (path, lock) = open_lock(config, STARTING)?;
    let deadline = Instant::now() + LONGEST_START + LAST_WORD;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(INTERVAL),
            Err(TryLockError::WouldBlock) => bail!("another command starts a daemon and does not get on"),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
    }
}

fn open_lock(config: &Config, name: &str) -> Result<(PathBuf, File)> {
    let path = config.state.join(name);
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok((path, file))
}

fn is_there(config: &Config) -> bool {
    UnixStream::connect(config.socket()).is_ok()
}

/// Starts it and waits until it says that it is ready, or ends; whether it is. One that does neither within `limit` is ended.
fn spawn(command: &mut Command, limit: Duration) -> Result<(Child, bool)> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = child.context("cannot start the daemon")?;
    let stdout = child.stdout.take().context("the daemon has no voice")?;
    let ready = match first_line(stdout, limit)? {
        Some(line) => line.trim() == "ready",
        None => {
            tracing::error!(pid = child.id(), "the daemon does not get ready: it is ended");
            child.kill().context("cannot end a daemon that does not get ready")?;
            false
        }
    };
    Ok((child, ready))
}

/// What a process says first; nothing if it says nothing for so long.
fn first_line(stdout: ChildStdout, limit: Duration) -> Result<Option<String>> {
    let (sender, heard) = channel();
    let listen = move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line).map(|_| line);
        // Nobody waits any more.
        drop(sender.send(read));
    };
    std::thread::Builder::new().name("ready".to_owned()).spawn(listen).context("cannot start a thread")?;
    let heard = heard.recv_timeout(limit).ok().transpose();
    heard.context("cannot hear from the daemon")
}
