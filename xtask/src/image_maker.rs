//! Real multi-layer OCI images, made from Debian packages, cached between runs.
//!
//! The base is debootstrap's; every further layer is what `apt-get install` wrote into an overlay, turned into an OCI layer
//! (whiteouts included) by GNU tar and gzip.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::run::{output, script, target};

/// A kind of image: its layers above the base, as packages, and the command of the comparison.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) layers: &'static [&'static [&'static str]],
    pub(crate) command: &'static [&'static str],
}

/// A server is ready when its port answers; then it is ended. The shell asks, so that nothing but the server is started.
macro_rules! until_answers {
    ($port:literal, $server:literal) => {
        &[
            "bash",
            "-c",
            concat!(
                $server,
                " & until (exec 3<>/dev/tcp/127.0.0.1/",
                $port,
                ") 2>/dev/null; do :; done; echo ready; kill %1; wait"
            ),
        ]
    };
}

/// Images of the demo and of the benchmark, small to large, and other kinds of work.
pub(crate) const RECIPES: [Recipe; 8] = [
    Recipe {
        name: "small",
        layers: &[&["python3-minimal"]],
        command: &["python3", "-c", "import sys; print('ready', sys.version_info.major)"],
    },
    Recipe {
        name: "medium",
        layers: &[&["python3"], &["python3-numpy"], &["git"]],
        command: &["python3", "-c", "import numpy; print('ready', numpy.arange(10).sum())"],
    },
    Recipe {
        name: "large",
        layers: &[&["python3"], &["python3-numpy"], &["python3-scipy", "clang"], &["default-jdk-headless"]],
        command: &["python3", "-c", "import numpy; print('ready', numpy.arange(10).sum())"],
    },
    Recipe {
        name: "node",
        layers: &[&["nodejs"]],
        command: &[
            "node",
            "-e",
            "const http = require('http'); const server = http.createServer((_, answer) => answer.end('ready')); \
             server.listen(0, '127.0.0.1', () => http.get({ host: '127.0.0.1', port: server.address().port }, \
             (said) => said.on('data', (piece) => console.log(String(piece))).on('end', () => process.exit())));",
        ],
    },
    Recipe {
        name: "web",
        layers: &[&["nginx-light"]],
        command: until_answers!(
            "18473",
            "echo 'events {} http { server { listen 127.0.0.1:18473; } }' > /tmp/conf; nginx -c /tmp/conf -g 'daemon off;'"
        ),
    },
    Recipe {
        name: "database",
        layers: &[&["redis-server"]],
        command: until_answers!("18474", "redis-server --bind 127.0.0.1 --port 18474 --dir /tmp >/dev/null"),
    },
    Recipe {
        name: "java",
        layers: &[&["default-jdk-headless"]],
        command: &[
            "sh",
            "-c",
            "echo 'class A { public static void main(String[] a) { System.out.println(\"ready\"); } }' > /tmp/A.java; java /tmp/A.java",
        ],
    },
    Recipe {
        name: "clang",
        layers: &[&["clang", "libc6-dev"]],
        command: &[
            "sh",
            "-c",
            "printf '#include <stdio.h>\nint main(void) { puts(\"ready\"); }' > /tmp/a.c; clang -O2 -o /tmp/a /tmp/a.c && /tmp/a",
        ],
    },
];

/// The recipe of this name.
pub(crate) fn recipe(name: &str) -> Result<Recipe> {
    let found = RECIPES.iter().find(|recipe| recipe.name == name).copied();
    found.with_context(|| {
        let names: Vec<_> = RECIPES.iter().map(|recipe| recipe.name).collect();
        format!("there is no image `{name}`; there are {}", names.join(", "))
    })
}

/// Makes the image if it is not cached; returns the directory of layouts, in which it is called by the recipe's name.
pub(crate) fn make(recipe: Recipe) -> Result<PathBuf> {
    let root = target().join("sluice-images");
    let layout = root.join(recipe.name);
    if layout.join("index.json").exists() {
        return Ok(root);
    }
    let progress = ProgressBar::new_spinner();
    progress.enable_steady_tick(std::time::Duration::from_millis(200));
    progress.set_message(format!("making image {} from Debian packages", recipe.name));
    let work = root.join(format!(".{}", recipe.name));
    clean(&work)?;
    let made = make_in(&work, recipe, &progress).and_then(|()| {
        clean_dir(&layout)?;
        fs::rename(work.join("layout"), &layout).context("cannot move the image to the cache")
    });
    clean(&work)?;
    made?;
    progress.finish_and_clear();
    Ok(root)
}

/// An image of these trees, a layer each, lowest first: a layout in `work`.
pub(crate) fn of_trees(work: &Path, trees: &[&Path]) -> Result<PathBuf> {
    of_members(work, trees.iter().map(|tree| (*tree, ["."].as_slice())))
}

