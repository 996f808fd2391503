//! `cargo xtask kill`: the daemon is killed again and again at random times while containers use a streamed image, first without
//! a background fill, then while it fills and is handed over, then complete. No operation may fail, no byte may be wrong.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::run::{output, script, target};
use crate::sluice::{Registry, Sluice};
use crate::{image_maker, packages, sluice};

const READER: &str = include_str!("kill/reader.py");
const KINDS: [&str; 4] = ["read", "map", "exec", "stat"];
const WAYS: [&str; 2] = ["classic", "io_uring"];
/// A daemon lives at most so long after it first answered, half of it on the average. One of four is killed as it starts.
const LIFE: Duration = Duration::from_millis(1000);
const PATIENCE: Duration = Duration::from_secs(120);

/// Options of the test.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills, for each way of serving block files
    #[arg(long, default_value_t = 100)]
    pub(crate) kills: u32,
    /// An existing binary of sluice instead of the one that tests use
    #[arg(long)]
    pub(crate) binary: Option<PathBuf>,
}

/// What a container saw.
#[derive(Debug, Deserialize)]
struct Seen {
    operations: u64,
    wrong: Vec<String>,
    failed: Vec<String>,
    longest_s: f64,
}

/// Runs it for both ways.
pub(crate) fn kill(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build_for_tests, Ok)?;
    let recipe = image_maker::recipe("medium")?;
    let images = image_maker::make(recipe)?;
    let work = target().join("sluice-kill");
    let shared = work.join("shared");
    script("rm -rf \"$1\"; mkdir -p \"$1\"", &[&work])?;
    describe(&images.join(recipe.name), &work)?;
    for way in WAYS {
        fs::create_dir_all(&shared)?;
        for name in ["sums", "facts"] {
            fs::copy(work.join(name), shared.join(name))?;
        }
        fs::write(shared.join("reader.py"), READER)?;
        let done = kill_by(way, args.kills, &binary, &images, &work);
        fs::remove_dir_all(&shared)?;
        done.with_context(|| format!("by {way}"))?;
    }
    fs::remove_dir_all(&work).context("cannot remove what was compared")
}

/// Writes down what the image's files are, as umoci unpacks them.
fn describe(layout: &Path, work: &Path) -> Result<()> {
    let truth = work.join("truth");
    let image = format!("{}:latest", layout.display());
    output(std::process::Command::new("umoci").args(["unpack", "--image", &image]).arg(&truth))?;
    // Of directories that the runtime does not mount over. One link of each file: sums are the same.
    let files = "cd \"$1/rootfs\"; find bin/ usr var/lib -xdev -type f -size +0 -links 1";
    script(&format!("{files} -print0 | xargs -0 sha256sum > \"$2/sums\""), &[&truth, work])?;
    script(&format!("{files} -printf '%s %m %p\\n' > \"$2/facts\""), &[&truth, work])?;
    script("rm -rf \"$1\"", &[&truth]).map(|_| ())
}

