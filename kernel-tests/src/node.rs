//! A node in the guest: the real binary, a registry beside it, and the image that the host made, with its index.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Where the host put them.
pub(crate) const SLUICE: &str = "/usr/lib/kernel-tests/sluice";
const ADDRESS: &str = "127.0.0.1:5000";
const IMAGES: &str = "/usr/lib/kernel-tests/images";

/// See the module text. What it started ends with the case: PID 1 sees to that; its registry before, whose port the next one needs.
pub(crate) struct Node {
    dir: PathBuf,
    /// Of those in [`IMAGES`].
    image: &'static str,
    registry: Child,
}

impl Node {
    /// A node in `dir`, with this configuration, beside a registry with this link (`--rate` and its like).
    pub(crate) fn new(dir: &Path, config: &str, link: &[&str]) -> Result<Self> {
        Self::with_image("image", dir, config, link)
    }

    /// The same with another image than the usual one.
    pub(crate) fn with_image(image: &'static str, dir: &Path, config: &str, link: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let images = dir.join("images");
        if !images.exists() {
            checked(Command::new("busybox").args(["cp", "-a", IMAGES]).arg(&images))?;
        }
        // The image's index comes from this guest's own registry.
        fs::write(dir.join("config.toml"), format!("{config}\n[trust]\nmode = \"any\"\n"))?;
        let registry = start_registry(&images, link)?;
        Ok(Self { dir: dir.to_path_buf(), image, registry })
    }

    pub(crate) fn image(&self) -> String {
        format!("{ADDRESS}/{}:latest", self.image)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SLUICE);
        for (option, name) in [("--root", "root"), ("--state", "state"), ("--config", "config.toml")] {
            command.arg(option).arg(self.dir.join(name));
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// What a command that must succeed wrote.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Result<String> {
        checked(&mut self.command(arguments)).with_context(|| format!("the daemon's log:\n{}", self.log()))
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().context("sluice does not start")
    }

    pub(crate) fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["status", "--json"])?)?)
    }

    /// A field of the one image in the status.
    pub(crate) fn of_image(&self, field: &str) -> Result<Value> {
        let status = self.status()?;
        let found = status.get("images").and_then(|images| images.get(0)).and_then(|image| image.get(field));
        found.cloned().with_context(|| format!("no {field} of an image in {status}"))
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("state/daemon.log")).unwrap_or_default()
    }

    pub(crate) fn end_registry(&mut self) -> Result<()> {
        self.registry.kill()?;
        self.registry.wait()?;
        Ok(())
    }

    /// Mounts the image, read-only; where.
    pub(crate) fn mount(&self) -> Result<PathBuf> {
        let dir = self.path("mounted");
        fs::create_dir_all(&dir)?;
        self.ok(&["mount", &self.image(), &dir.to_string_lossy()])?;
        Ok(dir)
    }

    /// Compares every file of the image with what the host wrote down.
    pub(crate) fn check_contents(&self, root: &Path) -> Result<()> {
        let sums = fs::read_to_string(Path::new(IMAGES).join("SUMS"))?;
        let path = self.path("sums");
        fs::write(&path, &sums)?;
        checked(Command::new("busybox").args(["sha256sum", "-c"]).arg(path).current_dir(root)).map(|_| ())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.end_registry() {
            eprintln!("the registry stays: {error:#}");
        }
    }
}

fn start_registry(images: &Path, options: &[&str]) -> Result<Child> {
    let mut registry = Command::new(SLUICE)
        .arg("registry")
        .arg(images)
        .args(["--listen", ADDRESS])
        .args(options)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the registry")?;
    let mut line = String::new();
    BufReader::new(registry.stdout.take().context("no output")?).read_line(&mut line)?;
    if line.trim().is_empty() {
        bail!("the registry does not start");
    }
    Ok(registry)
}

/// Runs a command that must succeed; what it wrote.
pub(crate) fn checked(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        let (said, wrote) =
            (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        bail!("{command:?}: {}: {said}{wrote}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What [`wait_until`] has, in seconds: a guest without hardware help is slow.
static PATIENCE_S: AtomicU64 = AtomicU64::new(300);

/// What is broken on purpose does not come: nobody needs to wait long for it.
pub(crate) fn be_impatient() {
    PATIENCE_S.store(30, Ordering::Relaxed);
}

/// Asks again and again.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !holds()? {
        if begin.elapsed() > Duration::from_secs(PATIENCE_S.load(Ordering::Relaxed)) {
            bail!("waited in vain until {what}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
