//! The EROFS writer against the kernel and `fsck.erofs`: a tree packed by GNU tar, indexed, merged, written and mounted equals the
//! tree it was packed from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sluice_image::erofs::{self, Form};
use sluice_image::index::{ContentSink, IndexOptions, LayerIndexer};
use sluice_image::merge::Tree;
use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{ErofsMount, LoopDevice, LoopOptions, mount_erofs, unmount};

struct OnDisk(File);

impl ContentSink for OnDisk {
    fn write(&mut self, store_offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(bytes, store_offset)
    }

    fn rewind(&mut self, store_offset: u64) -> std::io::Result<()> {
        self.0.set_len(store_offset)
    }
}

fn sh(script: &str, dir: &Path) {
    let status = Command::new("sh").args(["-euc", script]).current_dir(dir).status().expect("sh");
    assert!(status.success(), "{script}");
}

/// What two trees must agree on, by path; without attributes and links for tools that do not restore them.
fn walk(root: &Path, whole: bool) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut left = vec![root.to_path_buf()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).expect("stat");
        let kind = meta.file_type();
        let content = if kind.is_file() {
            format!("{:x}", blake3_of(&path))
        } else if kind.is_symlink() {
            format!("{:?}", fs::read_link(&path).expect("link"))
        } else if kind.is_char_device() || kind.is_block_device() {
            format!("{:x}", meta.rdev())
        } else {
            String::new()
        };
        let links = if kind.is_dir() || !whole { 0 } else { meta.nlink() };
        let size = if kind.is_dir() { 0 } else { meta.size() };
        let line = format!(
            "{:o} {}:{} {size} {}.{} {links} {content} {}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            if whole { xattrs(&path) } else { String::new() }
        );
        out.insert(path.strip_prefix(root).expect("inside").to_path_buf(), line);
        if kind.is_dir() {
            left.extend(fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()));
        }
    }
    out
}

fn blake3_of(path: &Path) -> u64 {
    let digest = blake3::hash(&fs::read(path).expect("read"));
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("8 bytes"))
}

fn xattrs(path: &Path) -> String {
    let out = Command::new("getfattr")
        .args(["-h", "-d", "-m", "-", "--absolute-names", "-e", "hex"])
        .arg(path)
        .output();
    let text = String::from_utf8(out.expect("getfattr (package attr)").stdout).expect("text");
    let mut lines: Vec<&str> = text.lines().filter(|line| line.contains('=')).collect();
    lines.sort_unstable();
    lines.join(" ")
}

fn sample(dir: &Path) {
    sh(
        "mkdir -p a/deep/er empty big; printf hello > a/f; ln a/f a/hard; ln -s ../a/f a/soft; mknod a/null c 1 3
         mknod a/blk b 259 70000; mkfifo a/fifo; printf x > a/suid; chmod 4755 a/suid; chown 70000:80000 a/suid
         setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 a/suid
         setfattr -n user.note -v word a/f; setfattr -n trusted.x -v 0x00ff empty
         touch -d '1969-12-31 23:59:58.5 UTC' a/deep; touch -d '2001-02-03 04:05:06.789012345 UTC' a/f
         for i in $(seq 700); do : > big/+some-file-with-a-long-name-$i; done; : > 'big/ä b'
         head -c 3000000 /dev/urandom > a/random; cp a/random a/copy; head -c 4096 /dev/zero > a/zeros",
        dir,
    );
    symlink("t/".repeat(2000), dir.join("long-link")).expect("symlink");
    let odd = OsString::from_vec(vec![b'o', 0xff, b'd']);
    fs::write(dir.join(odd), "odd").expect("write");
}

/// Packs `tree`, indexes it, and writes layer file and EROFS image into `out`.
fn build(tree: &Path, out: &Path, form: Form) -> (PathBuf, PathBuf, erofs::Written) {
    let tar = out.join("layer.tar.gz");
    let status = Command::new("tar")
        .args(["-c", "-z", "--format=pax", "--xattrs", "--xattrs-include=*", "--sort=name", "-C"])
        .arg(tree)
        .arg("-f")
        .arg(&tar)
        .arg(".")
        .status();
    assert!(status.expect("tar").success());
    let bytes = fs::read(&tar).expect("read");
    let store = out.join("store");
    let mut indexer =
        LayerIndexer::new(IndexOptions::default(), OnDisk(File::create(&store).expect("create")))
            .expect("indexer");
    indexer.push(&bytes).expect("push");
    let digest = format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, &bytes)));
    let (index, sink) = indexer.finish(&digest).expect("index");
    sink.0.set_len(index.header().store_size.get()).expect("length");
    let mut merged = Tree::new();
    merged
        .apply::<Box<dyn std::error::Error>>(
            index.entries().expect("entries").map(|entry| entry.map_err(Into::into)),
        )
        .expect("merge");
    let image = out.join("image.erofs");
    let mut file = std::io::BufWriter::new(File::create(&image).expect("create"));
    let blocks = index.header().store_size.get() / 4096;
    let written = erofs::write(&merged, &[blocks], form, &mut file).expect("write");
    (image, store, written)
}