/// An image whose layers are these members of trees.
fn of_members<'a>(work: &Path, layers: impl Iterator<Item = (&'a Path, &'a [&'a str])>) -> Result<PathBuf> {
    let layout = work.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let layers: Vec<Layer> =
        layers.map(|(tree, members)| pack(tree, members, work)).collect::<Result<_>>()?;
    write_layout(&layout, &["sh"], &layers)?;
    Ok(layout)
}

/// Makes an image `name` in `root` out of trees: a layer each.
pub(crate) fn named(root: &Path, name: &str, trees: &[&Path]) -> Result<()> {
    let work = root.join(format!(".{name}"));
    place(root, name, of_trees(&work, trees)?)
}

/// Makes an image `name` in `root` out of one tree: a layer for each list of its members.
pub(crate) fn pack_members(root: &Path, name: &str, tree: &Path, layers: &[&[&str]]) -> Result<()> {
    let work = root.join(format!(".{name}"));
    clean_dir(&work)?;
    place(root, name, of_members(&work, layers.iter().map(|members| (tree, *members)))?)
}

fn place(root: &Path, name: &str, layout: PathBuf) -> Result<()> {
    clean_dir(&root.join(name))?;
    fs::rename(&layout, root.join(name)).context("cannot move the image")?;
    clean_dir(layout.parent().context("a layout stands in its work directory")?)
}

fn make_in(work: &Path, recipe: Recipe, progress: &ProgressBar) -> Result<()> {
    fs::create_dir_all(work.join("layout/blobs/sha256"))?;
    let base = base(progress)?;
    let mut layers = vec![pack(&base, &["."], work)?];
    let mut lower = vec![base];
    for (number, packages) in recipe.layers.iter().enumerate() {
        progress.set_message(format!("image {}: installing {}", recipe.name, packages.join(" ")));
        let upper = install(work, number, &lower, packages)?;
        progress.set_message(format!("image {}: packing {}", recipe.name, packages.join(" ")));
        layers.push(pack(&upper, &["."], work)?);
        lower.insert(0, upper);
    }
    write_layout(&work.join("layout"), recipe.command, &layers)
}

/// debootstrap's minimal system, cached by itself.
fn base(progress: &ProgressBar) -> Result<PathBuf> {
    let base = target().join("sluice-images/.base");
    if base.join("etc/debian_version").exists() {
        return Ok(base);
    }
    progress.set_message("installing a minimal Debian");
    let staged = target().join("sluice-images/.base-new");
    clean_dir(&staged)?;
    fs::create_dir_all(&staged)?;
    let suite =
        output(Command::new("sh").args(["-c", ". /etc/os-release; echo ${VERSION_CODENAME:-stable}"]))?;
    output(Command::new("debootstrap").args(["--variant=minbase", suite.trim()]).arg(&staged))
        .context("debootstrap failed")?;
    script(
        "rm -rf \"$1\"/var/cache/apt/archives/*.deb; find \"$1\"/var/lib/apt/lists -type f -delete",
        &[&staged],
    )?;
    fs::rename(&staged, &base)?;
    Ok(base)
}

/// Installs packages into an overlay on `lower` (topmost first); returns what was written.
fn install(work: &Path, number: usize, lower: &[PathBuf], packages: &[&str]) -> Result<PathBuf> {
    let dir = work.join(format!("step{number}"));
    let (upper, overlay_work, root) = (dir.join("upper"), dir.join("work"), dir.join("root"));
    for path in [&upper, &overlay_work, &root] {
        fs::create_dir_all(path)?;
    }
    let lower = lower.iter().map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>().join(":");
    let options = format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), overlay_work.display());
    output(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&root))?;
    let install = "cp /etc/resolv.conf \"$0\"/etc/ 2>/dev/null || true
        mount --bind /proc \"$0\"/proc; mount -t tmpfs tmpfs \"$0\"/tmp
        printf '#!/bin/sh\\nexit 101\\n' > \"$0\"/usr/sbin/policy-rc.d; chmod 755 \"$0\"/usr/sbin/policy-rc.d
        chroot \"$0\" apt-get -qq update
        chroot \"$0\" apt-get -qq -y --no-install-recommends install \"$@\"
        rm -rf \"$0\"/var/cache/apt/*.bin \"$0\"/var/cache/apt/archives/*.deb \"$0\"/usr/sbin/policy-rc.d
        find \"$0\"/var/lib/apt/lists -type f -delete";
    let installed = output(
        Command::new("sh")
            .arg("-euc")
            .arg(install)
            .arg(&root)
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    );
    unmount_below(&dir)?;
    installed.with_context(|| format!("cannot install {}", packages.join(" ")))?;
    Ok(upper)
}

/// A layer: its digests and size. The blob goes into the layout.
#[derive(Debug)]
struct Layer {
    digest: String,
    diff_id: String,
    size: u64,
}

