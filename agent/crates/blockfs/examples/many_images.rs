//! What many images cost a node: time to mount, descriptors, loop devices, kernel memory.
//!
//! `cargo run --release -p sluice-blockfs --example many_images [IMAGES]`, as root. Each image has five layers out of twenty that
//! images share, and three of its own. The kernel keeps the numbers of free loop devices (`/dev/loopN`) afterwards.
#![allow(clippy::print_stdout, reason = "it is what it is for")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rig::{MoodySource, Room, check, mount_image, runtime};
use sluice_blockfs::{BlockFs, BlockSource, Device, Way};

const SHARED: usize = 20;
const SHARED_PER_IMAGE: usize = 5;
const OWN_PER_IMAGE: usize = 3;

fn main() {
    let images: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(500);
    let (runtime, room) = (runtime(), Room::new(&vec![vec![70_000, 5]; SHARED_PER_IMAGE + OWN_PER_IMAGE]));
    let blockfs = room.blockfs(&runtime, Way::IoUring);
    let sources = room.sources();
    let attach = |name: String, layer: usize| attach(&blockfs, &name, &sources[layer]);
    // Layer `n` of each image has the content of the room's layer `n`, so a shared device keeps its place.
    let shared: Vec<_> = (0..SHARED).map(|n| attach(format!("shared{n}"), n % SHARED_PER_IMAGE)).collect();
    let (start, slab, devices) = (Instant::now(), kernel_memory_kib(), room.devices().len());
    let mut mounted = Vec::new();
    for image in 0..images {
        let group = image % (SHARED / SHARED_PER_IMAGE) * SHARED_PER_IMAGE;
        let mut layers = shared[group..group + SHARED_PER_IMAGE].to_vec();
        for own in 0..OWN_PER_IMAGE {
            layers.push(attach(format!("image{image}-{own}"), SHARED_PER_IMAGE + own));
        }
        mounted.push(mount_image(&room, layers, &format!("image{image}")));
    }
    let took = start.elapsed();
    let per_image = |kib: u64| kib / images as u64;
    println!("{images} images mounted in {took:?}, {:?} each", took / images as u32);
    println!("descriptors of this process: {}", fs::read_dir("/proc/self/fd").expect("reads").count());
    println!("loop devices: {}", room.devices().len() - devices);
    println!("kernel memory: {} KiB an image", per_image(kernel_memory_kib().saturating_sub(slab)));
    println!("resident: {} KiB", resident_kib());
    let start = Instant::now();
    let listed = sluice_kernel::loop_device::list().expect("listed").len();
    println!("listing {listed} loop devices: {:?}", start.elapsed());
    let start = Instant::now();
    for image in &mounted {
        room.samples.iter().for_each(|sample| check(image.dir(), sample));
    }
    println!("all files of all images read and right in {:?}", start.elapsed());
    let start = Instant::now();
    drop(shared);
    for image in mounted {
        image.unmount().expect("unmounts");
    }
    println!("unmounted in {:?}", start.elapsed());
    blockfs.unmount().expect("unmounts");
    room.assert_released();
    println!("all released after {:?}", start.elapsed());
}

fn attach(blockfs: &BlockFs, name: &str, source: &Arc<MoodySource>) -> Arc<Device> {
    let path = blockfs.add(name, Arc::clone(source) as Arc<dyn BlockSource>).expect("added").remove(0);
    Arc::new(Device::attach(&path).expect("attaches"))
}

/// Slab, per-CPU areas and stacks.
fn kernel_memory_kib() -> u64 {
    ["Slab:", "Percpu:", "KernelStack:"].iter().map(|name| field(Path::new("/proc/meminfo"), name)).sum()
}

fn resident_kib() -> u64 {
    field(Path::new("/proc/self/status"), "VmRSS:")
}

fn field(path: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(path).expect("reads");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the field is there");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
