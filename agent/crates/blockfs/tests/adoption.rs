//! Agents are killed at random times, one after the other, while an image is read in every way, fills and is handed over. The
//! server of block files stays. No operation may fail, no byte may be wrong. Needs root.
//!
//! This program starts itself again as the server (`server ROOM WAY`), as agents (`agent ROOM`) and as the process that starts and kills those
//! (`agents ROOM`), therefore it has a `main` of its own. The last cannot be the process that reads: to start another one it maps
//! memory, for which it would wait until a page fault of its readers has what only that agent brings.
#![allow(clippy::print_stdout, reason = "it speaks to cargo, and as an agent to its parent")]

mod rig;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use rig::walk::{READINGS, Seen, walk};
use rig::{Room, options, runtime, wait_until, ways, word};
use sluice_blockfs::{BlockFs, BlockSource, Device, ImageMount, Options, ReadError, Way};
use sluice_kernel::mount::UnmountOptions;
use sluice_kernel::{loop_device, unmount};

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 256 << 10;
const LAYERS: usize = 4;
const KILLS: u64 = 20;
/// Chunks that an agent fills a second: the image is complete some kills before the end.
const FILL_PAUSE: Duration = Duration::from_millis(20);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("server") => server(Path::new(&arguments[2]), &arguments[3]),
        Some("agent") => agent(Path::new(&arguments[2])),
        Some("agents") => agents(&arguments[2]),
        // `cargo test -- --list` and filters of other tests' names come here as well.
        Some("--list") => {
            println!("killed_agents_are_not_noticed: test\nreads_fail_when_no_agent_comes: test")
        }
        _ => {
            for way in ways() {
                killed_agents_are_not_noticed(way);
                println!("test killed_agents_are_not_noticed by {way} ... ok");
                reads_fail_when_no_agent_comes(way);
                println!("test reads_fail_when_no_agent_comes by {way} ... ok");
            }
        }
    }
}

fn server(room: &Path, way: &str) {
    let way = ways().into_iter().find(|known| known.to_string() == way).expect("a way");
    let options = Options { patience: Duration::from_secs(3), ..options(way) };
    sluice_blockfs::serve(&room.join("blocks"), &room.join("socket"), options, || Ok(())).expect("serves");
}

/// A layer whose registry is a file with everything in it, and whose local file fills as time goes by.
#[derive(Debug)]
struct FillingSource {
    registry: File,
    local: Arc<File>,
    size: u64,
    /// Bytes up to here are in the local file; kept in a file of its own, for the next agent.
    filled: AtomicU64,
    record: File,
}

impl FillingSource {
    fn open(room: &Path, layer: usize) -> Arc<Self> {
        let registry = File::open(room.join(format!("layer{layer}"))).expect("opens");
        let size = registry.metadata().expect("stat").len();
        let open = |path: &Path| {
            File::options().read(true).write(true).create(true).truncate(false).open(path).expect("opens")
        };
        let local = open(&local_path(room, layer));
        local.set_len(size).expect("sized");
        let record = open(&room.join(format!("record{layer}")));
        let mut number = [0; 8];
        // Nothing is recorded at first.
        let filled = record.read_exact_at(&mut number, 0).map_or(0, |()| u64::from_le_bytes(number));
        Arc::new(Self { registry, local: Arc::new(local), size, filled: AtomicU64::new(filled), record })
    }

    fn complete(&self) -> bool {
        self.filled.load(Ordering::Acquire) == self.size
    }

    fn fill_one(&self) {
        let at = self.filled.load(Ordering::Acquire);
        let end = (at + CHUNK).min(self.size);
        let mut bytes = vec![0; (end - at) as usize];
        self.registry.read_exact_at(&mut bytes, at).expect("reads");
        self.local.write_all_at(&bytes, at).expect("writes");
        self.record.write_all_at(&end.to_le_bytes(), 0).expect("writes");
        self.filled.store(end, Ordering::Release);
    }
}

impl BlockSource for FillingSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, _: u64, _: &mut [u8]) -> std::io::Result<bool> {
        Ok(false)
    }

    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>> {
        async move {
            tokio::time::sleep(Duration::from_millis(1 + offset / CHUNK % 8)).await;
            let mut bytes = vec![0; len];
            self.registry.read_exact_at(&mut bytes, offset).expect("reads");
            Ok(bytes.into())
        }
        .boxed()
    }

    fn file(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.local))
    }

    fn on_disk(&self, range: Range<u64>) -> Range<u64> {
        range.start..self.filled.load(Ordering::Acquire).clamp(range.start, range.end)
    }
}

fn local_path(room: &Path, layer: usize) -> PathBuf {
    room.join(format!("local{layer}"))
}

/// Takes over whatever there is, fills the layers one after the other and hands them over. Ends when told to, or killed.
fn agent(room: &Path) {
    let runtime = runtime();
    let blockfs = BlockFs::connect(&room.join("blocks"), &room.join("socket"), runtime.handle().clone());
    let blockfs = blockfs.expect("connects");
    let sources: Vec<_> = (0..LAYERS).map(|layer| FillingSource::open(room, layer)).collect();
    let add = |(layer, source): (usize, &Arc<FillingSource>)| {
        let source = Arc::clone(source) as Arc<dyn BlockSource>;
        blockfs.add(&format!("layer{layer}"), source).expect("added").remove(0)
    };
    let paths: Vec<_> = sources.iter().enumerate().map(add).collect();
    let image = room.join("image");
    if !sluice_kernel::mount::is_mount_point(&image).expect("known") {
        let attach = |path: &PathBuf| Arc::new(Device::attach(path).expect("attaches"));
        let devices = paths.iter().map(attach).collect();
        ImageMount::mount(&room.join("metadata.erofs"), devices, &image).expect("mounts");
    }
    println!("serving");
    std::thread::scope(|scope| {
        scope.spawn(|| fill(room, &blockfs, &sources, &paths));
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).expect("reads");
    });
    unmount(&image, UnmountOptions::default()).expect("nobody uses it");
    blockfs.unmount().expect("unmounts");
}

