//! One test's own registry, agent and containerd, all in one temporary directory; everything ends with it.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sluice_kernel::mount::UnmountOptions;
use sluice_registry_server::{Access, Account, Faults, Link, Server, ServerConfig};

use crate::images::{Layer, Layouts};

/// How long anything may take to come true.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) registry: Server,
    pub(crate) images: Layouts,
    /// The agent's sockets, held as systemd holds them.
    sockets: [UnixListener; 2],
    agent: Option<Child>,
    containerd: Option<Child>,
}

impl Rig {
    /// Everything runs; `config` is added to the agent's configuration.
    pub(crate) fn new(config: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("slc").tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let layouts = dir.path().join("layouts");
        std::fs::create_dir(&layouts).unwrap();
        let server = ServerConfig {
            root: layouts.clone(),
            listen: "127.0.0.1:0".parse().unwrap(),
            link: Link::default(),
            faults: Faults::default(),
            referrers_api: true,
        };
        let registry = runtime.block_on(Server::start(server)).unwrap();
        let socket = dir.path().join("c.sock");
        // An unoptimised agent takes half a second to load probes, and containerd 1.6 waits a second for one that restarts.
        let probes = if config.contains("[probes]") { "" } else { "[probes]\nenabled = false\n" };
        let text = format!(
            "{config}\n{probes}[registry]\nplain_http = [\"*\"]\n[containerd]\naddress = {socket:?}\n"
        );
        std::fs::write(dir.path().join("config.toml"), text).unwrap();
        let images = Layouts { dir: layouts };
        images.add("pause", vec![Layer::new().tools()], &["sleep", "infinity"]);
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let sockets = ["sluice.sock", "snapshotter.sock"]
            .map(|name| UnixListener::bind(dir.path().join("state").join(name)).unwrap());
        let mut rig = Self { dir, runtime, registry, images, sockets, agent: None, containerd: None };
        rig.start_agent();
        rig.start_containerd();
        rig
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The reference of an image of the registry.
    pub(crate) fn reference(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.registry.address())
    }

    /// The registry demands a login from now on: user, password and the one repository of each.
    pub(crate) fn demand(&self, accounts: &[(&str, &str, &str)], token_life: Option<Duration>) {
        let account = |(name, password, repository): &(&str, &str, &str)| Account {
            name: (*name).to_owned(),
            password: (*password).to_owned(),
            repositories: vec![(*repository).to_owned()],
        };
        let accounts = accounts.iter().map(account).collect();
        self.registry.set_access(Some(Access { accounts, token_life }));
    }

    // The agent.

