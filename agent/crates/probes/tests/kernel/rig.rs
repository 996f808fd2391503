//! A real EROFS image on a loop device, under a real overlay, as containers have it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{ErofsMount, LoopDevice, LoopOptions, OverlayMount, mount_erofs, mount_overlay, unmount};
use sluice_probes::{Device, Event, Options, Probes};
use sluice_trace::{Capability, Level, Levels, What};

/// A blob that can be mounted again and again, and the tree it is of.
pub(crate) struct Image {
    room: tempfile::TempDir,
}

impl Image {
    /// Of what `fill` puts into a directory.
    pub(crate) fn new(fill: impl FnOnce(&Path)) -> Self {
        let image = Self { room: tempfile::tempdir_in("/var/tmp").expect("a directory") };
        let tree = image.tree();
        fs::create_dir(&tree).expect("a directory");
        fill(&tree);
        run(Command::new("mkfs.erofs").arg("--quiet").arg(image.blob()).arg(&tree));
        image
    }

    /// Outside of any image.
    pub(crate) fn tree(&self) -> PathBuf {
        self.room.path().join("tree")
    }

    pub(crate) fn blob(&self) -> PathBuf {
        self.room.path().join("image.erofs")
    }
}

/// A mounted image. Dropping it unmounts everything.
pub(crate) struct Stage {
    /// Where the overlay is.
    pub(crate) merged: PathBuf,
    /// Where the image itself is.
    pub(crate) image: PathBuf,
    /// The image's file system.
    pub(crate) device: Device,
    _room: tempfile::TempDir,
    mounted: Vec<PathBuf>,
}

impl Stage {
    /// Mounts an image. Nothing of it is in the page cache.
    pub(crate) fn new(image: &Image) -> Self {
        Self::of(&image.blob())
    }

    /// Mounts an image's blob.
    pub(crate) fn of(blob: &Path) -> Self {
        let room = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let top = room.path().to_path_buf();
        let make = |name: &str| {
            let path = top.join(name);
            fs::create_dir_all(&path).expect("a directory");
            path
        };
        let (image, merged, scratch) = (make("image"), make("merged"), make("scratch"));
        let options = LoopOptions { direct_io: true, autoclear: true, ..LoopOptions::default() };
        let loop_device =
            LoopDevice::attach(File::open(blob).expect("opens").as_fd(), options).expect("a loop device");
        let mut stage = Self { merged, image, device: Device(0), _room: room, mounted: Vec::new() };
        let restrictions = Restrictions::default();
        let device = loop_device.path().to_path_buf();
        mount_erofs(&ErofsMount { device, extra_devices: vec![], restrictions }, &stage.image)
            .expect("mounts");
        stage.mounted.push(stage.image.clone());
        let none: Option<&str> = None;
        nix::mount::mount(Some("none"), &scratch, Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .expect("tmpfs");
        stage.mounted.push(scratch.clone());
        let upper = make("scratch/upper");
        let upper_and_work = Some((upper, make("scratch/work")));
        let lower = vec![stage.image.clone()];
        let overlay = OverlayMount { lower, upper_and_work, options: vec![], restrictions };
        mount_overlay(&overlay, &stage.merged).expect("mounts");
        stage.mounted.push(stage.merged.clone());
        // For a switch that must make tests fail: probes that watch something else.
        let elsewhere = std::env::var_os("PROBES_BROKEN").is_some();
        let watched = if elsewhere { Path::new("/proc") } else { stage.image.as_path() };
        stage.device = Device::from_stat(fs::metadata(watched).expect("is there").dev());
        stage
    }

    /// A path in the overlay.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.merged.join(name)
    }

    /// Inode number in the image.
    pub(crate) fn inode(&self, name: &str) -> u64 {
        fs::symlink_metadata(self.image.join(name)).expect("is in the image").ino()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for mounted in self.mounted.drain(..).rev() {
            if let Err(error) = unmount(&mounted, UnmountOptions::default()) {
                eprintln!("{}: {error}", mounted.display());
            }
        }
    }
}

/// Runs a command that must succeed, and gives its process number.
pub(crate) fn run(command: &mut Command) -> u32 {
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let id = child.id();
    let status = child.wait().expect("waited");
    assert!(status.success(), "{command:?}: {status}");
    id
}

/// Loaded once for all tests: that is what takes the time, above all in a guest without hardware help.
static ENGINES: Mutex<Vec<Probes>> = Mutex::new(Vec::new());

/// Runs a test with the probes by every kind of hook that this kernel has. It must watch nothing any more when it ends.
pub(crate) fn with_every_engine(test: impl Fn(&mut Probes)) {
    let mut engines = ENGINES.lock().unwrap_or_else(|poisoned| {
        // A test that failed may have left watches.
        ENGINES.clear_poison();
        let mut engines = poisoned.into_inner();
        engines.clear();
        engines
    });
    if engines.is_empty() {
        *engines = every_engine(&Options::default());
    }
    for probes in engines.iter_mut() {
        probes.drain(|_earlier| {}).expect("drained");
        eprintln!("with {:?}; not with {:?}", probes.levels().reached, probes.levels().refused);
        test(probes);
    }
}

pub(crate) fn every_engine(options: &Options) -> Vec<Probes> {
    let mut engines = Vec::new();
    for highest in [Level::Fexit, Level::Kprobe, Level::Tracepoint] {
        let probes = Probes::load(&Options { highest, ..options.clone() }).expect("loads");
        let Levels { reached, refused } = probes.levels();
        // The best must have everything. Tracepoints alone do not see accesses to pages in memory before 6.12.
        if reached.len() < Capability::ALL.len() {
            assert!(highest < Level::Fexit, "not everything can be recorded: {reached:?}; not {refused:?}");
            continue;
        }
        let lowest = reached.values().all(|level| *level <= Level::Tracepoint);
        engines.push(probes);
        if lowest {
            break;
        }
    }
    engines
}

/// What was recorded of `device` until now, fills included.
pub(crate) fn recorded(probes: &mut Probes, device: Device) -> Vec<Event> {
    let mut events = Vec::new();
    probes.drain(|event| events.push(event)).expect("drained");
    probes.take_fills(device, None, |event| events.push(event)).expect("taken");
    events
}

/// Drains until `enough`, at most some seconds: what interrupts record may come a little later.
pub(crate) fn recorded_until(
    probes: &mut Probes,
    device: Device,
    enough: impl Fn(&[Event]) -> bool,
) -> Vec<Event> {
    let begin = Instant::now();
    let mut events = recorded(probes, device);
    while !enough(&events) && begin.elapsed() < Duration::from_secs(5) {
        probes.wait(Duration::from_millis(20)).expect("waited");
        events.extend(recorded(probes, device));
    }
    events
}

/// Whether an access of the given kinds to `offset` of `inode` is among the events.
pub(crate) fn touched(events: &[Event], inode: u64, offset: u64, kinds: &[sluice_trace::AccessKind]) -> bool {
    events.iter().any(|event| match &event.record.what {
        What::Access { kind, inode: of, offset: from, len } => {
            *of == inode && (*from..from + len).contains(&offset) && kinds.contains(kind)
        }
        _ => false,
    })
}
