//! `cargo xtask bench cri`: from kubelet's question for an image to the end of its command, by the real CRI: overlayfs with a
//! full pull, streamed by Sluice, and by the stargz snapshotter if its programs are at hand (image converted for
//! it), taking turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::install::make_image;
use crate::measure::median;
use crate::run::{output, script, target, top};
use crate::sluice::{Registry, Sluice};
use crate::{image_maker, packages, sluice};

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images: small, medium, large
    #[arg(long, value_delimiter = ',', default_value = "medium")]
    images: Vec<String>,
    /// Rate of the link
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// Round-trip time of the link
    #[arg(long, default_value = "2ms")]
    delay: String,
    /// Starts per image and way
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The `sluice` to measure [default: built now]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Directory with containerd-stargz-grpc, which Debian's package leaves out, and ctr-remote
    #[arg(long, value_name = "DIR")]
    stargz: Option<PathBuf>,
}

/// The first is what the others are compared with.
const WAYS: [&str; 3] = ["overlayfs", "sluice", "stargz"];

/// Times of one start, in seconds from the question, and what the registry sent.
#[derive(Debug, Clone, Copy)]
struct Start {
    pulled: f64,
    ended: f64,
    bytes: u64,
}

/// Runs it all.
pub(crate) fn run(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = args.binary.clone().map_or_else(sluice::build, Ok)?;
    let client = client()?;
    let ways = if args.stargz.is_some() { &WAYS[..] } else { &WAYS[..2] };
    if args.stargz.is_none() {
        println!("stargz is LEFT OUT: no --stargz");
    }
    let work = target().join("sluice-bench-cri");
    println!(
        "{:<8} {:<10} {:>9} {:>9} {:>8} {:>11}",
        "image", "way", "pulled s", "ended s", "ratio", "fetched MB"
    );
    for name in &args.images {
        let recipe = image_maker::recipe(name)?;
        let images = image_maker::make(recipe)?;
        pause(&images)?;
        let registry = Registry::start(&binary, &images, &args.rate, &args.delay)?;
        let config = "[prefetch]\nenabled = false\n";
        let agent = Sluice::new(&binary, &work.join("agent"), config)?;
        let image = registry.image(recipe.name);
        agent.run(&["index", &image])?;
        agent.start_daemon()?;
        let host = registry.image("");
        let start = |programs: &PathBuf| Stargz::start(programs, &work.join("stargz-daemon"), &host);
        let stargz = args.stargz.as_ref().map(start).transpose()?;
        let socket = |way: &str| match way {
            "sluice" => Some(work.join("agent/state/snapshotter.sock")),
            "stargz" => stargz.as_ref().map(|stargz| stargz.socket.clone()),
            _ => None,
        };
        let mut nodes = Vec::new();
        for way in ways {
            nodes.push(Node::start(&work.join(way), way, socket(way).as_deref(), &registry.image("pause"))?);
        }
        let converted = registry.image(&format!("{}-stargz", recipe.name));
        if let (Some(programs), Some(node)) = (&args.stargz, nodes.first()) {
            node.convert(&programs.join("ctr-remote"), &image, &converted)?;
        }
        let mut starts = vec![Vec::new(); ways.len()];
        for _ in 0..args.rounds {
            for ((way, node), measured) in ways.iter().zip(&nodes).zip(&mut starts) {
                let image = if *way == "stargz" { &converted } else { &image };
                measured.push(node.measure(&client, &registry, image, recipe.command)?);
            }
        }
        print(name, &starts);
    }
    Ok(())
}

fn print(image: &str, starts: &[Vec<Start>]) {
    let middle = |starts: &[Start], of: fn(&Start) -> f64| median(starts.iter().map(of).collect());
    let full = starts.first().map_or(f64::NAN, |starts| middle(starts, |start| start.ended));
    for (way, starts) in WAYS.iter().zip(starts) {
        let ended = middle(starts, |start| start.ended);
        println!(
            "{image:<8} {way:<10} {:>9.2} {ended:>9.2} {:>7.2}x {:>11.1}",
            middle(starts, |start| start.pulled),
            full / ended,
            middle(starts, |start| start.bytes as f64) / 1e6
        );
    }
}

/// The program that speaks the CRI; its path.
fn client() -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    output(
        cargo.args(["build", "--quiet", "--package", "sluice", "--example", "cri_start"]).current_dir(top()),
    )?;
    Ok(target().join("debug/examples/cri_start"))
}

