//! Nydus, version 6 of its format: the image's files converted, or its layers as they are beside an index of theirs (`zran`); each also
//! with a list of what the command reads, from which its converter makes the daemon fetch that first. Blobs and metadata are in the
//! same registry as the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::image_maker;
use crate::measure::{Bench, Start};
use crate::run::{output, script};

/// An image converted for it, and a place for its container.
#[derive(Debug)]
pub(super) struct Nydus {
    daemon: PathBuf,
    work: PathBuf,
    ways: Vec<Way>,
}

/// One conversion.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) label: &'static str,
    /// It was told what the command reads.
    pub(super) told: bool,
    /// Of the blob with its metadata.
    digest: String,
}

/// A daemon with its mount. Dropped, it and the container's root on it are unmounted, it ends, and its cache goes.
#[derive(Debug)]
struct Running {
    child: Child,
    work: PathBuf,
}

/// How long it may take to mount.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command in `$1`, and says what files it read, in that order. Access times tell: the copy's files are the same, but what the
/// command makes is in the copy only.
const READ: &str = r#"
    cp -al "$1" "$1.copy"; mount --bind "$1.copy" "$1.copy"; mount -o remount,bind,relatime "$1.copy"
    mount -t proc none "$1.copy/proc"; mount --bind /dev "$1.copy/dev"
    tree=$1; shift; touch "$tree.before"; sleep 0.1
    chroot "$tree.copy" "$@" > /dev/null
    find "$tree" -type f -anewer "$tree.before" -printf '%A@ /%P\n' | sort -ns | cut -d ' ' -f 2-
"#;

