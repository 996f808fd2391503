//! What a soak works on: images whose contents are known, a registry, and a node on a small disk of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::disk::Disk;
use super::disk::server::{DiskFaults, Failed};
use super::random::Random;
use super::{lock, room};
use crate::image_maker;
use crate::run::{output, script, target};
use crate::sluice::Registry;

/// Layers that images are made of, two each.
const LAYERS: u64 = 5;
const IMAGES: u64 = 4;
const FILES: u64 = 60;
const LARGEST: u64 = 400_000;
const BIG: usize = 3 << 20;
/// The node's disk: more than the images need, so that it is full only by a fault.
const DISK_MIB: u64 = 384;

/// An image and where its contents stand as plain files.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) reference: String,
    /// `(path in the image, file with the same content)`.
    pub(crate) files: Vec<(String, PathBuf)>,
    /// Digests of its layers, in hexadecimal digits.
    layers: Vec<String>,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct World {
    /// What everybody runs: a copy of the build, so that it can be replaced.
    binary: PathBuf,
    build: PathBuf,
    faketime: PathBuf,
    dir: PathBuf,
    disk: Mutex<Option<Disk>>,
    /// Odd while contents may not be readable.
    unreadable: AtomicU64,
    images: Vec<Image>,
    registry: Registry,
    /// Held while the store is tampered with, and by those who must not see that.
    pub(crate) quiet: std::sync::RwLock<()>,
    log: Mutex<String>,
}

impl World {
    pub(crate) fn make(build: &Path, random: &mut Random) -> Result<Self> {
        let dir = target().join("sluice-soak");
        clean(&dir)?;
        fs::create_dir_all(&dir)?;
        room::furnish(&dir)?;
        let (trees, layouts, disk) = (dir.join("trees"), dir.join("layouts"), dir.join("disk"));
        for path in [&trees, &layouts, &disk, &dir.join("mounts"), &dir.join("state")] {
            fs::create_dir_all(path)?;
        }
        let mut layers = Vec::new();
        for number in 0..LAYERS {
            layers.push((trees.join(number.to_string()), make_tree(&trees, number, random)?));
        }
        let node_disk = Disk::make(&dir, &disk, DISK_MIB)?;
        let mut images = Vec::new();
        for number in 0..IMAGES {
            let own: Vec<_> = [number, number + 1]
                .into_iter()
                .filter_map(|layer| layers.get(usize::try_from(layer).unwrap_or_default()))
                .collect();
            let paths: Vec<&Path> = own.iter().map(|(path, _)| path.as_path()).collect();
            let name = format!("soak{number}");
            image_maker::named(&layouts, &name, &paths)?;
            let file = |path: &Path, name: &String| (name.clone(), path.join(name));
            let files = own.iter().flat_map(|(path, names)| names.iter().map(|name| file(path, name)));
            let layers = layers_of(&layouts.join(&name))?;
            images.push(Image { reference: String::new(), files: files.collect(), layers, name });
        }
        let binary = dir.join("sluice");
        fs::copy(build, &binary).context("cannot copy sluice")?;
        let registry = Registry::start(build, &layouts, "400mbit", "1ms")?;
        for image in &mut images {
            image.reference = registry.image(&image.name).replace("127.0.0.1", room::HOST);
        }
        fs::write(
            dir.join("config.toml"),
            "[registry]\nplain_http = [\"*\"]\n[stream]\noutage_timeout_s = 600\n[trust]\nmode = \"any\"\n[store]\nreserve_mib = 16\nmemory_budget_mib = 16\n",
        )?;
        let world = Self {
            binary,
            build: build.to_path_buf(),
            faketime: faketime()?,
            dir,
            disk: Mutex::new(Some(node_disk)),
            unreadable: AtomicU64::new(0),
            images,
            registry,
            quiet: std::sync::RwLock::default(),
            log: Mutex::default(),
        };
        world.clock("+0")?;
        for image in world.images.iter().take(usize::try_from(IMAGES - 1).unwrap_or_default()) {
            // The last one has none: its first pull is in order.
            world.sluice(&["index", &image.reference])?;
        }
        Ok(world)
    }

