//! A node for a test: the real binary with a store of its own, an embedded registry, and an image made here.

#[path = "rig/leftovers.rs"]
mod leftovers;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes of `/data/large`, which no start of a container touches.
pub(crate) const LARGE: usize = 12 << 20;
/// Files in `/data/many`.
pub(crate) const MANY: usize = 300;

/// See the module text. Dropped, it ends what it started and leaves nothing mounted.
pub(crate) struct Node {
    dir: PathBuf,
    registry: Child,
    pub(crate) address: String,
}

impl Node {
    /// A node beside a registry that has `image:latest`; `config` is the configuration file's text.
    pub(crate) fn new(config: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("node-{}-{number}", std::process::id()));
        fs::create_dir_all(dir.join("images")).expect("a directory");
        make_image(&dir.join("images/image"), "latest", b"after");
        let (registry, address) = start_registry(&dir.join("images"), "127.0.0.1:0");
        fs::write(dir.join("config.toml"), config).expect("written");
        Self { dir, registry, address }
    }

    /// One whose image has a published index, which other nodes beside the same registry use too.
    pub(crate) fn indexed(config: &str) -> Self {
        let node = Self::new(&format!("{config}\n[trust]\nmode = \"any\"\n"));
        node.ok(&["index", &node.image()]);
        node
    }

    /// Adds an image of many empty files, `crowd:latest`, with its index; the reference.
    pub(crate) fn crowd(&self, files: usize) -> String {
        let mut layer = Layer::default();
        for number in 0..files {
            layer.file(&format!("crowd/{}/{number}", number % 1000), 0o644, b"");
        }
        write_layout(&self.dir.join("images/crowd"), "latest", &[layer.finish()]);
        let reference = format!("{}/crowd:latest", self.address);
        self.ok(&["index", &reference]);
        reference
    }

    /// Adds an image of one large file, `big:latest`, with its index; the reference.
    pub(crate) fn big(&self, content: &[u8]) -> String {
        let mut layer = Layer::default();
        layer.file("big", 0o644, content);
        write_layout(&self.dir.join("images/big"), "latest", &[layer.finish()]);
        let reference = format!("{}/big:latest", self.address);
        self.ok(&["index", &reference]);
        reference
    }

    /// Adds an image with a program that needs a library, each far from all else, `program:latest`, with its index; the reference.
    pub(crate) fn program(&self, library: &[u8]) -> String {
        let mut layer = Layer::default();
        layer.file("bin/busybox", 0o755, &fs::read("/bin/busybox").expect("busybox-static is installed"));
        let program = include_bytes!("../../fuzz/seeds/elf/program");
        for (name, content) in [("bin/program", &program[..]), ("lib/libneeded.so", library)] {
            layer.file(&format!("far/before/{name}"), 0o644, &noise(name.len() as u64, 3 << 20));
            layer.file(&format!("opt/{name}"), 0o755, content);
        }
        layer.file("far/end", 0o644, &noise(3, 3 << 20));
        write_layout(&self.dir.join("images/program"), "latest", &[layer.finish()]);
        let reference = format!("{}/program:latest", self.address);
        self.ok(&["index", &reference]);
        reference
    }

    pub(crate) fn image(&self) -> String {
        format!("{}/image:latest", self.address)
    }

    /// From now on there is `image:newer` too, of which one file differs.
    pub(crate) fn add_version(&self) {
        make_image(&self.path("images/image"), "newer", b"newer");
    }

    /// Digests of the image's layers.
    pub(crate) fn layers(&self) -> Vec<String> {
        self.layers_of(0)
    }

    /// Those of the image's version of this number.
    pub(crate) fn layers_of(&self, version: usize) -> Vec<String> {
        let layout = self.dir.join("images/image");
        let read = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(layout.join(name)).expect("readable")).expect("json")
        };
        let digest = |descriptor: &Value| descriptor["digest"].as_str().expect("a digest").to_owned();
        let manifest = digest(&read("index.json")["manifests"][version]);
        let manifest = read(&format!("blobs/{}", manifest.replace(':', "/")));
        manifest["layers"].as_array().expect("layers").iter().map(digest).collect()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A directory to mount on.
    pub(crate) fn room(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        for (option, name) in [("--root", "root"), ("--state", "state"), ("--config", "config.toml")] {
            command.arg(option).arg(self.dir.join(name));
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end; one that hangs fails its test instead of all.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let command = self.command(arguments);
        let mut limited = Command::new("timeout");
        limited.args(["--kill-after=10", "300"]).arg(command.get_program()).args(command.get_args());
        limited.stdin(Stdio::null()).output().expect("sluice starts")
    }

    /// What a command that must succeed wrote.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
        assert!(output.status.success(), "sluice {arguments:?}: {said}\n{}", self.log());
        String::from_utf8(output.stdout).expect("text")
    }

    /// What a command that must fail complained of.
    #[track_caller]
    pub(crate) fn complaint(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "sluice {arguments:?} succeeded");
        String::from_utf8(output.stderr).expect("text")
    }

    /// A shell command in a container of the image.
    #[track_caller]
    pub(crate) fn shell(&self, script: &str) -> String {
        self.ok(&["run", &self.image(), "sh", "-c", script])
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.ok(&["status", "--json"])).expect("json")
    }

    /// Waits until the image's state is `state`.
    #[track_caller]
    pub(crate) fn wait_for_state(&self, state: &str) {
        wait_until(&format!("the image is {state}"), || self.status()["images"][0]["state"] == state);
    }

    /// Faults of the registry from now on; `{}` ends them.
    pub(crate) fn faults(&self, faults: &Value) {
        self.control("POST", "faults", &faults.to_string());
    }

    /// Forgets all that is local: from now on this is another node beside the same registry.
    pub(crate) fn become_another(&self) {
        if self.path("state/sluice.sock").exists() {
            self.ok(&["node", "drain"]);
        }
        for name in ["root", "state"] {
            if self.path(name).exists() {
                fs::remove_dir_all(self.path(name)).expect("removed");
            }
        }
    }

    /// Bytes of blobs that the registry sent since this was asked last.
    pub(crate) fn bytes_sent(&self) -> u64 {
        let stats: Value = serde_json::from_str(&self.control("GET", "stats", "")).expect("json");
        self.control("POST", "reset", "");
        stats["blob_bytes_sent"].as_u64().expect("a number")
    }

    fn control(&self, method: &str, path: &str, body: &str) -> String {
        let mut socket = std::net::TcpStream::connect(&self.address).expect("the registry listens");
        write!(
            socket,
            "{method} /_sluice/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("answered");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        assert!(head.starts_with("HTTP/1.1 2"), "{answer}");
        body.to_owned()
    }

    /// Waits until a blob comes that the registry was told to send slowly; all else comes at once.
    #[track_caller]
    pub(crate) fn wait_for_slow_blob(&self) {
        let mut pieces = 0;
        wait_until("the slow blob comes", || {
            pieces += u32::from(self.bytes_sent() > 0);
            pieces > 5
        });
    }

    /// Ends the registry for good.
    pub(crate) fn kill_registry(&mut self) {
        self.registry.kill().expect("killed");
        self.registry.wait().expect("waited for");
    }

    /// Starts it again, where it was.
    pub(crate) fn revive_registry(&mut self) {
        self.registry = start_registry(&self.dir.join("images"), &self.address).0;
    }

    pub(crate) fn daemon_pid(&self) -> i32 {
        i32::try_from(self.status()["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    /// `kill -9` of the daemon, without farewell.
    pub(crate) fn kill_daemon(&self) {
        let pid = nix::unistd::Pid::from_raw(self.daemon_pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("killed");
        wait_until("the daemon is gone", || nix::sys::signal::kill(pid, None).is_err() || zombie(pid));
    }

    /// `kill -9` of the server of block files, which nobody expects.
    pub(crate) fn kill_block_server(&self) {
        self.kill("block-server");
    }

    /// `kill -9` of the daemon and of what would start the next one.
    pub(crate) fn kill_daemon_for_good(&self) {
        let daemon = self.daemon_pid();
        self.kill("keep-daemon");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon), nix::sys::signal::Signal::SIGKILL)
            .expect("killed");
    }

    fn kill(&self, command: &str) {
        let state = self.path("state");
        let wanted = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            words.contains(&command.as_bytes()) && words.contains(&state.as_os_str().as_encoded_bytes())
        };
        let pids = fs::read_dir("/proc").expect("readable").flatten();
        let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let pid = nix::unistd::Pid::from_raw(pids.find(wanted).expect("it runs"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("killed");
        wait_until("it is gone", || nix::sys::signal::kill(pid, None).is_err() || zombie(pid));
    }

    /// The daemon's log.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("state/daemon.log")).unwrap_or_default()
    }
}

fn start_registry(images: &Path, listen: &str) -> (Child, String) {
    let mut registry = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .arg("registry")
        .arg(images)
        .args(["--listen", listen])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the registry starts");
    let mut line = String::new();
    BufReader::new(registry.stdout.take().expect("is piped")).read_line(&mut line).expect("it speaks");
    let address = line.trim().rsplit(' ').next().expect("an address").to_owned();
    (registry, address)
}

/// Dead to the last thread, though nobody asked for its end yet.
fn zombie(pid: nix::unistd::Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads <= 1 && fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

/// Asks again and again, for at most half a minute.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How a command ended, which must do so in two minutes.
#[track_caller]
pub(crate) fn ended(what: &str, mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status;
        }
        if Instant::now() > deadline {
            let waits = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
            drop(child.kill());
            panic!("{what} does not end; it waits in `{waits}`");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Content that no compressor likes, the same each time.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Content of `/data/large`.
pub(crate) fn large() -> Vec<u8> {
    noise(7, LARGE)
}

/// Content of `/data/many/N`.
pub(crate) fn one_of_many(number: usize) -> Vec<u8> {
    format!("file {number}\n").repeat(number % 40 + 1).into_bytes()
}

/// An OCI layout: busybox and its data in one layer; whiteouts, a changed file and hard links in a second; an empty third.
fn make_image(layout: &Path, tag: &str, changed: &[u8]) {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
    let mut base = Layer::default();
    for dir in ["bin", "data", "data/many", "data/gone", "etc", "proc", "dev", "sys", "tmp"] {
        base.directory(dir);
    }
    base.file("bin/busybox", 0o755, &busybox);
    for name in [
        "sh",
        "cat",
        "echo",
        "id",
        "env",
        "pwd",
        "ls",
        "sha256sum",
        "sleep",
        "cmp",
        "dd",
        "kill",
        "head",
        "touch",
        "find",
    ] {
        base.link(&format!("bin/{name}"), "busybox", tar::EntryType::Symlink);
    }
    base.file("etc/passwd", 0o644, b"root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n");
    base.file("etc/group", 0o644, b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n");
    base.file("data/large", 0o644, &large());
    base.file("data/gone/x", 0o644, b"x");
    base.file("data/changed", 0o644, b"before");
    for number in 0..MANY {
        base.file(&format!("data/many/{number}"), 0o644, &one_of_many(number));
    }
    let mut upper = Layer::default();
    upper.file("data/.wh.gone", 0o644, b"");
    upper.file("data/changed", 0o600, changed);
    upper.link("data/linked", "data/changed", tar::EntryType::Link);
    let layers = [base.finish(), upper.finish(), Layer::default().finish()];
    write_layout(layout, tag, &layers);
}

#[derive(Default)]
struct Layer {
    tar: Option<tar::Builder<Vec<u8>>>,
}

impl Layer {
    fn add(&mut self, name: &str, kind: tar::EntryType, mode: u32, data: &[u8], target: Option<&str>) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        if let Some(target) = target {
            header.set_link_name(target).expect("a short target");
        }
        header.set_cksum();
        let tar = self.tar.get_or_insert_with(|| tar::Builder::new(Vec::new()));
        tar.append_data(&mut header, name, data).expect("in memory");
    }

    fn directory(&mut self, name: &str) {
        self.add(name, tar::EntryType::Directory, 0o755, b"", None);
    }

    fn file(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.add(name, tar::EntryType::Regular, mode, data, None);
    }

    fn link(&mut self, name: &str, target: &str, kind: tar::EntryType) {
        self.add(name, kind, 0o777, b"", Some(target));
    }

    fn finish(mut self) -> Vec<u8> {
        self.tar.take().unwrap_or_else(|| tar::Builder::new(Vec::new())).into_inner().expect("in memory")
    }
}

fn write_layout(layout: &Path, tag: &str, tars: &[Vec<u8>]) {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory");
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        fs::write(blobs.join(&digest), bytes).expect("written");
        (format!("sha256:{digest}"), bytes.len())
    };
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for tar in tars {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(tar).expect("in memory");
        let (digest, size) = put(&gzip.finish().expect("in memory"));
        diff_ids.push(format!("sha256:{}", sha256(tar)));
        layers.push(json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": size }));
    }
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Env": ["PATH=/bin", "FROM=image"], "Cmd": ["sh", "-c", "echo from the image"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let (config, config_size) = put(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size },
        "layers": layers,
    });
    let (manifest, size) = put(manifest.to_string().as_bytes());
    let known = fs::read(layout.join("index.json")).ok();
    let mut index = known.map_or_else(
        || json!({ "schemaVersion": 2, "manifests": [] }),
        |known| serde_json::from_slice(&known).expect("json"),
    );
    index["manifests"].as_array_mut().expect("a list").push(json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": size,
        "annotations": { "org.opencontainers.image.ref.name": tag },
    }));
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
    fs::write(layout.join("index.json"), index.to_string()).expect("written");
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares a file with what it should hold.
#[track_caller]
pub(crate) fn assert_content(path: &Path, wanted: &[u8]) {
    let mut found = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut found))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(found == wanted, "{} differs", path.display());
}