fn pack(tree: &Path, members: &[&str], work: &Path) -> Result<Layer> {
    whiteouts(tree)?;
    let tar = work.join("layer.tar");
    output(
        Command::new("tar")
            .args([
                "--format=pax",
                "--xattrs",
                "--xattrs-include=security.capability",
                "--xattrs-include=user.*",
                "--numeric-owner",
                "--sort=name",
            ])
            .args(["--pax-option=delete=atime,delete=ctime", "-C"])
            .arg(tree)
            .arg("-cf")
            .arg(&tar)
            .args(members),
    )?;
    let diff_id = sha256(&tar)?;
    script("gzip -6 -n -c \"$1\" > \"$1.gz\"; rm \"$1\"", &[&tar])?;
    let blob = work.join("layer.tar.gz");
    let (digest, size) = (sha256(&blob)?, fs::metadata(&blob)?.len());
    fs::rename(&blob, work.join("layout/blobs/sha256").join(&digest))?;
    Ok(Layer { digest, diff_id, size })
}

/// Turns overlayfs's whiteouts (character device 0:0) and opaque directories into the image specification's.
fn whiteouts(tree: &Path) -> Result<()> {
    let mut left = vec![tree.to_path_buf()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                fs::remove_file(&path)?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                fs::write(dir.join(format!(".wh.{name}")), "")?;
            } else if meta.is_dir() {
                left.push(path);
            }
        }
        let opaque = Command::new("getfattr")
            .args(["--only-values", "-n", "trusted.overlay.opaque"])
            .arg(&dir)
            .output();
        if opaque.is_ok_and(|opaque| opaque.stdout == b"y") {
            fs::write(dir.join(".wh..wh..opq"), "")?;
        }
    }
    Ok(())
}

fn write_layout(layout: &Path, command: &[&str], layers: &[Layer]) -> Result<()> {
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": command },
        "rootfs": {
            "type": "layers",
            "diff_ids": layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect::<Vec<_>>(),
        },
        "history": layers.iter().map(|_| json!({ "created_by": "cargo xtask" })).collect::<Vec<_>>(),
    });
    let (config_digest, config_size) = put(layout, &config)?;
    let descriptor = |layer: &Layer| {
        json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": format!("sha256:{}", layer.digest), "size": layer.size,
        })
    };
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{config_digest}"), "size": config_size,
        },
        "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
    });
    let (digest, size) = put(layout, &manifest)?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size,
            "annotations": { "org.opencontainers.image.ref.name": "latest" },
        }],
    });
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(())
}

fn put(layout: &Path, value: &Value) -> Result<(String, usize)> {
    let text = value.to_string();
    let staged = layout.join("blobs/sha256/new");
    fs::write(&staged, &text)?;
    let digest = sha256(&staged)?;
    fs::rename(&staged, layout.join("blobs/sha256").join(&digest))?;
    Ok((digest, text.len()))
}

fn sha256(path: &Path) -> Result<String> {
    let line = output(Command::new("sha256sum").arg(path))?;
    line.split_ascii_whitespace().next().map(str::to_owned).context("sha256sum said nothing")
}

/// Unmounts whatever is mounted below `dir`, deepest first.
fn unmount_below(dir: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let mut targets: Vec<&str> = table.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    targets.reverse();
    for target in targets.into_iter().filter(|target| Path::new(target).starts_with(dir)) {
        output(Command::new("umount").arg(target))?;
    }
    Ok(())
}

fn clean(dir: &Path) -> Result<()> {
    unmount_below(dir)?;
    clean_dir(dir)
}

fn clean_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Copies an image of any registry; the directory of layouts, and its name there. It keeps its layers as they are.
pub(crate) fn copy(reference: &str) -> Result<(PathBuf, String)> {
    let root = target().join("sluice-images/copied");
    let name: String =
        reference.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
    let name = name.to_ascii_lowercase().trim_matches('-').to_owned();
    let layout = root.join(&name);
    if !layout.join("index.json").exists() {
        fs::create_dir_all(&root)?;
        let (from, to) = (format!("docker://{reference}"), format!("oci:{}:latest", layout.display()));
        println!("copying {reference}");
        output(Command::new("skopeo").args(["copy", "--quiet", &from, &to]))?;
    }
    Ok((root, name))
}

/// Compressed bytes of the layers of a layout's image.
pub(crate) fn compressed_bytes(layout: &Path) -> Result<u64> {
    Ok(layers(layout)?.iter().filter_map(|layer| layer.get("size")?.as_u64()).sum())
}

/// The layers of a layout's image by their SHA-256, lowest first.
pub(crate) fn layer_digests(layout: &Path) -> Result<Vec<String>> {
    let digest = |layer: &Value| Some(layer.get("digest")?.as_str()?.strip_prefix("sha256:")?.to_owned());
    layers(layout)?.iter().map(|layer| digest(layer).context("a layer without a digest")).collect()
}

/// Descriptors of the layers of a layout's image.
fn layers(layout: &Path) -> Result<Vec<Value>> {
    let read = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let index = read(layout.join("index.json"))?;
    let digest =
        index.pointer("/manifests/0/digest").and_then(Value::as_str).context("the layout has no image")?;
    let manifest = read(layout.join("blobs").join(digest.replace(':', "/")))?;
    manifest.get("layers").and_then(Value::as_array).cloned().context("the image has no layers")
}