/// The image of pods' sandboxes: something that sleeps.
fn pause(images: &Path) -> Result<()> {
    let layout = images.join("pause");
    if layout.join("index.json").exists() {
        return Ok(());
    }
    let tree = layout.join("tree");
    std::fs::create_dir_all(&tree)?;
    std::fs::copy("/bin/busybox", tree.join("busybox")).context("busybox-static")?;
    make_image(&layout, &["/busybox", "sleep", "2147483647"])
}

/// A containerd with the CRI on a snapshotter.
#[derive(Debug)]
struct Node {
    child: Child,
    socket: PathBuf,
}

impl Node {
    fn start(dir: &Path, snapshotter: &str, proxy: Option<&Path>, pause: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let socket = dir.join("c.sock");
        let proxy = proxy.map_or(String::new(), |address| {
            format!("[proxy_plugins.{snapshotter}]\ntype = \"snapshot\"\naddress = {address:?}\n")
        });
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n[grpc]\naddress = {socket:?}\n{proxy}\
             [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {pause:?}\nstream_server_port = \"0\"\n\
             restrict_oom_score_adj = true\ndisable_apparmor = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = {root:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = {snapshotter:?}\n\
             disable_snapshot_annotations = false\n",
            root = dir.join("root"),
            state = dir.join("state"),
        );
        std::fs::write(dir.join("config.toml"), config)?;
        let child = spawn(Command::new("containerd").arg("--config").arg(dir.join("config.toml")), dir)?;
        let node = Self { child, socket };
        until("containerd answers", || node.ctr(&["version"]).is_ok())?;
        until("the snapshotter is known", || {
            node.ctr(&["-n", "k8s.io", "snapshots", "--snapshotter", snapshotter, "ls"]).is_ok()
        })?;
        Ok(node)
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        output(Command::new("ctr").arg("--address").arg(&self.socket).args(arguments))
    }

    /// The same image for the stargz snapshotter, in the same registry.
    fn convert(&self, ctr_remote: &Path, image: &str, converted: &str) -> Result<()> {
        self.ctr(&["images", "pull", "--plain-http", image])?;
        let remote = |arguments: &[&str]| {
            output(Command::new(ctr_remote).arg("--address").arg(&self.socket).args(arguments))
        };
        remote(&["images", "convert", "--estargz", "--oci", image, converted])?;
        remote(&["images", "push", "--plain-http", converted])?;
        self.ctr(&["images", "rm", "--sync", image, converted]).map(|_| ())
    }

    /// One start, of an image that is not here, with cold caches.
    fn measure(&self, client: &Path, registry: &Registry, image: &str, command: &[&str]) -> Result<Start> {
        script("sync; echo 3 > /proc/sys/vm/drop_caches", &[])?;
        registry.reset()?;
        let said = output(Command::new(client).arg(&self.socket).arg(image).args(command))?;
        let bytes = registry.bytes_sent()?;
        let times: Value = serde_json::from_str(&said)?;
        let time = |name: &str| times.get(name).and_then(Value::as_f64).with_context(|| format!("no {name}"));
        let start = Start { pulled: time("pulled_s")?, ended: time("ended_s")?, bytes };
        self.ctr(&["-n", "k8s.io", "images", "rm", "--sync", image])?;
        Ok(start)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// The stargz snapshotter.
#[derive(Debug)]
struct Stargz {
    child: Child,
    socket: PathBuf,
}

impl Stargz {
    /// `registry` is its address, with a name behind it.
    fn start(programs: &Path, dir: &Path, registry: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let host = registry.split('/').next().unwrap_or_default();
        let config = format!("[[resolver.host.\"{host}\".mirrors]]\nhost = \"{host}\"\ninsecure = true\n");
        std::fs::write(dir.join("config.toml"), config)?;
        let socket = dir.join("s.sock");
        let mut command = Command::new(programs.join("containerd-stargz-grpc"));
        command.arg("--address").arg(&socket).arg("--root").arg(dir.join("root"));
        let child = spawn(command.arg("--config").arg(dir.join("config.toml")), dir)?;
        let stargz = Self { child, socket };
        until("the stargz snapshotter listens", || stargz.socket.exists())?;
        Ok(stargz)
    }
}

impl Drop for Stargz {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn spawn(command: &mut Command, dir: &Path) -> Result<Child> {
    let log = std::fs::File::create(dir.join("log"))?;
    let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("cannot start {command:?}"))
}

fn end(child: &mut Child) {
    let pid = child.id().to_string();
    if let Err(error) = Command::new("kill").arg(&pid).status().and_then(|_| child.wait()) {
        eprintln!("cannot stop process {pid}: {error}");
    }
}

fn until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > Duration::from_secs(60) {
            bail!("{what}: not within a minute");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
