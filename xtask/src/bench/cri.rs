//! `cargo xtask bench cri`: from kubelet's question for an image to the end of its command, by the real CRI: overlayfs with a full pull,
//! streamed by Sluice with and without a start pack, and by the stargz snapshotter, if its programs are at hand, from images converted
//! for it with and without landmarks; taking turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::containerd::Containerd;
use crate::install::make_image;
use crate::measure::{Bench, median};
use crate::run::{output, target, top};
use crate::sluice::Sluice;
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

/// A way to have an image on a node.
#[derive(Debug)]
struct Way {
    name: &'static str,
    snapshotter: &'static str,
    /// What is in the image's repository, or what it was converted to.
    published: &'static str,
    /// How much faster our way with a start pack is to be.
    target: Option<f64>,
}

/// The first is what the others are compared with; those of stargz come last. What one was told is what the command reads.
const WAYS: [Way; 5] = [
    Way { name: "overlayfs", snapshotter: "overlayfs", published: "plain", target: None },
    Way { name: "sluice", snapshotter: "sluice", published: "index", target: None },
    Way { name: PACK, snapshotter: "sluice", published: "pack", target: None },
    Way { name: "stargz", snapshotter: "stargz", published: "stargz", target: Some(2.0) },
    Way { name: "stargz-told", snapshotter: "stargz", published: "stargz-told", target: Some(1.0) },
];
/// Our way with a start pack.
const PACK: &str = "sluice-pack";

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
    if args.stargz.is_none() {
        println!("stargz is LEFT OUT: no --stargz");
    }
    let work = target().join("sluice-bench-cri");
    let containerd = Containerd::start(&work.join("containerd"))?;
    println!(
        "{:<8} {:<12} {:>9} {:>22} {:>8} {:>11}",
        "image", "way", "pulled s", "ended s", "ratio", "fetched MB"
    );
    for name in &args.images {
        let recipe = image_maker::recipe(name)?;
        let images = image_maker::make(recipe)?;
        let bench = Bench::new(
            (&binary, work.clone(), &containerd),
            (&images, recipe.name),
            (&args.rate, &args.delay),
            (recipe.command, None),
        )?;
        pause(&work.join("layouts"))?;
        bench.index()?;
        bench.learn()?;
        let stargz = args.stargz.as_deref();
        if let Some(programs) = stargz {
            let node = Node::start(&work.join("node"), "overlayfs", None, &bench.registry.image("pause"))?;
            node.convert(&programs.join("ctr-remote"), &bench, recipe.command)?;
        }
        let ways = WAYS.iter().filter(|way| stargz.is_some() || way.snapshotter != "stargz");
        let mut measured: Vec<(&Way, Vec<Start>)> = ways.map(|way| (way, Vec::new())).collect();
        for _ in 0..args.rounds {
            for (way, starts) in &mut measured {
                starts.push(start(way, &bench, &work, (&binary, &client, stargz), recipe.command)?);
            }
        }
        print(name, &measured);
    }
    Ok(())
}

/// One start on a new node, with cold caches.
fn start(
    way: &Way,
    bench: &Bench<'_>,
    work: &Path,
    (binary, client, stargz): (&Path, &Path, Option<&Path>),
    command: &[&str],
) -> Result<Start> {
    let pause = bench.registry.image("pause");
    // containerd ends before its snapshotter.
    let (agent, daemon, socket);
    match (way.snapshotter, stargz) {
        ("sluice", _) => {
            let config = if way.name == PACK { "" } else { "[prefetch]\nenabled = false\n" };
            agent = Sluice::new(binary, &work.join("agent"), config)?;
            agent.start_daemon()?;
            socket = Some(agent.path("state/snapshotter.sock"));
        }
        ("stargz", Some(programs)) => {
            daemon = Stargz::start(programs, &work.join("stargz"), &pause)?;
            socket = Some(daemon.socket.clone());
        }
        _ => socket = None,
    }
    let node = Node::start(&work.join("node"), way.snapshotter, socket.as_deref(), &pause)?;
    bench.cold()?;
    let said = output(Command::new(client).arg(&node.socket).arg(bench.image(way.published)).args(command))?;
    let bytes = bench.registry.bytes_sent()?;
    let times: Value = serde_json::from_str(&said)?;
    let time = |name: &str| times.get(name).and_then(Value::as_f64).with_context(|| format!("no {name}"));
    Ok(Start { pulled: time("pulled_s")?, ended: time("ended_s")?, bytes })
}

fn print(image: &str, measured: &[(&Way, Vec<Start>)]) {
    let middle = |starts: &[Start], of: fn(&Start) -> f64| median(starts.iter().map(of).collect());
    let full = measured.first().map_or(f64::NAN, |(_, starts)| middle(starts, |start| start.ended));
    let (mut packed, mut verdicts) = (f64::NAN, Vec::new());
    for (way, starts) in measured {
        let ended = middle(starts, |start| start.ended);
        let times = starts.iter().map(|start| start.ended);
        let (least, most) =
            times.fold((f64::INFINITY, 0.0_f64), |(least, most), one| (least.min(one), most.max(one)));
        println!(
            "{image:<8} {:<12} {:>9.2} {:>22} {:>7.2}x {:>11.1}",
            way.name,
            middle(starts, |start| start.pulled),
            format!("{ended:.2} [{least:.2} to {most:.2}]"),
            full / ended,
            middle(starts, |start| start.bytes as f64) / 1e6
        );
        if way.name == PACK {
            packed = ended;
        }
        verdicts.extend(way.target.map(|target| (way.name, ended / packed, target)));
    }
    for (name, ratio, target) in verdicts {
        let met = if ratio >= target { "met:    " } else { "NOT MET:" };
        println!("{met} {image}, {PACK} beside {name}: {ratio:.2} >= {target}");
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
fn pause(layouts: &Path) -> Result<()> {
    let layout = layouts.join("pause");
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
        anew(dir)?;
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

    /// The same image for the stargz snapshotter, in the same registry: plain, and told what the command reads.
    fn convert(&self, ctr_remote: &Path, bench: &Bench<'_>, command: &[&str]) -> Result<()> {
        let image = bench.image("plain");
        self.ctr(&["images", "pull", "--plain-http", &image])?;
        let (entrypoint, arguments) =
            (json!(command.get(..1)).to_string(), json!(command.get(1..)).to_string());
        let told = ["optimize", "--oci", "--entrypoint", &entrypoint, "--args", &arguments];
        for (convert, to) in [(&["convert", "--estargz", "--oci"][..], "stargz"), (&told, "stargz-told")] {
            let converted = bench.image(to);
            let remote = |arguments: &[&str]| {
                output(
                    Command::new(ctr_remote).arg("--address").arg(&self.socket).arg("images").args(arguments),
                )
            };
            remote(&[convert, &[&image, &converted]].concat())?;
            remote(&["push", "--plain-http", &converted])?;
            self.ctr(&["images", "rm", "--sync", &converted])?;
        }
        self.ctr(&["images", "rm", "--sync", &image]).map(|_| ())
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
        anew(dir)?;
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

/// An empty directory.
fn anew(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).map_err(Into::into)
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
