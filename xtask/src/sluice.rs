//! The `sluice` binary, built and driven as a user does.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{output, show, target, top};

/// Builds the release binary; its path.
pub(crate) fn build() -> Result<PathBuf> {
    crate::ebpf::build()?;
    show(
        Command::new("cargo")
            .args(["build", "--release", "--quiet", "--package", "sluice"])
            .current_dir(top()),
    )?;
    Ok(target().join("release/sluice"))
}

/// Builds the binary that tests use; its path.
pub(crate) fn build_for_tests() -> Result<PathBuf> {
    show(Command::new("cargo").args(["build", "--quiet", "--package", "sluice"]).current_dir(top()))?;
    Ok(target().join("debug/sluice"))
}

/// `sluice` with a store and a state directory of its own. Its daemon is stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct Sluice {
    binary: PathBuf,
    dir: PathBuf,
}

impl Sluice {
    /// `config` is the configuration file's text.
    pub(crate) fn new(binary: &Path, dir: &Path, config: &str) -> Result<Self> {
        let this = Self { binary: binary.to_path_buf(), dir: dir.to_path_buf() };
        this.forget()?;
        std::fs::create_dir_all(dir)?;
        // Only we can push to the registries of benchmarks and trials.
        std::fs::write(dir.join("config.toml"), format!("{config}\n[trust]\nmode = \"any\"\n"))?;
        Ok(this)
    }

    /// The binary with its directories, for a command.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(self.dir.join("root"))
            .arg("--state")
            .arg(self.dir.join("state"))
            .arg("--config")
            .arg(self.dir.join("config.toml"));
        command
    }

    /// Runs a command; what it wrote.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        output(self.command().args(arguments))
    }

    /// The daemon's status.
    pub(crate) fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&["status", "--json"])?)?)
    }

    /// Starts the daemon, as it is on a node before an image is asked for.
    pub(crate) fn start_daemon(&self) -> Result<()> {
        self.run(&["gc"]).map(|_| ())
    }

    /// Stops the daemon and removes everything.
    pub(crate) fn forget(&self) -> Result<()> {
        if self.dir.join("config.toml").exists() {
            self.run(&["node", "drain"])?;
        }
        // The daemon answers before it ends: its lock says when it is gone.
        let lock = self.dir.join("root/lock");
        if lock.exists() {
            std::fs::File::open(&lock)?.lock().context("cannot wait for the daemon")?;
        }
        for name in ["root", "state"] {
            let path = self.dir.join(name);
            if path.exists() {
                std::fs::remove_dir_all(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        if let Err(error) = self.forget() {
            eprintln!("cannot clean up {}: {error:#}", self.dir.display());
        }
    }
}

/// The embedded registry. Stopped when dropped.
#[derive(Debug)]
pub(crate) struct Registry {
    /// How it is started, but for where it listens.
    command: Vec<OsString>,
    child: Mutex<Child>,
    address: String,
}

impl Registry {
    /// Serves `root` through a link, e.g. `1gbit`, `2ms`.
    pub(crate) fn start(binary: &Path, root: &Path, rate: &str, delay: &str) -> Result<Self> {
        let words: [&OsStr; 7] = [
            binary.as_ref(),
            "registry".as_ref(),
            root.as_ref(),
            "--rate".as_ref(),
            rate.as_ref(),
            "--delay".as_ref(),
            delay.as_ref(),
        ];
        let command: Vec<OsString> = words.iter().map(|word| (*word).to_owned()).collect();
        let (child, address) = serve(&command, "127.0.0.1:0")?;
        Ok(Self { command, child: Mutex::new(child), address })
    }

    /// Kills it and starts it again after a while, where it was.
    pub(crate) fn outage(&self, duration: Duration) -> Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.kill()?;
        child.wait()?;
        std::thread::sleep(duration);
        *child = serve(&self.command, &self.address)?.0;
        Ok(())
    }

    /// A reference to an image of it.
    pub(crate) fn image(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.address)
    }

    /// Bytes of bodies sent since the last reset.
    pub(crate) fn bytes_sent(&self) -> Result<u64> {
        let stats: Value = serde_json::from_str(&self.control("GET", "stats", "")?)?;
        stats
            .get("bytes_sent")
            .and_then(Value::as_u64)
            .context("the registry's statistics are not understood")
    }

    /// Sets its counters to zero.
    pub(crate) fn reset(&self) -> Result<()> {
        self.control("POST", "reset", "").map(|_| ())
    }

    /// Faults from now on; `{}` ends them.
    pub(crate) fn faults(&self, faults: &Value) -> Result<()> {
        self.control("POST", "faults", &faults.to_string()).map(|_| ())
    }

    /// One small HTTP request, by hand: nothing else here needs a client.
    fn control(&self, method: &str, path: &str, body: &str) -> Result<String> {
        use std::io::{Read, Write};
        let mut socket = std::net::TcpStream::connect(&self.address)?;
        write!(
            socket,
            "{method} /_sluice/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        if !head.starts_with("HTTP/1.1 2") {
            bail!("the registry refuses {path}: {answer}");
        }
        Ok(body.to_owned())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = child.kill().and_then(|()| child.wait()) {
            eprintln!("cannot stop the registry: {error}");
        }
    }
}

fn serve(command: &[OsString], listen: &str) -> Result<(Child, String)> {
    let (program, arguments) = command.split_first().context("no program")?;
    let mut child = Command::new(program)
        .args(arguments)
        .args(["--listen", listen])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the registry")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let address = line.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    Ok((child, address))
}