    pub(crate) fn sluice(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command
            .arg("--config")
            .arg(self.path("config.toml"))
            .arg("--root")
            .arg(self.path("root"))
            .arg("--state")
            .arg(self.path("state"))
            .args(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn start_agent(&mut self) {
        // As systemd starts it for `sluice.socket`: the sockets are its descriptors 3 and 4.
        let script = r#"exec 3<&0 4<&2 0</dev/null 2>>"$0"; exec env LISTEN_PID=$$ LISTEN_FDS=2 "$@""#;
        let [daemon, snapshotter] = &self.sockets;
        let mut child = Command::new("sh")
            .args(["-c", script])
            .arg(self.path("agent.log"))
            .arg(env!("CARGO_BIN_EXE_sluice"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .arg("--root")
            .arg(self.path("root"))
            .arg("--state")
            .arg(self.path("state"))
            .args(["daemon", "--announce"])
            .stdin(Stdio::from(OwnedFd::from(daemon.try_clone().unwrap())))
            .stdout(Stdio::piped())
            .stderr(Stdio::from(OwnedFd::from(snapshotter.try_clone().unwrap())))
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.agent = Some(child);
        assert_eq!(line.trim(), "ready", "{}", self.log("agent.log"));
    }

    /// Ends the agent by a signal and waits for it.
    pub(crate) fn end_agent(&mut self, signal: Signal) {
        end(self.agent.take(), signal);
    }

    /// The image's stream index is published, as by a CI pipeline.
    pub(crate) fn index(&self, name: &str) {
        ok(&self.sluice(&["index", &self.reference(name)]));
    }

    /// `sluice ctr-pull`; what it printed.
    pub(crate) fn ctr_pull(&self, name: &str) -> String {
        ok(&self.sluice(&["ctr-pull", &self.reference(name)]))
    }

    /// Reasons of the events of an image, and all that was said.
    pub(crate) fn events(&self, name: &str) -> (Vec<String>, String) {
        let text = ok(&self.sluice(&["events", "--json"]));
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let of_image = events.filter(|event| event["image"] == self.reference(name).as_str());
        let reasons = of_image.map(|event| event["reason"].as_str().unwrap().to_owned());
        (reasons.collect(), text)
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&ok(&self.sluice(&["status", "--json"]))).unwrap()
    }

    /// Waits until all of an image is on the node.
    pub(crate) fn wait_until_local(&self, name: &str) {
        self.wait(&format!("{name} is local"), || {
            let status = self.status();
            let images = status["images"].as_array().unwrap();
            let of_name = |image: &&Value| image["reference"] == self.reference(name).as_str();
            images.iter().find(of_name).is_some_and(|image| image["state"] == "local")
        });
    }

    // containerd.

    pub(crate) fn start_containerd(&mut self) {
        let path = |name: &str| self.path(name).display().to_string();
        let pause = self.reference("pause");
        let config = format!(
            r#"
version = 2
root = "{root}"
state = "{state}"
[grpc]
address = "{socket}"
[proxy_plugins.sluice]
type = "snapshot"
address = "{snapshotter}"
[proxy_plugins.sluice.exports]
enable_remote_snapshot_annotations = "true"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "{platform}"
snapshotter = "sluice"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "{platform}"
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
stream_server_port = "0"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{cni}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "sluice"
disable_snapshot_annotations = false
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
            platform = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" },
            root = path("c-root"),
            state = path("c-state"),
            socket = path("c.sock"),
            snapshotter = path("state/snapshotter.sock"),
            cni = path("cni"),
        );
        std::fs::write(self.path("containerd.toml"), config).unwrap();
        let log =
            std::fs::File::options().create(true).append(true).open(self.path("containerd.log")).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(self.path("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.containerd = Some(child);
        self.wait("containerd answers", || self.try_ctr(&["version"]).status.success());
        self.wait("the snapshotter is known", || {
            let plugins = ok(&self.try_ctr(&["plugins", "ls"]));
            plugins.lines().any(|line| line.contains("sluice") && line.trim_end().ends_with("ok"))
        });
    }

    pub(crate) fn end_containerd(&mut self) {
        end(self.containerd.take(), Signal::SIGTERM);
    }

    pub(crate) fn try_ctr(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.path("c.sock")).args(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn ctr(&self, arguments: &[&str]) -> String {
        ok(&self.try_ctr(arguments))
    }

    /// A container's id that no other test has: runc's directory of containers is the machine's.
    pub(crate) fn id(&self, name: &str) -> String {
        let own = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("{own}-{name}")
    }

    /// Runs a command in a container of an image, on a snapshotter.
    pub(crate) fn run(&self, snapshotter: &str, name: &str, id: &str, script: &str) -> String {
        let (reference, id) = (self.reference(name), self.id(id));
        let arguments = ["run", "--rm", "--net-host", "--snapshotter", snapshotter, &reference, &id];
        let command = ["sh", "-c", script];
        self.ctr(&[&arguments[..], &command[..]].concat())
    }

    /// A container that stays until `stop`.
    pub(crate) fn start(&self, name: &str, id: &str) {
        self.start_with(name, id, "sleep infinity");
    }

    /// The same, at work.
    pub(crate) fn start_with(&self, name: &str, id: &str, script: &str) {
        let (reference, id) = (self.reference(name), self.id(id));
        let arguments = ["run", "--detach", "--net-host", "--snapshotter", "sluice", &reference, &id];
        self.ctr(&[&arguments[..], &["sh", "-c", script][..]].concat());
    }

    pub(crate) fn exec(&self, id: &str, script: &str) -> String {
        self.ctr(&["tasks", "exec", "--exec-id", "e", &self.id(id), "sh", "-c", script])
    }

    pub(crate) fn stop(&self, id: &str) {
        self.ctr(&["tasks", "rm", "--force", &self.id(id)]);
        self.ctr(&["containers", "rm", &self.id(id)]);
    }

    /// Lines about every file of the image's root, the same for every snapshotter.
    pub(crate) fn listing(&self, snapshotter: &str, name: &str, id: &str) -> Vec<String> {
        listed("/", |script| self.run(snapshotter, name, id, script))
    }

    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not after {PATIENCE:?}\n{}\n{}",
                self.log("agent.log"),
                self.log("containerd.log")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The end of a log.
    pub(crate) fn log(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// What a directory holds, by a script that `run` runs where it is.
pub(crate) fn listed(dir: &str, run: impl FnOnce(&str) -> String) -> Vec<String> {
    let prune = r"\( -path ./proc -o -path ./dev -o -path ./sys -o -path ./run \) -prune -o";
    let script = format!(
        r"cd {dir} && find . -xdev {prune} -printf '%p %y %m %U %G %s %n %T@ %l\n' && find . -xdev {prune} -type f -exec sha256sum {{}} +"
    );
    let mut lines: Vec<String> = run(&script)
        .lines()
        // The root itself belongs to the snapshotter.
        .filter(|line| !line.starts_with(". "))
        // A container has its own.
        .filter(|line| !line.contains("./etc/hosts") && !line.contains("./etc/resolv.conf"))
        .map(without_directory_details)
        .collect();
    lines.sort();
    assert!(lines.len() > 20, "{lines:?}");
    lines
}

/// Sizes and link counts of directories differ between file systems, and their times with what was unpacked into them.
fn without_directory_details(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    if words.get(1) == Some(&"d") {
        words.splice(5..8, ["-"]);
    }
    words.join(" ")
}

/// Compares two listings line by line.
pub(crate) fn assert_same(left: &[String], right: &[String]) {
    let only = |these: &[String], those: &[String]| {
        these.iter().filter(|line| !those.contains(line)).cloned().collect::<Vec<_>>()
    };
    let (only_left, only_right) = (only(left, right), only(right, left));
    assert!(only_left.is_empty() && only_right.is_empty(), "{only_left:#?} is not {only_right:#?}");
    assert_eq!(left.len(), right.len());
}

/// What a command wrote, if it ended well.
pub(crate) fn ok(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn end(child: Option<Child>, signal: Signal) {
    let Some(mut child) = child else { return };
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    kill(pid, signal).unwrap();
    child.wait().unwrap();
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a failure containers may still be there: their shims carry our socket's name.
        let socket = self.path("c.sock").display().to_string();
        for (pid, shim) in shims(&socket) {
            eprintln!("a shim is left: {shim}");
            for victim in children(pid).into_iter().chain([pid]) {
                if let Err(error) = kill(Pid::from_raw(victim), Signal::SIGKILL) {
                    eprintln!("{victim}: {error}");
                }
            }
        }
        self.end_containerd();
        self.end_agent(Signal::SIGTERM);
        delete_containers(self.dir.path());
        let mut targets: Vec<PathBuf> =
            sluice_kernel::mounts().unwrap().into_iter().map(|m| m.target).collect();
        targets.retain(|target| target.starts_with(self.dir.path()));
        for target in targets.iter().rev() {
            if let Err(error) = sluice_kernel::unmount(target, UnmountOptions { lazy: true, force: false }) {
                eprintln!("{error}");
            }
        }
        if std::thread::panicking() {
            eprintln!("agent:\n{}\ncontainerd:\n{}", self.log("agent.log"), self.log("containerd.log"));
        }
    }
}

/// Processes that name `socket` as an argument, other than containerd itself.
fn shims(socket: &str) -> Vec<(i32, String)> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let named = processes.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let words: Vec<&str> = line.split('\0').collect();
        (words.first()?.contains("shim") && words.contains(&socket)).then(|| (pid, words.join(" ")))
    });
    named.collect()
}

/// What runc still knows of containers whose bundles are below `dir`.
fn delete_containers(dir: &Path) {
    for entry in std::fs::read_dir("/run/containerd/runc").into_iter().flatten().flatten() {
        let runc = |arguments: &[&str]| {
            Command::new("runc").arg("--root").arg(entry.path()).args(arguments).output().unwrap()
        };
        let list: Value =
            serde_json::from_slice(&runc(&["list", "--format", "json"]).stdout).unwrap_or_default();
        for container in list.as_array().into_iter().flatten() {
            let (id, bundle) = (container["id"].as_str().unwrap(), container["bundle"].as_str().unwrap());
            if Path::new(bundle).starts_with(dir) {
                eprintln!("a container is left: {id}");
                runc(&["delete", "--force", id]);
            }
        }
    }
}

fn children(pid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}