fn fsck(image: &Path, devices: &[&Path]) {
    let mut command = Command::new("fsck.erofs");
    for device in devices {
        command.arg(format!("--device={}", device.display()));
    }
    let out = command.arg(image).output().expect("fsck.erofs (package erofs-utils)");
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Compares what `fsck.erofs --extract` makes of the image with `tree`. One device only: erofs-utils 1.5 looks for flat files in
/// the first device, whatever address the others have.
fn extract(image: &Path, tree: &Path, out: &Path) {
    let target = out.join("extracted");
    let done = Command::new("fsck.erofs")
        .arg(format!("--extract={}", target.display()))
        .arg(image)
        .output()
        .expect("fsck.erofs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let (found, want) = (walk(&target, false), walk(tree, false));
    for (path, line) in &want {
        assert_eq!(found.get(path), Some(line), "{}", path.display());
    }
    assert_eq!(found.len(), want.len());
}

/// Compares what `dump.erofs` says of each file in `dir` with `tree`.
fn dump(image: &Path, store: &Path, tree: &Path, dir: &str) {
    for entry in fs::read_dir(tree.join(dir)).expect("list") {
        let path = entry.expect("entry").path();
        let inside = path.strip_prefix(tree).expect("inside");
        let out = Command::new("dump.erofs")
            .arg(format!("--device={}", store.display()))
            .arg(format!("--path=/{}", inside.display()))
            .arg(image)
            .env("TZ", "UTC")
            .output()
            .expect("dump.erofs (package erofs-utils)");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{text}");
        let meta = fs::symlink_metadata(&path).expect("stat");
        // A directory's size is EROFS's own.
        let size = if meta.is_dir() { String::new() } else { format!("Size: {} ", meta.size()) };
        for want in [
            size,
            format!("Links: {} ", meta.nlink()),
            format!("Uid: {}   Gid: {} ", meta.uid(), meta.gid()),
            format!("Access: {:04o}/", meta.mode() & 0o7777),
            format!(".{:09}\n", meta.mtime_nsec()),
        ] {
            assert!(text.contains(&want), "{}: {want:?} is not in {text}", inside.display());
        }
    }
}

/// Compares the mounted image with `tree`, and unmounts.
fn compare(image: &Path, devices: &[PathBuf], tree: &Path, out: &Path) {
    let file = File::open(image).expect("open");
    let device = LoopDevice::attach(file.as_fd(), LoopOptions::default()).expect("attach");
    let target = out.join("mnt");
    fs::create_dir_all(&target).expect("create");
    let erofs = ErofsMount {
        device: device.path().to_path_buf(),
        extra_devices: devices.to_vec(),
        restrictions: Restrictions::default(),
    };
    mount_erofs(&erofs, &target).expect("mount");
    let found = walk(&target, true);
    unmount(&target, UnmountOptions::default()).expect("unmount");
    let want = walk(tree, true);
    for (path, line) in &want {
        assert_eq!(found.get(path), Some(line), "{}", path.display());
    }
    assert_eq!(found.len(), want.len());
}

#[test]
fn a_device_per_layer() {
    let (tree, out) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(tree.path());
    let (image, store, _) = build(tree.path(), out.path(), Form::Devices);
    fsck(&image, &[&store]);
    dump(&image, &store, tree.path(), "a");
    let file = File::open(&store).expect("open");
    let device = LoopDevice::attach(file.as_fd(), LoopOptions::default()).expect("attach");
    compare(&image, &[device.path().to_path_buf()], tree.path(), out.path());
}

#[test]
fn one_device_for_all() {
    let (tree, out) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(tree.path());
    let (image, store, written) = build(tree.path(), out.path(), Form::OneDevice);
    assert_eq!(written.layer_offsets, [Some(written.bytes)]);
    let mut whole = fs::read(&image).expect("read");
    whole.extend(fs::read(&store).expect("read"));
    let joined = out.path().join("joined");
    fs::write(&joined, whole).expect("write");
    fsck(&joined, &[]);
    extract(&joined, tree.path(), out.path());
    compare(&joined, &[], tree.path(), out.path());
}
