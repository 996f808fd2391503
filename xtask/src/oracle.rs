//! `cargo xtask oracle`: what `sluice mount` shows beside what `umoci unpack` makes of the same image.
//!
//! Two trees are walked side by side: types, modes, owners, times, sizes, links, contents, extended attributes. One image is
//! Python's; another a Debian one plus many layers with whiteouts, an opaque directory, a capability and a hard link into a lower
//! layer. They come from the embedded registry and from Debian's, as OCI and Docker images, with gzip and zstd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::{output, script, target};
use crate::sluice::{self, Registry, Sluice};
use crate::{image_maker, packages};

/// Layers above the Debian image. `$1` is an empty directory, `$2` the layout; GNU tar's `--delete` leaves a hard link's
/// entry alone in its layer, its target being in the layer below.
const LAYERS: &str = r#"
cd "$1"
mkdir -p a/opt/deep a/opt/gone a/opt/opaque a/usr/local/bin
echo one > a/opt/first; ln a/opt/first a/opt/second; ln -s first a/opt/symlink; mkfifo a/opt/fifo
head -c 700000 /dev/urandom > a/opt/deep/large; : > a/opt/empty; echo x > a/opt/gone/x; echo y > a/opt/opaque/y
cp /bin/true a/usr/local/bin/capable; setcap cap_net_raw+ep a/usr/local/bin/capable
chmod 4755 a/opt/first; chown 1000:1001 a/opt/empty; touch -d @86400.25 a/opt/empty
mkdir -p b/opt/opaque b/opt/deep; : > b/opt/.wh.gone; : > b/opt/.wh.second; : > b/opt/opaque/.wh..wh..opq; echo z > b/opt/opaque/z
mkdir -p c/opt/deep; echo target > c/opt/deep/large; ln c/opt/deep/large c/opt/zz-across
for layer in a b c; do
  tar --format=pax --xattrs --xattrs-include=security.capability --numeric-owner --sort=name -C $layer -cf $layer.tar .
done
tar --delete -f c.tar ./opt/deep/large
for layer in a b c; do umoci raw add-layer --image "$2:latest" $layer.tar; done
for number in $(seq 30); do
  mkdir -p d/srv/$number; echo $number > d/srv/$number/file; echo $number > d/srv/last
  tar --format=gnu --numeric-owner --sort=name -C d -cf d.tar .; umoci raw add-layer --image "$2:latest" d.tar; rm -r d
done
"#;

/// Where an image is served from, in which form.
const VARIANTS: [(&str, Form); 5] = [
    ("many", Form::Embedded),
    ("many", Form::Pushed { options: &["--dest-compress-format", "zstd"], media_type: "tar+zstd" }),
    (
        "many",
        Form::Pushed { options: &["--format", "v2s2"], media_type: "docker.image.rootfs.diff.tar.gzip" },
    ),
    ("medium", Form::Embedded),
    ("medium", Form::Pushed { options: &["--format", "oci"], media_type: "image.layer.v1.tar+gzip" }),
];

#[derive(Debug, Clone, Copy)]
enum Form {
    /// In the embedded registry, as made.
    Embedded,
    /// In Debian's docker-registry, as skopeo pushes it with these options, and what that makes of its layers.
    Pushed { options: &'static [&'static str], media_type: &'static str },
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded registry"),
            Self::Pushed { media_type, .. } => write!(f, "docker-registry, {media_type}"),
        }
    }
}

