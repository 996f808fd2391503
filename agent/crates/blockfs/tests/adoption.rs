//! A server of blocks is killed; the next one takes its devices over while the image stays mounted. Needs root.
//!
//! This program starts itself again as the server (`serve ROOM`), therefore it has a `main` of its own.
#![allow(clippy::print_stdout, reason = "it speaks to cargo, and as a server to its parent")]

mod rig;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rig::{Mood, MoodySource, Room, attach_all, check, runtime};
use sluice_blockfs::{BlockFs, BlockSource, Device, ImageMount};
use sluice_kernel::mount::UnmountOptions;
use sluice_kernel::unmount;

const MIB: u64 = 1 << 20;
const LAYERS: usize = 3;
/// The layer whose reads wait for ever in the server.
const STUCK: usize = 2;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("serve") => serve(Path::new(&arguments[2])),
        // `cargo test -- --list` and filters of other tests' names come here as well.
        Some("--list") => println!("a_killed_servers_devices_are_adopted: test"),
        _ => {
            a_killed_servers_devices_are_adopted();
            println!("test a_killed_servers_devices_are_adopted ... ok");
        }
    }
}

/// Mounts the image of the room through this process, says so, and waits to be killed.
fn serve(room: &Path) {
    let runtime = runtime();
    let sources: Vec<_> =
        (0..LAYERS).map(|layer| MoodySource::open(&room.join(format!("layer{layer}")))).collect();
    let blockfs = rig::mount_blocks(room, &runtime);
    let devices = attach_all(&blockfs, &sources);
    let image =
        ImageMount::mount(&room.join("metadata.erofs"), devices, &room.join("image")).expect("mounts");
    sources[STUCK].set(Mood::Stuck);
    println!("serving {}", image.dir().display());
    std::io::stdin().read_to_end(&mut Vec::new()).expect("reads");
    unreachable!("the test kills this process before it closes its input");
}

fn start_server(room: &Room) -> Child {
    let own = std::env::current_exe().expect("own path");
    let mut command = Command::new(own);
    command.arg("serve").arg(room.dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = command.spawn().expect("starts");
    let mut line = String::new();
    let out = server.stdout.take().expect("is piped");
    BufReader::new(out).read_line(&mut line).expect("reads");
    assert!(line.starts_with("serving"), "the server says {line:?}");
    server
}

fn a_killed_servers_devices_are_adopted() {
    let room = Room::new(&[vec![4 * MIB, 700], vec![2 * MIB], vec![MIB]]);
    let mut server = start_server(&room);
    let root = room.path("image");
    check(&root, &room.samples[1]);
    let held = File::open(root.join(&room.samples[0].path)).expect("opens");
    held.read_exact_at(&mut [0; 8], 0).expect("reads");
    // One layer was complete: its reads need no server.
    let numbers = layer_devices(&room);
    assert_eq!(numbers.len(), LAYERS, "{:?}", room.devices());
    Device::adopt(numbers[1]).expect("adopts").hand_over(&room.layers[1]).expect("handed over");

    kill_during_a_read(&room, &mut server);
    room.forget(&root);
    check(&root, &room.samples[2]);
    let error = held.read_exact_at(&mut [0; 8], 0).expect_err("nobody serves");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");

    let start = Instant::now();
    let runtime = runtime();
    let blockfs = take_over(&room, &runtime, &numbers);
    eprintln!("taken over in {:?}", start.elapsed());
    let mut word = [0; 8];
    held.read_exact_at(&mut word, 0).expect("reads again");
    assert_eq!(word, rig::word(0, 0));
    room.check(&root);
    room.forget(&root);
    room.check(&root);

    drop(held);
    unmount(&root, UnmountOptions::default()).expect("nobody uses it");
    blockfs.unmount().expect("unmounts");
    room.assert_released();
}

/// The device numbers of layers 0, 1...: the server attached them in this order, so their FUSE files' numbers rise.
fn layer_devices(room: &Room) -> Vec<u32> {
    let mut found = room.devices();
    found.retain(|device| device.backing_file.starts_with(room.path("blocks")));
    found.sort_unstable_by(|a, b| a.backing_file.cmp(&b.backing_file));
    found.into_iter().map(|device| device.number).collect()
}

/// A read that waits in the server when it dies fails; it does not hang.
fn kill_during_a_read(room: &Room, server: &mut Child) {
    let path = room.path("image").join(&room.samples.last().expect("a file").path);
    let (send, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let read = File::open(path).and_then(|file| file.read_exact_at(&mut [0; 8], 0));
        send.send(read).expect("the test waits");
    });
    let early = result.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err(), "the read did not wait: {early:?}");
    server.kill().expect("killed");
    server.wait().expect("waited");
    let read = result.recv_timeout(Duration::from_secs(10)).expect("the read hangs after its server died");
    assert_eq!(read.expect_err("nobody served it").raw_os_error(), Some(5));
}

/// What the next agent does: the dead mount goes, a new one takes its place, the devices get files of it.
fn take_over(room: &Room, runtime: &tokio::runtime::Runtime, numbers: &[u32]) -> BlockFs {
    unmount(&room.path("blocks"), UnmountOptions { lazy: true, force: false }).expect("the dead mount goes");
    for listed in sluice_kernel::loop_device::list().expect("listed") {
        if numbers.contains(&listed.number) {
            eprintln!("loop{} is on {}", listed.number, listed.backing_file.display());
        }
    }
    let blockfs = room.blockfs(runtime);
    for (layer, number) in numbers.iter().enumerate().filter(|(layer, _)| *layer != 1) {
        let source = MoodySource::open(&room.layers[layer]);
        source.set(Mood::Mixed);
        let path = blockfs.add(&format!("layer{layer}"), source as Arc<dyn BlockSource>);
        Device::adopt(*number).expect("adopts").hand_over(&path).expect("taken over");
    }
    blockfs
}
