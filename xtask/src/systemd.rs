//! `cargo xtask test-systemd`: the installed units under a real systemd.
//!
//! systemd is the first process of namespaces of its own (processes, mounts, control groups), with no units but ours and the
//! few that those name: nothing of the machine's services is started or touched. It needs no journal and no bus; `systemctl` speaks to
//! it through its private socket.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::run::{output, target};
use crate::sluice::Registry;
use crate::{install, packages};

/// Options of the test.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The program that is tried [default: built now, as for tests]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Nothing here takes longer, on a busy machine either.
const PATIENCE: Duration = Duration::from_secs(60);
/// Files of the image, each further from the last than one request reaches.
const FILES: usize = 12;
const FILE_BYTES: usize = 2 << 20;
/// Units that ours name; empty, since what they stand for is there.
const TARGETS: [&str; 7] =
    ["sysinit", "basic", "local-fs", "network-online", "sockets", "multi-user", "shutdown"];

/// `$1`: where control groups may be mounted for a moment, `$2`: the name of ours, `$3`: directory of units.
const BOOT: &str = r#"
mount --make-rprivate /
mount -t cgroup2 none "$1"
mkdir "$1/$2"
echo 0 > "$1/$2/cgroup.procs"
umount "$1"
exec unshare --cgroup sh -euc '
    mount -t cgroup2 none /sys/fs/cgroup
    mount -t proc none /proc
    mount -t tmpfs none /run
    exec env -i container=sluice PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$1" \
        /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no
' sh "$3"
"#;
/// Ends the control groups that systemd made.
const SWEEP: &str = r#"
mount --make-rprivate /
mount -t cgroup2 none "$1"
! [ -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} +
"#;

