//! Where the same files are read: the disk's own file system, ours in its ways, overlayfs on both, nydusd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Args;
use super::tree::Tree;
use crate::run::{output, script, target};
use crate::sluice::{Registry, Sluice};

pub(crate) const EXT4: &str = "ext4";
pub(crate) const LOCAL: &str = "handed over";
pub(crate) const IO_URING: &str = "io_uring";
pub(crate) const CLASSIC: &str = "classic";
/// Its own cache on the disk, as ours that is handed over.
pub(crate) const NYDUS: &str = "nydusd";
/// Its own cache in memory, as what our server reads.
pub(crate) const NYDUS_CACHED: &str = "nydusd cached";
const OVERLAY: &str = "overlay, ext4";
const OVERLAY_LOCAL: &str = "overlay, handed over";

/// One place.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) name: &'static str,
    pub(crate) root: PathBuf,
    /// Number of the place it is compared with.
    pub(crate) base: usize,
    /// Files that are brought into the page cache before a first touch.
    pub(crate) store: Vec<PathBuf>,
    /// Files that are taken out of it, besides those that are read.
    pub(crate) cold: Vec<PathBuf>,
    /// Processes whose CPU time counts.
    pub(crate) processes: Vec<u64>,
}

/// All places, and what keeps them. Dropped, or better [closed](Places::close), it unmounts.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) all: Vec<Place>,
    mounts: Vec<PathBuf>,
    nydusd: Option<Child>,
    nodes: Vec<Sluice>,
    dir: PathBuf,
}

impl Places {
    /// Mounts them.
    pub(crate) fn open(binary: &Path, tree: &Tree, args: &Args) -> Result<Self> {
        let dir = target().join("sluice-bench/read-places");
        let mut places =
            Self { all: Vec::new(), mounts: Vec::new(), nydusd: None, nodes: Vec::new(), dir: dir.clone() };
        let wanted = |name: &str| args.places.is_empty() || args.places.iter().any(|one| one == name);
        places.bind(EXT4, &tree.root)?;
        let registry = Registry::start(binary, &tree.image.0, "100gbit", "0ms")?;
        let image = registry.image(&tree.image.1);
        for (name, config) in [
            (LOCAL, String::new()),
            (IO_URING, ways_config("io_uring", args.queue_depth)),
            (CLASSIC, ways_config("classic", None)),
        ] {
            // The first one also makes the index.
            if wanted(name) || name == LOCAL {
                places.mount_ours(binary, &dir, name, &config, &image)?;
            }
        }
        if wanted(OVERLAY) || wanted(OVERLAY_LOCAL) {
            places.overlay(OVERLAY, EXT4, None)?;
        }
        if wanted(OVERLAY_LOCAL) {
            places.overlay(OVERLAY_LOCAL, LOCAL, Some(OVERLAY))?;
        }
        match args.nydusd.as_deref().zip(args.nydus_image.as_deref()) {
            Some(programs) if wanted(NYDUS) => places.mount_nydus(programs, tree)?,
            Some(_) => {}
            None => eprintln!("SKIPPED: nydusd (no package has it; give --nydusd PATH --nydus-image PATH)"),
        }
        Ok(places)
    }

    fn add(&mut self, name: &'static str, root: PathBuf, base: usize) -> &mut Place {
        let number = self.all.len();
        self.all.push(Place { name, root, base, store: Vec::new(), cold: Vec::new(), processes: Vec::new() });
        &mut self.all[number]
    }

    fn position(&self, name: &str) -> Result<usize> {
        let found = self.all.iter().position(|place| place.name == name);
        found.with_context(|| format!("{name} is not there to build on"))
    }

    /// The files as they are, as deep in the tree as all others and behind a mount point, too: to find the way costs as much as `lstat` does
    /// at its end.
    fn bind(&mut self, name: &'static str, root: &Path) -> Result<()> {
        let mount = self.dir.join(name).join("mount");
        unmount(&mount)?;
        fs::create_dir_all(&mount)?;
        output(Command::new("mount").arg("--bind").args([root, &mount]))?;
        self.mounts.push(mount.clone());
        self.add(name, mount, 0);
        Ok(())
    }

    /// A node of its own that has the whole image, mounted.
    fn mount_ours(
        &mut self,
        binary: &Path,
        dir: &Path,
        name: &'static str,
        config: &str,
        image: &str,
    ) -> Result<()> {
        let own = dir.join(name.replace(' ', "-"));
        let mount = own.join("mount");
        unmount(&mount)?;
        let config = format!("index_store = \"file://{}\"\n{config}", dir.join("indexes").display());
        let node = Sluice::new(binary, &own, &config)?;
        fs::create_dir_all(&mount)?;
        println!("{name}: bringing the image");
        if name == LOCAL {
            node.run(&["index", image])?;
            node.run(&["pull", image])?;
        }
        node.run(&["mount", image, &mount.to_string_lossy()])?;
        read_all(&mount)?;
        let status = node.status()?;
        let state = status.pointer("/images/0/state").and_then(Value::as_str).unwrap_or_default();
        let wanted = if name == LOCAL { "local" } else { "streaming" };
        ensure!(state == wanted, "the image is {state} instead of {wanted}");
        let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
        let processes: Vec<u64> = [number("/pid"), number("/blocks/pid")].into_iter().flatten().collect();
        let way = status.pointer("/blocks/way").and_then(Value::as_str);
        let place = self.add(name, mount.clone(), 0);
        if name != LOCAL {
            // A binary from elsewhere may not tell.
            ensure!(way.is_none_or(|way| way == name), "the node serves by {way:?} instead of {name}");
            place.processes = processes;
            for layer in fs::read_dir(own.join("root/layers"))? {
                place.store.push(layer?.path().join("data"));
            }
        }
        self.mounts.push(mount);
        self.nodes.push(node);
        Ok(())
    }