    pub(crate) fn images(&self) -> &[Image] {
        &self.images
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        for (option, name) in [("--root", "disk/root"), ("--state", "state"), ("--config", "config.toml")] {
            command.arg(option).arg(self.dir.join(name));
        }
        // The clock of day only: what is measured goes on, and so do times of files.
        command
            .env("LD_PRELOAD", &self.faketime)
            .env("FAKETIME_TIMESTAMP_FILE", self.path("clock"))
            .env("FAKETIME_CACHE_DURATION", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("FAKETIME_DISABLE_SHM", "1")
            .env("NO_FAKE_STAT", "1");
        command
    }

    /// Sets the daemon's clock: so far from the right time, e.g. `-2h`.
    pub(crate) fn clock(&self, offset: &str) -> Result<()> {
        fs::write(self.path("clock"), offset).context("cannot set the clock")
    }

    /// Whether the registry's name has an address from now on.
    pub(crate) fn names(&self, known: bool) -> Result<()> {
        room::names(&self.dir, known)
    }

    /// Puts a new program in the place of the one that runs, as a package does.
    pub(crate) fn replace_binary(&self) -> Result<()> {
        let new = self.path("sluice.new");
        // By another process: what the other threads start meanwhile must not have it open for writing, or it cannot be run.
        output(Command::new("cp").arg(&self.build).arg(&new))?;
        fs::rename(&new, &self.binary).context("cannot replace sluice")
    }

    /// Faults of the disk from now on; what failed before.
    pub(crate) fn disk(&self, faults: DiskFaults) -> Result<Failed> {
        let unreadable = faults.failing_reads_one_in > 0;
        if unreadable {
            self.unreadable.fetch_or(1, Ordering::SeqCst);
        }
        let failed = lock(&self.disk).as_ref().context("there is no disk")?.faults(faults)?;
        // From odd to the next even number.
        if !unreadable && self.unreadable.load(Ordering::SeqCst) % 2 == 1 {
            self.unreadable.fetch_add(1, Ordering::SeqCst);
        }
        Ok(failed)
    }

    /// For [`World::was_disk_unreadable`].
    pub(crate) fn disk_faults(&self) -> u64 {
        self.unreadable.load(Ordering::SeqCst)
    }

    /// Whether contents may not have been readable at some time since `before`.
    pub(crate) fn was_disk_unreadable(&self, before: u64) -> bool {
        before % 2 == 1 || self.disk_faults() != before
    }

    /// Ends what waits for the disk.
    pub(crate) fn abort(&self) {
        if let Some(disk) = lock(&self.disk).as_ref() {
            disk.abort();
        }
    }

    /// What the daemon says of the layer that has a file.
    pub(crate) fn layer(&self, image: &Image, file: &str) -> String {
        let found = || {
            let layer = self.layer_status(image, file)?;
            let text = |name: &str| layer.get(name).map(ToString::to_string).unwrap_or_default();
            let state = layer.get("state")?.as_str()?;
            Some(format!("{state}, {} of {} bytes here", text("bytes_local"), text("bytes_total")))
        };
        found().unwrap_or_else(|| "state unknown".to_owned())
    }

    /// Whether a loop device is on the local file of the layer that has a file: the kernel reads that by itself.
    pub(crate) fn is_read_by_kernel(&self, image: &Image, file: &str) -> bool {
        let Some(hex) = number_in(image, file).and_then(|number| image.layers.get(number)) else {
            return false;
        };
        let data = self.path("disk/root/layers").join(hex).join("data");
        let is_on = |device: fs::DirEntry| {
            let backing = fs::read_to_string(device.path().join("loop/backing_file"));
            // A file that was removed, too: the layer came anew, and the device is still on what there was.
            let path = backing.as_deref().map(|backing| backing.trim_end().trim_end_matches(" (deleted)"));
            path.is_ok_and(|path| Path::new(path) == data)
        };
        fs::read_dir("/sys/block").is_ok_and(|devices| devices.flatten().any(is_on))
    }

    fn layer_status(&self, image: &Image, file: &str) -> Option<Value> {
        let status = self.status()?;
        let images = status.get("images")?.as_array()?;
        let own = images.iter().find(|one| is_of(one, image))?;
        own.get("layers")?.get(number_in(image, file)?).cloned()
    }

    /// Runs `sluice`; what it wrote.
    pub(crate) fn sluice(&self, arguments: &[&str]) -> Result<String> {
        output(self.command().args(arguments))
    }

    /// What `sluice fsck` says, whether it found problems or not.
    pub(crate) fn fsck(&self) -> Result<String> {
        let output = self.command().arg("fsck").output().context("cannot start sluice")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    }

    /// The daemon's status, if one runs.
    pub(crate) fn status(&self) -> Option<Value> {
        // Another error than "no daemon runs" shows in what is asked of it.
        serde_json::from_str(&self.sluice(&["status", "--json"]).ok()?).ok()
    }

    /// Faults of the registry from now on.
    pub(crate) fn faults(&self, faults: &Value) -> Result<()> {
        self.registry.faults(faults)
    }

    /// The registry is gone for a while.
    pub(crate) fn outage(&self, duration: Duration) -> Result<()> {
        self.registry.outage(duration)
    }

    /// Directories of layers in the store.
    pub(crate) fn layer_dirs(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.path("disk/root/layers"))?;
        let mut dirs = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        dirs.sort();
        Ok(dirs)
    }

    /// Drops what the page cache has of the layers' files.
    pub(crate) fn forget_pages(&self) -> Result<()> {
        // Asked of each file: the whole machine's page cache is not ours. One may be removed meanwhile.
        script(
            "for file in \"$1\"/*/data; do dd if=\"$file\" iflag=nocache count=0 status=none 2>/dev/null || :; done",
            &[&self.path("disk/root/layers")],
        )
        .map(|_| ())
    }