fn kill_by(way: &str, kills: u32, binary: &Path, images: &Path, work: &Path) -> Result<()> {
    let recipe = image_maker::recipe("medium")?;
    let config = |fill: bool| {
        let indexes = work.join("indexes");
        let indexes = indexes.display();
        format!("index_store = \"file://{indexes}\"\n[blocks]\nway = {way:?}\n[stream]\nfill = {fill}\n")
    };
    let node = Sluice::new(binary, &work.join("node"), &config(false))?;
    let registry = Registry::start(binary, images, "1gbit", "2ms")?;
    let image = registry.image(recipe.name);
    node.run(&["index", &image])?;
    let mut daemon = Daemon::start(&node)?;
    wait_until("the daemon answers", || Ok(node.status().is_ok()))?;
    let mut containers = Containers { running: Vec::new(), shared: work.join("shared") };
    containers.start(&node, &image)?;
    let mut noise = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 | 1;
    let start = Instant::now();
    for number in 0..kills {
        if number == kills / 2 {
            // The next daemon completes the layers and hands them over.
            fs::write(node.path("config.toml"), config(true))?;
        }
        if number % 4 != 0 {
            wait_until("the daemon answers", || Ok(node.status().is_ok()))?;
        }
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(LIFE.mul_f64((noise >> 33) as f64 / f64::from(1_u32 << 31)));
        daemon.kill()?;
        daemon = Daemon::start(&node)?;
        containers.check_alive()?;
    }
    let took = start.elapsed();
    // A daemon that is about to come does not answer yet.
    wait_until("the image is local", || Ok(state(&node).is_ok_and(|state| state == "local")))?;
    std::thread::sleep(LIFE);
    let seen = containers.stop()?;
    let (operations, failed, wrong) = seen.iter().fold((0, 0, 0), |(operations, failed, wrong), one| {
        (operations + one.operations, failed + one.failed.len(), wrong + one.wrong.len())
    });
    println!(
        "kill, {way}: {kills} kills in {:.1} s, {operations} operations in 4 containers, {failed} failed, {wrong} wrong",
        took.as_secs_f64()
    );
    let longest: Vec<_> =
        KINDS.iter().zip(&seen).map(|(kind, one)| format!("{kind} {:.3} s", one.longest_s)).collect();
    println!("kill, {way}: longest pauses: {}", longest.join(", "));
    let complaints: Vec<_> =
        seen.iter().flat_map(|one| one.failed.iter().chain(&one.wrong)).take(10).collect();
    ensure!(complaints.is_empty(), "{complaints:#?}");
    let checked = node.run(&["fsck"])?;
    ensure!(checked.ends_with(" 0 problems\n"), "{checked}");
    node.run(&["node", "drain"])?;
    daemon.wait()
}

fn state(node: &Sluice) -> Result<String> {
    let status = node.status()?;
    let state = status.pointer("/images/0/state").and_then(serde_json::Value::as_str);
    Ok(state.unwrap_or_default().to_owned())
}

fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The daemon as a service manager has it: a child, started anew whenever it dies, ready or not.
struct Daemon(Child);

impl Daemon {
    fn start(node: &Sluice) -> Result<Self> {
        let log = File::options().create(true).append(true).open(node.path("daemon.log"))?;
        let mut command = node.command();
        command.arg("daemon").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(Self(command.spawn().context("cannot start the daemon")?))
    }

    /// One that came too late, because a command had started a daemon meanwhile, has ended by itself.
    fn kill(&mut self) -> Result<()> {
        if self.0.try_wait()?.is_none() {
            self.0.kill()?;
        }
        self.0.wait()?;
        Ok(())
    }

    fn wait(mut self) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "the daemon ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After `kill` and `wait` it is gone. Else something failed: the node's own clean-up starts another one.
        if self.0.try_wait().is_ok_and(|ended| ended.is_none())
            && let Err(error) = self.kill()
        {
            eprintln!("cannot kill the daemon: {error:#}");
        }
    }
}

struct Containers {
    running: Vec<(Child, PathBuf)>,
    shared: PathBuf,
}

impl Containers {
    fn start(&mut self, node: &Sluice, image: &str) -> Result<()> {
        for kind in KINDS {
            let said = self.shared.join(format!("said-{kind}"));
            let volume = format!("{}:/shared", self.shared.display());
            let mut command = node.command();
            command.args(["run", "-v", &volume, image, "python3", "/shared/reader.py", kind]);
            command.stdin(Stdio::null()).stdout(File::create(&said)?);
            self.running.push((command.spawn().context("cannot start a container")?, said));
        }
        for kind in KINDS {
            wait_until("a container is up", || {
                self.check_alive()?;
                Ok(self.shared.join(format!("up-{kind}")).exists())
            })?;
        }
        Ok(())
    }

    fn check_alive(&mut self) -> Result<()> {
        for (child, said) in &mut self.running {
            if let Some(status) = child.try_wait()? {
                bail!("a container ended with {status}: {}", fs::read_to_string(said)?);
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Seen>> {
        File::create(self.shared.join("stop"))?;
        let mut seen = Vec::new();
        for (mut child, said) in self.running.drain(..) {
            let status = child.wait()?;
            let text = fs::read_to_string(&said)?;
            ensure!(status.success(), "a container ended with {status}: {text}");
            seen.push(serde_json::from_str(&text).with_context(|| format!("a container said `{text}`"))?);
        }
        Ok(seen)
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        if !self.running.is_empty()
            && let Err(error) = self.stop()
        {
            eprintln!("a container: {error:#}");
        }
    }
}