fn fill(room: &Path, blockfs: &BlockFs, sources: &[Arc<FillingSource>], paths: &[PathBuf]) {
    for (layer, source) in sources.iter().enumerate() {
        while !source.complete() {
            source.fill_one();
            std::thread::sleep(FILL_PAUSE);
        }
        blockfs.all_is_local(&paths[layer]).expect("said");
        for device in loop_device::list().expect("listed") {
            if device.backing_file == paths[layer] {
                let local = local_path(room, layer);
                Device::adopt(device.number).expect("adopts").hand_over(&local).expect("handed over");
            }
        }
    }
}

/// Starts an agent; kills it, or starts the next one, as it is told, and says so. At the end of its input the agent unmounts all.
fn agents(room: &str) {
    let start = || {
        let mut agent = Process::start(&["agent", room]);
        assert_eq!(agent.line(), "serving");
        println!("serving");
        agent
    };
    let mut agent = start();
    for line in std::io::stdin().lines() {
        match line.expect("reads").as_str() {
            "kill" => {
                agent.kill();
                println!("killed");
            }
            _ => agent = start(),
        }
    }
    agent.end();
}

/// A server, an agent, or what starts those; a test that fails leaves none behind: an agent ends with what started it.
struct Process(Child);

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self(command.spawn().expect("starts"))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().expect("is piped")).read_line(&mut line).expect("reads");
        line.trim_end().to_owned()
    }

    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("waited");
    }

    fn kill_agent(&mut self) {
        writeln!(self.0.stdin.as_mut().expect("is piped"), "kill").expect("written");
        assert_eq!(self.line(), "killed");
    }

    fn next_agent(&mut self) {
        writeln!(self.0.stdin.as_mut().expect("is piped"), "start").expect("written");
        assert_eq!(self.line(), "serving");
    }

    /// Has the agent unmount all.
    fn end(&mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().expect("waited").success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.kill();
        }
    }
}

fn start_server(room: &Room, way: Way) -> Process {
    fs::create_dir(room.path("blocks")).expect("made");
    let server = Process::start(&["server", room.dir.path().to_str().expect("text"), &way.to_string()]);
    wait_until("the server listens", || UnixStream::connect(room.path("socket")).is_ok());
    server
}

fn start_agents(room: &Room) -> Process {
    let mut agents = Process::start(&["agents", room.dir.path().to_str().expect("text")]);
    assert_eq!(agents.line(), "serving");
    agents
}

fn killed_agents_are_not_noticed(way: Way) {
    let room = Room::with_program(&[vec![6 * MIB, 700, 5000], vec![8 * MIB], vec![3, 4096, 4 * MIB]]);
    let mut server = start_server(&room, way);
    let mut agents = start_agents(&room);
    let (root, done, seen) = (room.path("image"), AtomicBool::new(false), Seen::default());
    let mut restarts = Vec::new();
    std::thread::scope(|scope| {
        let readers: Vec<_> = READINGS
            .iter()
            .map(|reading| scope.spawn(|| walk(&room, &root, *reading, &done, &seen)))
            .collect();
        for number in 0..KILLS {
            let lived = u64::from_le_bytes(word(9, number * 8)) % 300;
            std::thread::sleep(Duration::from_millis(20 + lived));
            let start = Instant::now();
            agents.kill_agent();
            agents.next_agent();
            restarts.push(start.elapsed());
            assert!(!readers.iter().any(|reader| reader.is_finished()), "a reader failed");
        }
        let complete = || (0..LAYERS).all(|layer| FillingSource::open(room.dir.path(), layer).complete());
        wait_until("the layers are complete", complete);
        std::thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
    });
    let longest_restart = restarts.iter().max().expect("some");
    println!(
        "{way}: {} operations, {KILLS} agents killed, no agent for {longest_restart:?} at most; longest operations: {}",
        seen.operations.load(Ordering::Relaxed),
        seen.longest(),
    );
    room.forget(&root);
    room.check(&root);
    agents.end();
    assert!(server.0.wait().expect("waited").success());
    room.assert_released();
}

/// A reader must not hang for ever; and what is local is read all the same.
fn reads_fail_when_no_agent_comes(way: Way) {
    let room = Room::with_program(&[vec![MIB], vec![MIB], vec![MIB]]);
    let mut server = start_server(&room, way);
    let source = FillingSource::open(room.dir.path(), 0);
    (0..4).for_each(|_| source.fill_one());
    let mut agents = start_agents(&room);
    agents.kill_agent();
    let root = room.path("image");
    rig::check(&root, &room.samples[0]);
    let waiting = File::open(root.join(&room.samples[2].path)).expect("opens");
    let start = Instant::now();
    let error = waiting.read_exact_at(&mut [0; 8], 900 << 10).expect_err("nobody has these bytes");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    println!("{way}: without an agent a read failed after {:?}", start.elapsed());
    rig::check(&root, &room.samples[0]);
    // The next agent brings them all the same.
    agents.next_agent();
    room.forget(&root);
    room.check(&root);
    drop(waiting);
    agents.end();
    assert!(server.0.wait().expect("waited").success());
    room.assert_released();
}