    /// overlayfs on another place, as a container has it; compared with `base`, or with ext4.
    fn overlay(&mut self, name: &'static str, on: &str, base: Option<&str>) -> Result<()> {
        let lower = self.all[self.position(on)?].root.clone();
        let base = base.map_or(Ok(0), |base| self.position(base))?;
        let own = self.dir.join(name.replace([' ', ','], "-"));
        unmount(&own.join("root"))?;
        for part in ["root", "upper", "work"] {
            fs::create_dir_all(own.join(part))?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            own.join("upper").display(),
            own.join("work").display()
        );
        let root = own.join("root");
        output(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&root))?;
        self.mounts.push(root.clone());
        self.add(name, root, base);
        Ok(())
    }

    /// RAFS v6 by its daemon, from local blobs, as in its own documentation. All of it is brought into its cache, as all is in ours.
    fn mount_nydus(&mut self, (nydusd, nydus_image): (&Path, &Path), tree: &Tree) -> Result<()> {
        let own = self.dir.join("nydus");
        let mount = own.join("mount");
        unmount(&mount)?;
        script("rm -rf \"$1\"", &[&own])?;
        for part in ["blobs", "cache", "mount"] {
            fs::create_dir_all(own.join(part))?;
        }
        let bootstrap = own.join("bootstrap");
        output(
            Command::new(nydus_image)
                .args(["create", "-t", "dir-rafs", "--fs-version", "6", "--compressor", "zstd", "-B"])
                .arg(&bootstrap)
                .arg("-D")
                .arg(own.join("blobs"))
                .arg(&tree.root),
        )?;
        let config = json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": own.join("blobs") } },
                "cache": { "type": "blobcache", "config": { "work_dir": own.join("cache") } },
            },
            "mode": "direct", "digest_validate": false, "iostats_files": false,
        });
        fs::write(own.join("config.json"), config.to_string())?;
        let log = fs::File::create(own.join("log"))?;
        let child = Command::new(nydusd)
            .args(["fuse", "--rlimit-nofile", "0", "--config"])
            .arg(own.join("config.json"))
            .arg("--bootstrap")
            .arg(&bootstrap)
            .arg("--mountpoint")
            .arg(&mount)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start nydusd")?;
        let pid = u64::from(child.id());
        self.nydusd = Some(child);
        self.mounts.push(mount.clone());
        let start = Instant::now();
        while !mount.join("large").exists() {
            if start.elapsed() > Duration::from_secs(30) {
                bail!("nydusd does not mount: {}", fs::read_to_string(own.join("log"))?);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        read_all(&mount)?;
        // Pages that are still to be written could not be dropped.
        script("sync -f \"$1\"", &[&own])?;
        let cache: Vec<PathBuf> =
            fs::read_dir(own.join("cache"))?.map(|file| Ok(file?.path())).collect::<Result<_>>()?;
        for name in [NYDUS, NYDUS_CACHED] {
            let place = self.add(name, mount.clone(), 0);
            place.processes = vec![pid];
            (if name == NYDUS { &mut place.cold } else { &mut place.store }).clone_from(&cache);
        }
        Ok(())
    }

    /// Unmounts all.
    pub(crate) fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        for mount in std::mem::take(&mut self.mounts).iter().rev() {
            unmount(mount)?;
        }
        if let Some(mut child) = self.nydusd.take() {
            child.kill()?;
            child.wait()?;
        }
        self.nodes.clear();
        Ok(())
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("cannot clean up {}: {error:#}", self.dir.display());
        }
    }
}

/// Our server has the layers, and reads them in this way: without a fill they are never complete, though all is local.
fn ways_config(way: &str, queue_depth: Option<u16>) -> String {
    let depth = queue_depth.map_or(String::new(), |depth| format!("queue_depth = {depth}\n"));
    format!("[stream]\nfill = false\n[blocks]\nway = {way:?}\n{depth}")
}

/// Reads all files there.
fn read_all(dir: &Path) -> Result<()> {
    script("find \"$1\" -type f -print0 | xargs -0 cat > /dev/null", &[dir]).map(|_| ())
}

/// Unmounts what is mounted there, if anything is.
fn unmount(dir: &Path) -> Result<()> {
    script("if mountpoint -q \"$1\"; then umount \"$1\"; fi", &[dir]).map(|_| ())
}