/// Compares all variants; fails with the differences found.
pub(crate) fn oracle() -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    packages::install(&packages::TESTS)?;
    let binary = sluice::build_for_tests()?;
    let work = target().join("sluice-oracle");
    if work.exists() {
        fs::remove_dir_all(&work)
            .context("cannot remove an earlier comparison; is something mounted in it?")?;
    }
    let served = work.join("images");
    fs::create_dir_all(&served)?;
    make_images(&work, &served)?;
    let embedded = Registry::start(&binary, &served, "10gbit", "0ms")?;
    let docker = DockerRegistry::start(&work)?;
    for (number, (name, form)) in VARIANTS.into_iter().enumerate() {
        let image = match form {
            Form::Embedded => embedded.image(name),
            Form::Pushed { options, media_type } => {
                docker.push(&served.join(name), &format!("{name}-{number}"), options, media_type)?
            }
        };
        let differences = compare(&binary, &work, &work.join(name).join("rootfs"), &image)?;
        if !differences.is_empty() {
            bail!("{name}, {form}: {} differences\n{}", differences.len(), differences.join("\n"));
        }
        println!(
            "oracle: {name}, {form}: the mount equals what umoci unpacked, dpkg finds its files as they were"
        );
    }
    drop((embedded, docker));
    fs::remove_dir_all(&work).context("cannot remove what was compared")
}

/// The images of the comparison, and beside them what umoci makes of each.
fn make_images(work: &Path, served: &Path) -> Result<()> {
    let layers = work.join("layers");
    fs::create_dir_all(&layers)?;
    for (name, recipe) in [("many", "small"), ("medium", "medium")] {
        let images = image_maker::make(image_maker::recipe(recipe)?)?;
        let layout = served.join(name);
        script("cp -a \"$1\" \"$2\"", &[&images.join(recipe), &layout])?;
        if name == "many" {
            script(LAYERS, &[&layers, &layout])?;
        }
        let image = format!("{}:latest", layout.display());
        output(Command::new("umoci").args(["unpack", "--image", &image]).arg(work.join(name)))?;
    }
    Ok(())
}

/// Debian's docker-registry, which has no referrers API. Stopped when dropped.
#[derive(Debug)]
struct DockerRegistry {
    child: Child,
    address: String,
}

impl DockerRegistry {
    fn start(work: &Path) -> Result<Self> {
        // The port is free when the listener is gone; the registry takes no port 0.
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let config = work.join("docker-registry.yml");
        let root = work.join("docker-registry");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root:?}}}}}\nhttp: {{addr: {address:?}}}\n"
            ),
        )?;
        let log = File::create(work.join("docker-registry.log"))?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start docker-registry")?;
        let registry = Self { child, address };
        let start = Instant::now();
        while std::net::TcpStream::connect(&registry.address).is_err() {
            if start.elapsed() > Duration::from_secs(20) {
                bail!("docker-registry does not listen on {}", registry.address);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// Pushes a layout's image by skopeo; its reference.
    fn push(&self, layout: &Path, name: &str, options: &[&str], media_type: &str) -> Result<String> {
        let image = format!("{}/{name}:latest", self.address);
        output(
            Command::new("skopeo")
                .args(["copy", "--quiet", "--dest-tls-verify=false"])
                .args(options)
                .arg(format!("oci:{}:latest", layout.display()))
                .arg(format!("docker://{image}")),
        )?;
        let manifest = output(Command::new("skopeo").args([
            "inspect",
            "--raw",
            "--tls-verify=false",
            &format!("docker://{image}"),
        ]))?;
        if !manifest.contains(media_type) {
            bail!("skopeo {options:?} made no {media_type} of {name}");
        }
        Ok(image)
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("cannot stop docker-registry: {error}");
        }
    }
}

fn compare(binary: &Path, work: &Path, wanted: &Path, image: &str) -> Result<Vec<String>> {
    let sluice = Sluice::new(binary, &work.join("sluice"), "")?;
    let mount = work.join("mount");
    fs::create_dir_all(&mount)?;
    let dir = mount.to_string_lossy();
    sluice.run(&["index", image])?;
    sluice.run(&["mount", image, &dir])?;
    let differences = trees(wanted, &mount);
    sluice.run(&["umount", &dir])?;
    let mut differences = differences?;
    let verified = sluice.run(&["run", image, "dpkg", "--verify"])?;
    differences.extend(verified.lines().map(|line| format!("dpkg --verify: {line}")));
    Ok(differences)
}