    /// Takes all of the disk that is free, for a while.
    pub(crate) fn fill_disk(&self, duration: Duration) -> Result<()> {
        let ballast = self.path("disk/ballast");
        // Flushing tells everybody once of writes that failed before, which is nothing here.
        let fill = "cat /dev/zero > \"$1\" 2>/dev/null || :; sync -f \"$1\" 2>/dev/null || :";
        let filled = script(fill, &[&ballast]);
        std::thread::sleep(duration);
        fs::remove_file(&ballast)?;
        filled.map(|_| ())
    }

    /// The daemons' logs so far.
    pub(crate) fn log(&self) -> String {
        let now = fs::read_to_string(self.path("state/daemon.log")).unwrap_or_default();
        lock(&self.log).clone() + &now
    }

    /// Ends everything; an error if something is left behind.
    pub(crate) fn end(self) -> Result<()> {
        let mounts = fs::read_dir(self.path("mounts"))?;
        for mount in mounts {
            let path = mount?.path();
            // One that is not mounted is what should be.
            drop(self.sluice(&["umount", &path.to_string_lossy()]));
        }
        self.sluice(&["node", "drain"])?;
        let lock = fs::File::open(self.path("disk/root/lock"))?;
        lock.lock().context("the daemon does not end")?;
        drop(lock);
        let dir = self.dir.to_string_lossy().into_owned();
        let left = |table: &str| -> Vec<String> {
            let ours = |line: &&str| {
                line.contains(&dir)
                    && ["disk", "fuse"].iter().all(|own| !line.contains(&format!("{dir}/{own} ")))
            };
            table.lines().filter(ours).map(str::to_owned).collect()
        };
        let mut mounts = Vec::new();
        for _ in 0..100 {
            mounts = left(&fs::read_to_string("/proc/self/mounts")?);
            if mounts.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        if !mounts.is_empty() {
            bail!("mounts are left behind: {mounts:?}");
        }
        if let Some(disk) = super::lock(&self.disk).take() {
            disk.end()?;
        }
        clean(&self.dir)
    }
}

/// Files of one layer, with what a layer may have twice; their paths.
fn make_tree(trees: &Path, number: u64, random: &mut Random) -> Result<Vec<String>> {
    let tree = trees.join(number.to_string());
    let mut names = Vec::new();
    let mut put = |name: String, content: &[u8]| -> Result<()> {
        let path = tree.join(&name);
        fs::create_dir_all(path.parent().unwrap_or(&tree))?;
        fs::write(&path, content)?;
        names.push(name);
        Ok(())
    };
    for file in 0..FILES {
        let len = usize::try_from(random.below(LARGEST))?;
        let content = random.content(if file % 5 == 0 { len % 5000 } else { len });
        put(format!("layer{number}/dir{}/file{file}", file % 7), &content)?;
    }
    let big = random.content(BIG);
    put(format!("layer{number}/big"), &big)?;
    put(format!("layer{number}/same-as-big"), &big)?;
    put(format!("layer{number}/empty"), b"")?;
    Ok(names)
}

/// Whether an entry of the daemon's status is this image's.
pub(crate) fn is_of(entry: &Value, image: &Image) -> bool {
    let name = entry.get("reference").and_then(Value::as_str);
    name.is_some_and(|name| name.ends_with(&format!("/{}:latest", image.name)))
}

/// The library that makes a process's clock wrong.
fn faketime() -> Result<PathBuf> {
    let found = script("find /usr/lib -name libfaketimeMT.so.1 | head -n 1", &[])?;
    if found.trim().is_empty() {
        bail!("libfaketime is installed without libfaketimeMT.so.1");
    }
    Ok(PathBuf::from(found.trim()))
}

/// Unmounts what an earlier run left, and removes it.
fn clean(dir: &Path) -> Result<()> {
    unmount(dir)?;
    fs::remove_dir_all(dir).or_else(|error| if dir.exists() { Err(error) } else { Ok(()) })?;
    Ok(())
}

/// Unmounts all that is mounted below a directory.
pub(crate) fn unmount(dir: &Path) -> Result<()> {
    script(
        "awk -v dir=\"$1/\" 'index($2, dir) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r at; do umount -l \"$at\"; done",
        &[dir],
    )
    .map(|_| ())
}

/// Which of an image's layers has a file.
fn number_in(image: &Image, file: &str) -> Option<usize> {
    let first: usize = image.name.strip_prefix("soak")?.parse().ok()?;
    let layer: usize = file.strip_prefix("layer")?.split('/').next()?.parse().ok()?;
    layer.checked_sub(first)
}

/// Digests of the layers of the one image in a layout.
fn layers_of(layout: &Path) -> Result<Vec<String>> {
    let read = |path: &str| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(layout.join(path))?)?) };
    let hex = |digest: &Value| -> Result<String> {
        let digest = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        Ok(digest.context("a layout has no digest")?.to_owned())
    };
    let index = read("index.json")?;
    let manifest = hex(index.pointer("/manifests/0/digest").context("a layout has no manifest")?)?;
    let manifest = read(&format!("blobs/sha256/{manifest}"))?;
    let layers = manifest.get("layers").and_then(Value::as_array).context("a manifest has no layers")?;
    layers.iter().map(|layer| hex(layer.get("digest").context("a layer has no digest")?)).collect()
}