impl Nydus {
    /// Converts the image of a layout; the blobs become those of a repository of its own in the bench's registry.
    pub(super) fn convert(
        (daemon, converter): (&Path, &Path),
        bench: &Bench<'_>,
        image: &Path,
        work: &Path,
        command: &[&str],
    ) -> Result<Self> {
        let (work, blobs) = (work.join("nydus"), bench.layout("nydus").join("blobs/sha256"));
        let (unpacked, layers, list) = (work.join("unpacked"), work.join("layers"), work.join("list"));
        script(
            r#"for left in "$1/root/rootfs" "$1/mount"; do if mountpoint -q "$left"; then umount -l "$left"; fi; done
            rm -rf "$1" "$2"; mkdir -p "$1/layers" "$1/root" "$2"; cp -l "$3"/blobs/sha256/* "$2"
            umoci unpack --image "$3:latest" "$1/unpacked"; echo '{"imageLayoutVersion":"1.0.0"}' > "$2/../../oci-layout""#,
            &[&work, &blobs, image],
        )?;
        let tree = unpacked.join("rootfs");
        let mut reading = Command::new("unshare");
        reading.args(["--mount", "sh", "-euc", READ, "sh"]).arg(&tree).args(command);
        fs::write(&list, output(&mut reading).context("what the command reads")?)?;
        let digests = image_maker::layer_digests(image)?;
        for digest in &digests {
            let mut index = Command::new(converter);
            index.args(["create", "-t", "targz-ref", "-B"]).arg(layers.join(digest)).arg("-D").arg(&blobs);
            output(index.arg(blobs.join(digest))).context("nydus-image create")?;
        }
        let mut ways = Vec::new();
        for (label, told, zran) in [
            ("nydus, v6 zstd", false, false),
            ("nydus, zran", false, true),
            ("nydus, v6 zstd, with list", true, false),
            ("nydus, zran, with list", true, true),
        ] {
            let bootstrap = work.join("bootstrap");
            let mut convert = Command::new("sh");
            convert.args(["-euc", "list=$1; shift; exec \"$@\" < \"$list\"", "sh"]).arg(&list).arg(converter);
            convert.arg(if zran { "merge" } else { "create" }).arg("-B").arg(&bootstrap);
            if zran {
                convert.args(digests.iter().map(|digest| layers.join(digest)));
            } else {
                convert.args(["-t", "dir-rafs", "--fs-version", "6", "--compressor", "zstd", "-D"]);
                convert.arg(&blobs).arg(&tree);
            }
            convert.args(["--prefetch-policy", if told { "fs" } else { "none" }]);
            output(&mut convert).context(label)?;
            let publish = r#"gzip -n "$1"; digest=$(sha256sum "$1.gz" | cut -d ' ' -f 1)
                mv "$1.gz" "$2/$digest"; echo "$digest""#;
            let digest = script(publish, &[&bootstrap, &blobs])?.trim().to_owned();
            ways.push(Way { label, told, digest });
        }
        fs::remove_dir_all(&unpacked)?;
        fs::write(work.join("root/config.json"), bench.spec()?)?;
        Ok(Self { daemon: daemon.to_path_buf(), work, ways })
    }

    /// The ways to start it.
    pub(super) fn ways(&self) -> &[Way] {
        &self.ways
    }

    /// One start, with nothing of the image here. The daemon's start counts, as there is one for each image; its metadata come through
    /// the link as well, after the manifest by which a puller learns their digest. Its programs are in the page cache, as ours are. The
    /// container is taken away within the time, as ours is.
    pub(super) fn start(&self, bench: &Bench<'_>, way: &Way) -> Result<Start> {
        let image = bench.image("nydus");
        let (host, repository) = image.split_once('/').context("an image without a registry")?;
        let repository = repository.trim_end_matches(":latest");
        bench.cold()?;
        script("\"$1\" --version; curl --version; gzip --version", &[&self.daemon])?;
        let began = Instant::now();
        let (manifest, blob) = (bench.image("plain").replace(":latest", "/manifests/latest"), &way.digest);
        let manifest = manifest.replace(host, &format!("{host}/v2"));
        let fetch = format!(
            "mkdir \"$1/cache\" \"$1/mount\"
            curl -fsS -o \"$1/manifest\" http://{manifest} http://{host}/v2/{repository}/blobs/sha256:{blob} | gzip -d > \"$1/bootstrap\""
        );
        script(&fetch, &[&self.work])?;
        let running = self.mount(host, repository, way.told)?;
        let run = r#"cd "$1/root"; mkdir upper work rootfs
            mount -t overlay -o "lowerdir=$1/mount,upperdir=upper,workdir=work" overlay rootfs
            runc --root "$1/root/runtime" run --bundle . sluice-bench-nydus
            umount rootfs; rm -r upper work rootfs"#;
        let said = script(run, &[&self.work])?;
        let mut measured = bench.measured(began, &said, 0)?;
        let status = fs::read_to_string(format!("/proc/{}/status", running.child.id()))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        measured.peak_bytes = peak.context("nydusd does not tell its memory")?.parse::<u64>()? << 10;
        Ok(measured)
    }

    fn mount(&self, host: &str, repository: &str, told: bool) -> Result<Running> {
        let mounted = self.work.join("mount");
        let config = json!({
            "device": {
                "backend": { "type": "registry", "config": { "scheme": "http", "host": host, "repo": repository } },
                "cache": { "type": "blobcache", "config": { "work_dir": self.work.join("cache") } },
            },
            "mode": "direct",
            // The list, and not everything else behind it: the link is the command's.
            "fs_prefetch": { "enable": told, "prefetch_all": false },
        });
        let path = self.work.join("config.json");
        fs::write(&path, config.to_string())?;
        let log = fs::File::create(self.work.join("log"))?;
        let mut command = Command::new(&self.daemon);
        command.arg("fuse").arg("--config").arg(&path).arg("--bootstrap").arg(self.work.join("bootstrap"));
        command.arg("--mountpoint").arg(&mounted).args(["--rlimit-nofile", "0"]);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let mut running = Running { child: child.context("cannot start nydusd")?, work: self.work.clone() };
        let began = Instant::now();
        while !fs::read_to_string("/proc/self/mounts")?.contains(&format!(" {} fuse", mounted.display())) {
            if began.elapsed() > PATIENCE || running.child.try_wait()?.is_some() {
                bail!("nydusd does not mount; its log is in {}", self.work.join("log").display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        // It unmounts when it is told to end; one that was not there to do so leaves the mount.
        let end = r#"if mountpoint -q "$1/root/rootfs"; then umount "$1/root/rootfs"; fi; kill "$2""#;
        if let Err(error) = script(end, &[&self.work, Path::new(&pid)]) {
            eprintln!("cannot stop nydusd (pid {pid}): {error:#}");
        }
        let clean = r#"if mountpoint -q "$1/mount"; then umount -l "$1/mount"; fi; cd "$1"
            rm -rf root/upper root/work root/rootfs cache bootstrap; rmdir mount"#;
        let ended = self.child.wait().map_err(Into::into).and_then(|_| script(clean, &[&self.work]));
        if let Err(error) = ended {
            eprintln!("cannot clean up {}: {error:#}", self.work.display());
        }
    }
}