/// Differences between two trees, one line each.
fn trees(wanted: &Path, found: &Path) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let (mut links, mut left) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(path) = left.pop() {
        let (one, other) = (wanted.join(&path), found.join(&path));
        let (a, b) = (fs::symlink_metadata(&one)?, fs::symlink_metadata(&other)?);
        for (what, a, b) in facts(&a, &b) {
            if a != b {
                differences.push(format!("/{}: {what} is {b}, should be {a}", path.display()));
            }
        }
        if !a.is_dir() && links.insert(a.ino(), b.ino()).is_some_and(|inode| inode != b.ino()) {
            differences.push(format!("/{}: is not the hard link it should be", path.display()));
        }
        if a.is_symlink() && b.is_symlink() && fs::read_link(&one)? != fs::read_link(&other)? {
            differences.push(format!("/{}: points elsewhere", path.display()));
        }
        if a.is_file() && b.is_file() && !same_content(&one, &other)? {
            differences.push(format!("/{}: has other content", path.display()));
        }
        if a.is_dir() && b.is_dir() {
            let (a, b) = (names(&one)?, names(&other)?);
            differences.extend(
                a.symmetric_difference(&b)
                    .map(|name| format!("/{}: is in one only", path.join(name).display())),
            );
            left.extend(a.intersection(&b).map(|name| path.join(name)));
        }
    }
    if attributes(wanted)? != attributes(found)? {
        differences.push("extended attributes differ".to_owned());
    }
    Ok(differences)
}

/// What of the metadata must be equal. A directory's size and links are the file system's own.
fn facts(a: &Metadata, b: &Metadata) -> Vec<(&'static str, i64, i64)> {
    let mut facts = vec![
        ("mode", i64::from(a.mode()), i64::from(b.mode())),
        ("owner", i64::from(a.uid()), i64::from(b.uid())),
        ("group", i64::from(a.gid()), i64::from(b.gid())),
        ("time", a.mtime(), b.mtime()),
        ("time's nanoseconds", a.mtime_nsec(), b.mtime_nsec()),
    ];
    if !a.is_dir() {
        facts.push(("number of links", a.nlink().cast_signed(), b.nlink().cast_signed()));
        facts.push(("size", a.size().cast_signed(), b.size().cast_signed()));
    }
    if a.file_type().is_char_device() || a.file_type().is_block_device() {
        facts.push(("device", a.rdev().cast_signed(), b.rdev().cast_signed()));
    }
    facts
}

fn names(dir: &Path) -> Result<BTreeSet<std::ffi::OsString>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
}

fn same_content(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    loop {
        a.clear();
        b.clear();
        one.by_ref().take(1 << 20).read_to_end(&mut a)?;
        other.by_ref().take(1 << 20).read_to_end(&mut b)?;
        if a != b {
            return Ok(false);
        }
        if a.is_empty() {
            return Ok(true);
        }
    }
}

/// All extended attributes below a directory, one path's in one item.
fn attributes(root: &Path) -> Result<BTreeSet<String>> {
    let dump = script("cd \"$1\" && getfattr -R -P -h -d -m - -e hex .", &[root])?;

    Ok(dump.split("\n\n").map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::trees;

    #[test]
    fn differences_are_seen() {
        let dir = std::env::temp_dir().join(format!("sluice-oracle-{}", std::process::id()));
        let (one, other) = (dir.join("one"), dir.join("other"));
        crate::run::script(
            "mkdir -p \"$1\" \"$2\"; echo a > \"$1/f\"; touch -d @1 \"$1/f\"; touch -d @1 \"$1\"; cp -a \"$1/.\" \"$2\"; touch -d @1 \"$2\"",
            &[&one, &other],
        )
        .expect("trees are made");
        assert!(trees(&one, &other).expect("walked").is_empty());
        crate::run::script("echo b > \"$1/f\"; touch -d @1 \"$1/f\" \"$1\"", &[&other]).expect("changed");
        assert_eq!(trees(&one, &other).expect("walked"), ["/f: has other content"]);
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
