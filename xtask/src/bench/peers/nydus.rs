//! Nydus: RAFS version 6, compressed with zstd, its blob in the same registry as the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::run::{output, script};

/// An image converted for it.
#[derive(Debug)]
pub(super) struct Nydus {
    daemon: PathBuf,
    work: PathBuf,
    repository: String,
}

/// A daemon with its mount. Dropped, it is unmounted and ends, and its cache goes.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    mounted: PathBuf,
    cache: PathBuf,
}

/// How long it may take to mount.
const PATIENCE: Duration = Duration::from_secs(60);

impl Nydus {
    /// Converts the image of a layout; the blob becomes one of a repository of its own among `layouts`.
    pub(super) fn convert(
        (daemon, converter): (&Path, &Path),
        image: &Path,
        layouts: &Path,
        name: &str,
        work: &Path,
    ) -> Result<Self> {
        let repository = format!("{name}-nydus");
        let (unpacked, layout) = (work.join("nydus-unpacked"), layouts.join(&repository));
        let blobs = layout.join("blobs/sha256");
        script("rm -rf \"$1\"; mkdir -p \"$2\"", &[&unpacked, &blobs])?;
        output(
            Command::new("umoci")
                .args(["unpack", "--image"])
                .arg(format!("{}:latest", image.display()))
                .arg(&unpacked),
        )?;
        let mut convert = Command::new(converter);
        convert.args(["create", "-t", "dir-rafs", "--fs-version", "6", "--compressor", "zstd", "-B"]);
        convert.arg(work.join("bootstrap")).arg("-D").arg(&blobs).arg(unpacked.join("rootfs"));
        output(&mut convert).context("nydus-image")?;
        fs::remove_dir_all(&unpacked)?;
        fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
        fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": [] }).to_string())?;
        Ok(Self { daemon: daemon.to_path_buf(), work: work.to_path_buf(), repository })
    }

    /// Where it is mounted.
    pub(super) fn mounted(&self) -> PathBuf {
        self.work.join("nydus")
    }

    /// Mounts it with nothing cached; `registry` is its address, with a name behind it.
    pub(super) fn mount(&self, registry: &str) -> Result<Running> {
        let host = registry.split('/').next().unwrap_or_default();
        let (mounted, cache) = (self.mounted(), self.work.join("nydus-cache"));
        for dir in [&mounted, &cache] {
            fs::create_dir_all(dir)?;
        }
        let config = json!({
            "device": {
                "backend": { "type": "registry", "config": { "scheme": "http", "host": host, "repo": self.repository } },
                "cache": { "type": "blobcache", "config": { "work_dir": cache } },
            },
            "mode": "direct",
        });
        let path = self.work.join("nydus.json");
        fs::write(&path, config.to_string())?;
        let log = fs::File::create(self.work.join("nydus.log"))?;
        let mut command = Command::new(&self.daemon);
        command.arg("fuse").arg("--config").arg(&path).arg("--bootstrap").arg(self.work.join("bootstrap"));
        command.arg("--mountpoint").arg(&mounted).args(["--rlimit-nofile", "0"]);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let mut running = Running { child: child.context("cannot start nydusd")?, mounted, cache };
        let began = Instant::now();
        while !fs::read_to_string("/proc/self/mounts")?
            .contains(&format!(" {} fuse", running.mounted.display()))
        {
            if began.elapsed() > PATIENCE || running.child.try_wait()?.is_some() {
                bail!("nydusd does not mount; its log is in {}", self.work.join("nydus.log").display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        let ended = Command::new("kill").arg(&pid).status().and_then(|_| self.child.wait());
        if let Err(error) = ended {
            eprintln!("cannot stop nydusd (pid {pid}): {error}");
        }
        // It unmounts when it is told to end; one that was not there to do so leaves the mount.
        drop(Command::new("umount").arg("-l").arg(&self.mounted).stderr(Stdio::null()).status());
        if let Err(error) = fs::remove_dir_all(&self.cache) {
            eprintln!("cannot remove {}: {error}", self.cache.display());
        }
    }
}