/// Runs everything, one step after the other.
pub(crate) fn test(args: &Args) -> Result<()> {
    packages::install(&packages::SYSTEMD)?;
    let binary = match &args.binary {
        Some(path) => path.clone(),
        None => crate::sluice::build_for_tests()?,
    };
    let began = Instant::now();
    let dir = target().join(format!("sluice-systemd-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let node = Node::boot(&dir, &binary)?;
    let steps = node.steps();
    if steps.is_err() {
        eprintln!("{}", node.logs());
    }
    drop(node);
    let removed = fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()));
    steps.and(removed)?;
    println!("systemd: all as it should be, in {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// A node whose init is systemd.
#[derive(Debug)]
struct Node {
    dir: PathBuf,
    program: PathBuf,
    unshare: Child,
    /// systemd's process as we see it.
    init: u32,
    registry: Registry,
    files: Vec<Vec<u8>>,
}

impl Node {
    fn boot(dir: &Path, binary: &Path) -> Result<Self> {
        let prefix = dir.join("usr");
        let program = prefix.join("bin/sluice");
        for made in ["usr/bin", "units/sluice.service.d", "cgroup", "mount", "layouts/image/tree"] {
            fs::create_dir_all(dir.join(made))?;
        }
        fs::copy(binary, &program)?;
        let prefix = prefix.to_str().context("the target directory's name is not text")?;
        for (path, text) in install::system_files(prefix) {
            if let Some(unit) = path.strip_prefix("usr/lib/systemd/system/") {
                fs::write(dir.join("units").join(unit), text)?;
            }
        }
        for name in TARGETS {
            let text = format!("[Unit]\nDescription={name}\nDefaultDependencies=no\n");
            fs::write(dir.join(format!("units/{name}.target")), text)?;
        }
        let here = dir.display();
        let drop_in = format!(
            "[Service]\nEnvironment=SLUICE_ROOT={here}/root SLUICE_CONFIG={here}/config.toml\nStandardOutput=append:{here}/daemon.log\nStandardError=append:{here}/daemon.log\n"
        );
        fs::write(dir.join("units/sluice.service.d/here.conf"), drop_in)?;
        let config = "[registry]\nplain_http = [\"*\"]\n[stream]\nfill = false\n[trust]\nmode = \"any\"\n";
        fs::write(dir.join("config.toml"), config)?;
        let files = make_image(&dir.join("layouts/image"))?;
        let registry = Registry::start(&program, &dir.join("layouts"), "1gbit", "0ms")?;
        let log = File::create(dir.join("systemd.log"))?;
        let unshare = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--uts", "--kill-child", "sh", "-euc", BOOT, "sh"])
            .args([dir.join("cgroup"), group().into(), dir.join("units")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start unshare")?;
        let mut node = Self { dir: dir.to_path_buf(), program, unshare, init: 0, registry, files };
        let booted = wait("systemd runs", || {
            node.init = first_child(node.unshare.id()).unwrap_or(0);
            Ok(node.init != 0 && node.systemctl(&["is-active", "multi-user.target"]).is_ok())
        });
        if booted.is_err() {
            eprintln!("{}", node.logs());
        }
        booted.map(|()| node)
    }

    fn steps(&self) -> Result<()> {
        println!("socket activation");
        self.systemctl(&["start", "sluice.socket"])?;
        ensure!(self.property("ActiveState")? == "inactive", "the service waits for a question");
        self.sluice(&["node", "status"])?;
        self.wait_until_active()?;
        let image = self.registry.image("image");
        self.sluice(&["index", &image])?;
        let mount = self.dir.join("mount");
        self.sluice(&["mount", &image, mount.to_str().context("the directory's name is not text")?])?;
        let server = self.server()?;
        self.read(0)?;
        let (over, read) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    self.read(0)?;
                    read.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                }
                anyhow::Ok(())
            });
            let worked = self.come_and_go(&server);
            over.store(true, Ordering::Relaxed);
            let reading = reader.join().map_err(|_panic| anyhow::anyhow!("the reader panicked"))?;
            worked.and(reading)
        })?;
        println!("drain ({} reads meanwhile)", read.load(Ordering::Relaxed));
        self.sluice(&["node", "drain"])?;
        wait("the service is stopped", || Ok(self.property("ActiveState")? == "inactive"))?;
        ensure!(self.property("Result")? == "success", "a daemon that was told to stop succeeded");
        ensure!(!self.inside(&mount.join("file0")).exists(), "the image is mounted still");
        Ok(())
    }

    /// The daemon goes in all ways; a read of what is not here waits for the next one each time.
    fn come_and_go(&self, server: &Value) -> Result<()> {
        let daemon = || self.property("MainPID");
        println!("stop and start");
        let before = daemon()?;
        self.systemctl(&["stop", "sluice.service"])?;
        ensure!(self.property("ActiveState")? == "inactive", "nobody asked for another daemon");
        self.waiting_read(1, || self.systemctl(&["start", "sluice.service"]).map(drop))?;
        ensure!(daemon()? != before && self.server()? == *server, "another daemon, the same block files");
        println!("restart");
        self.systemctl(&["restart", "sluice.service"])?;
        self.read(2)?;
        println!("kill -9");
        let before = daemon()?;
        self.systemctl(&["kill", "--kill-whom=main", "--signal=KILL", "sluice.service"])?;
        self.read(3)?;
        wait("the next daemon is there", || Ok(daemon()? != before && daemon()? != "0"))?;
        ensure!(self.server()? == *server, "the same block files");
        println!("upgrade");
        let (before, new) = (daemon()?, self.program.with_extension("new"));
        fs::copy(&self.program, &new)?;
        fs::rename(&new, &self.program)?;
        self.sluice(&["upgrade"])?;
        ensure!(daemon()? != before && self.server()? == *server, "another daemon, the same block files");
        self.read(4)?;
        let refused = self.sluice(&["upgrade", "/bin/true"]);
        ensure!(refused.is_err(), "the unit names the program, so no other can follow");
        self.wait_until_active()?;
        println!("a question after `sluice stop`");
        self.sluice(&["stop"])?;
        wait("the service is stopped", || Ok(self.property("ActiveState")? == "inactive"))?;
        self.sluice(&["status"])?;
        self.read(5)
    }

    /// A file that is not here, read while no daemon runs, until `start` starts one.
    fn waiting_read(&self, number: usize, start: impl FnOnce() -> Result<()>) -> Result<()> {
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| self.read(number));
            // Time to ask for it; that it asks later would be no failure.
            std::thread::sleep(Duration::from_millis(200));
            let early = reading.is_finished();
            let started = start();
            let read = reading.join().map_err(|_panic| anyhow::anyhow!("the reader panicked"))?;
            ensure!(!early, "nobody can have brought what was read");
            started.and(read)
        })
    }

    fn read(&self, number: usize) -> Result<()> {
        let path = self.inside(&self.dir.join(format!("mount/file{number}")));
        let found = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(self.files.get(number) == Some(&found), "file {number} has other content");
        Ok(())
    }

    /// A path of the node, from outside.
    fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.init));
        path.strip_prefix("/").map_or_else(|_| path.to_path_buf(), |path| root.join(path))
    }

    fn enter(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--target", &self.init.to_string(), "timeout", "60"]).arg(program);
        command
    }

    fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        output(self.enter(Path::new("systemctl")).args(arguments))
    }

    fn property(&self, name: &str) -> Result<String> {
        let shown = self.systemctl(&["show", "--value", "--property", name, "sluice.service"])?;
        Ok(shown.trim().to_owned())
    }

    fn wait_until_active(&self) -> Result<()> {
        wait("the service is active", || Ok(self.property("ActiveState")? == "active"))
    }

    fn sluice(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.enter(&self.program);
        command.env("SLUICE_ROOT", self.dir.join("root")).env("SLUICE_CONFIG", self.dir.join("config.toml"));
        output(command.args(arguments))
    }

    /// The process that serves block files.
    fn server(&self) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.sluice(&["status", "--json"])?)?;
        status.pointer("/blocks/pid").cloned().context("no block files are served: this node cannot stream")
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        format!("--- systemd\n{}--- sluice\n{}", read("systemd.log"), read("daemon.log"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // With its first process all of the node's end, and its mounts.
        if let Err(error) = self.unshare.kill().and_then(|()| self.unshare.wait()) {
            eprintln!("systemd stays behind: {error}");
        }
        let swept = wait("the control groups are gone", || {
            let mut sweep = Command::new("unshare");
            sweep.args(["--mount", "sh", "-euc", SWEEP, "sh"]).arg(self.dir.join("cgroup")).arg(group());
            Ok(output(&mut sweep).is_ok())
        });
        if let Err(error) = swept {
            eprintln!("{error:#}");
        }
    }
}

/// Of the node's control group.
fn group() -> String {
    format!("sluice-systemd-{}", std::process::id())
}

fn first_child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn make_image(layout: &Path) -> Result<Vec<Vec<u8>>> {
    let mut random = File::open("/dev/urandom")?;
    let mut files = Vec::new();
    for number in 0..FILES {
        let mut bytes = vec![0; FILE_BYTES];
        random.read_exact(&mut bytes)?;
        fs::write(layout.join(format!("tree/file{number}")), &bytes)?;
        files.push(bytes);
    }
    install::make_image(layout, &[])?;
    Ok(files)
}

fn wait(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("waited in vain until {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
