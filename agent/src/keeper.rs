//! Daemons that no service manager has: started by the command that needs one first, and again when they die.
//!
//! The keeper (`sluice keep-daemon`) does nothing but wait for its daemon's end. One that was told to stop ends with it; one that
//! was killed, or failed, is followed by the next, for which reads of what is not local wait.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::Global;
use crate::config::Config;

/// The hidden command.
const COMMAND: &str = "keep-daemon";
/// Before the next daemon is started; twice as long after each that did not get ready.
const PAUSE: Duration = Duration::from_millis(50);
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
    let mut command = Command::new(std::env::current_exe().context("cannot find the sluice binary")?);
    command.arg(COMMAND).arg("--root").arg(&config.root).arg("--state").arg(&config.state);
    if let Some(path) = &global.config {
        let path = std::path::absolute(path).context("cannot tell where the configuration is")?;
        command.arg("--config").arg(path);
    }
    for host in &global.plain_http {
        command.arg(format!("--plain-http={host}"));
    }
    for _ in 0..global.verbose {
        command.arg("--verbose");
    }
    command.stderr(log).current_dir("/").process_group(0);
    let (_keeper, ready) = spawn(&mut command)?;
    if !ready {
        let tail = std::fs::read_to_string(&log_path).unwrap_or_default();
        let reason = tail.lines().last().unwrap_or("it wrote no log");
        bail!("the daemon did not start: {reason} (log: {})", log_path.display());
    }
    Ok(())
}

/// Starts the daemon, with this process's arguments, again and again until one ends as it was told to.
pub(crate) fn keep(config: &Config) -> Result<ExitCode> {
    let binary = std::env::current_exe().context("cannot find the sluice binary")?;
    let arguments =
        std::env::args_os().skip(1).map(|word| if word == COMMAND { "daemon".into() } else { word });
    let mut command = Command::new(binary);
    command.args(arguments).arg("--announce");
    // Who started this process has the turn.
    let (mut daemon, ready) = spawn(&mut command)?;
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
        let (next, ready) = spawn(&mut command)?;
        daemon = next;
        failures = if ready { 0 } else { failures + 1 };
        if failures == FAILURES {
            bail!("{FAILURES} daemons in a row did not get ready: {}", daemon.wait()?);
        }
    }
}

/// Whoever starts a daemon does it alone, and finds the one that another has started.
fn turn(config: &Config) -> Result<File> {
    let path = config.state.join("daemon.starting");
    let lock = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

fn is_there(config: &Config) -> bool {
    UnixStream::connect(config.socket()).is_ok()
}

/// Starts it and waits until it says that it is ready, or ends; whether it is.
fn spawn(command: &mut Command) -> Result<(Child, bool)> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = child.context("cannot start the daemon")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot hear from the daemon")?;
    }
    Ok((child, line.trim() == "ready"))
}
