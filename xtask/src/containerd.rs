//! A private containerd: the full pull to compare with.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::output;

/// A running containerd with a root, state and socket of its own. Stopped when dropped.
#[derive(Debug)]
pub(crate) struct Containerd {
    child: Child,
    socket: PathBuf,
}

impl Containerd {
    /// Starts one under `dir`.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let socket = dir.join("containerd.sock");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            dir.join("root"),
            dir.join("state"),
            socket
        );
        let config_path = dir.join("config.toml");
        std::fs::write(&config_path, config)?;
        let log = std::fs::File::create(dir.join("log"))?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(&config_path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        let mut containerd = Self { child, socket };
        let start = Instant::now();
        while containerd.ctr(&["version"]).is_err() {
            if start.elapsed() > Duration::from_secs(20) || containerd.child.try_wait()?.is_some() {
                bail!("containerd did not start; its log is in {}", dir.join("log").display());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(containerd)
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        output(Command::new("ctr").arg("--address").arg(&self.socket).args(arguments))
    }

    /// Full pull and run; gives what the command wrote.
    pub(crate) fn pull_and_run(&self, image: &str, command: &[&str]) -> Result<String> {
        self.ctr(&["images", "pull", "--plain-http", image])?;
        let mut arguments = vec!["run", "--rm", "--net-host", image, "job"];
        arguments.extend(command);
        self.ctr(&arguments)
    }

    /// Forgets an image and frees its content.
    pub(crate) fn forget(&self, image: &str) -> Result<()> {
        self.ctr(&["images", "rm", "--sync", image]).map(|_| ())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        let stopped = Command::new("kill").arg(&pid).status().and_then(|_| self.child.wait());
        if let Err(error) = stopped {
            eprintln!("cannot stop containerd (pid {pid}): {error}");
        }
    }
}
