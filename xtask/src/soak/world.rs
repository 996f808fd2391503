//! What a soak works on: images whose contents are known, a registry, and a node on a small disk of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::lock;
use super::random::Random;
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
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct World {
    binary: PathBuf,
    dir: PathBuf,
    images: Vec<Image>,
    registry: Registry,
    /// Held while the store is tampered with, and by those who must not see that.
    pub(crate) quiet: std::sync::RwLock<()>,
    log: Mutex<String>,
}

impl World {
    pub(crate) fn make(binary: &Path, random: &mut Random) -> Result<Self> {
        let dir = target().join("sluice-soak");
        clean(&dir)?;
        let (trees, layouts, disk) = (dir.join("trees"), dir.join("layouts"), dir.join("disk"));
        for path in [&trees, &layouts, &disk, &dir.join("mounts"), &dir.join("state")] {
            fs::create_dir_all(path)?;
        }
        let mut layers = Vec::new();
        for number in 0..LAYERS {
            layers.push((trees.join(number.to_string()), make_tree(&trees, number, random)?));
        }
        script(
            &format!("truncate -s {DISK_MIB}M \"$1\"; mkfs.ext4 -q -E nodiscard \"$1\"; mount -o loop \"$1\" \"$2\""),
            &[&dir.join("disk.img"), &disk],
        )
        .context("cannot make a disk for the node")?;
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
            images.push(Image { reference: String::new(), files: files.collect(), name });
        }
        let registry = Registry::start(binary, &layouts, "400mbit", "1ms")?;
        for image in &mut images {
            image.reference = registry.image(&image.name);
        }
        fs::write(
            dir.join("config.toml"),
            "[stream]\noutage_timeout_s = 600\n[trust]\nmode = \"any\"\n[store]\nreserve_mib = 16\nmemory_budget_mib = 16\n",
        )?;
        let (quiet, log) = (std::sync::RwLock::default(), Mutex::default());
        let world = Self { binary: binary.to_path_buf(), dir, images, registry, quiet, log };
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
        command
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

    /// Takes all of the disk that is free, for a while.
    pub(crate) fn fill_disk(&self, duration: Duration) -> Result<()> {
        let ballast = self.path("disk/ballast");
        let filled = script("cat /dev/zero > \"$1\" 2>/dev/null || true; sync -f \"$1\"", &[&ballast]);
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
            let ours = |line: &&str| line.contains(&dir) && !line.contains(&format!("{dir}/disk "));
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

/// Unmounts what an earlier run left, and removes it.
fn clean(dir: &Path) -> Result<()> {
    script(
        "awk -v dir=\"$1/\" 'index($2, dir) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r at; do umount -l \"$at\"; done
         rm -rf \"$1\"",
        &[dir],
    )
    .map(|_| ())
}
