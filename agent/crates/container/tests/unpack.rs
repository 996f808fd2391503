//! Layers unpacked the ordinary way, seen as files and through the kernel's overlayfs; and layers that want to get out.
//!
//! Needs root.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use sluice_container::mount_read_only;
use sluice_container::unpack::{UnpackError, unpack_layer};
use sluice_kernel::mount::{UnmountOptions, unmount};
use tar::{Builder, EntryType, Header};

/// No layers below.
const ALONE: [&Path; 0] = [];
const TIME: u64 = 1_234_567_890;

/// A tar that may hold what no well-meaning one does.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, kind: EntryType, path: &str, mode: u32, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(TIME);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(7).expect("major");
            header.set_device_minor(9).expect("minor");
        }
        // Not by `set_path`: that refuses `..` and absolute paths.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).expect("append");
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.add(EntryType::Regular, path, 0o644, "", content.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, 0o755, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, path, 0o777, target, b"")
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Link, path, 0o644, target, b"")
    }

    /// Gives the next entry an extended attribute.
    fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).expect("append");
        self
    }

    /// PAX records in front of the next entry.
    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).expect("append");
        self
    }

    fn tar(self) -> Vec<u8> {
        self.0.into_inner().expect("tar")
    }

    fn unpack(self, dir: &Path) -> Result<(), UnpackError> {
        self.unpack_above(dir, &[])
    }

    /// Above other layers, topmost first.
    fn unpack_above(self, dir: &Path, below: &[&Path]) -> Result<(), UnpackError> {
        let tar = self.tar();
        let sum = digest(&tar);
        unpack_layer(tar.as_slice(), dir, below, &sum, &sum)
    }
}

fn digest(bytes: &[u8]) -> String {
    let sum = ring::digest::digest(&ring::digest::SHA256, bytes);
    format!("sha256:{}", sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// An empty directory inside another one, which holds a file nobody may touch.
fn place() -> (tempfile::TempDir, std::path::PathBuf) {
    let outer = tempfile::tempdir().expect("dir");
    fs::write(outer.path().join("victim"), "untouched").expect("write");
    let inner = outer.path().join("layer");
    fs::create_dir(&inner).expect("create");
    (outer, inner)
}

fn opaque(path: &Path) -> bool {
    xattr::get(path, "trusted.overlay.opaque").expect("get").as_deref() == Some(b"y")
}

fn is_whiteout(path: &Path) -> bool {
    let meta = fs::symlink_metadata(path).expect("meta");
    meta.file_type().is_char_device() && meta.rdev() == 0
}

#[test]
fn every_kind_with_its_attributes() {
    let (_outer, dir) = place();
    Layer::new()
        .add(EntryType::Directory, "d/", 0o2750, "", b"")
        .add(EntryType::Regular, "d/program", 0o6755, "", &vec![7; 300_000])
        .file("d/empty", "")
        .hard_link("linked", "d/program")
        .symlink("d/link", "../linked")
        .hard_link("linked-link", "d/link")
        .add(EntryType::Char, "char", 0o620, "", b"")
        .add(EntryType::Block, "block", 0o660, "", b"")
        .add(EntryType::Fifo, "fifo", 0o600, "", b"")
        .file("implied/parents/file", "x")
        .unpack(&dir)
        .expect("unpack");
    for (path, mode) in [
        ("d", 0o042_750),
        ("d/program", 0o106_755),
        ("d/empty", 0o100_644),
        ("d/link", 0o120_777),
        ("char", 0o020_620),
        ("block", 0o060_660),
        ("fifo", 0o010_600),
    ] {
        let meta = fs::symlink_metadata(dir.join(path)).expect(path);
        assert_eq!((meta.mode(), meta.uid(), meta.gid()), (mode, 1000, 1001), "{path}: {:o}", meta.mode());
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (TIME as i64, 0), "{path}");
    }
    assert_eq!(fs::read(dir.join("d/program")).expect("read"), vec![7; 300_000]);
    let inode = |path: &str| fs::symlink_metadata(dir.join(path)).expect(path).ino();
    assert_eq!(inode("linked"), inode("d/program"));
    assert_eq!(inode("linked-link"), inode("d/link"));
    let char = fs::metadata(dir.join("char")).expect("char");
    assert_eq!((nix::sys::stat::major(char.rdev()), nix::sys::stat::minor(char.rdev())), (7, 9));
    for implied in ["", "implied", "implied/parents"] {
        let meta = fs::metadata(dir.join(implied)).expect(implied);
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o755, 0), "`{implied}`");
    }
}

/// Writing the content takes capabilities away: they come after.
#[test]
fn file_capabilities_and_other_attributes_stay() {
    let (_outer, dir) = place();
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Layer::new()
        .xattr("security.capability", &capability)
        .file("ping", "not empty")
        .xattr("user.note", b"of a directory")
        .dir("dir")
        .xattr("user.note", b"links have none")
        .symlink("link", "ping")
        .unpack(&dir)
        .expect("unpack");
    assert_eq!(xattr::get(dir.join("ping"), "security.capability").expect("get"), Some(capability.to_vec()));
    assert_eq!(xattr::get(dir.join("dir"), "user.note").expect("get"), Some(b"of a directory".to_vec()));
}

#[test]
fn a_layer_does_not_steer_overlayfs() {
    let (_outer, dir) = place();
    Layer::new()
        .xattr("trusted.overlay.redirect", b"/elsewhere")
        .dir("dir")
        .xattr("trusted.overlay.metacopy", b"")
        .file("file", "x")
        .unpack(&dir)
        .expect("unpack");
    for path in ["dir", "file"] {
        let names: Vec<_> = xattr::list(dir.join(path)).expect("list").collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().starts_with("trusted.overlay")), "{names:?}");
    }
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
    let (outer, upper) = place();
    let lower = outer.path().join("lower");
    fs::create_dir(&lower).expect("create");
    Layer::new()
        .file("gone", "lower")
        .file("replaced", "lower")
        .file("early/lower", "lower")
        .file("late/lower", "lower")
        .file("implied/lower", "lower")
        .file("opaque/lower", "lower")
        .file("merged/lower", "lower")
        .unpack(&lower)
        .expect("lower");
    Layer::new()
        .file(".wh.gone", "")
        .file(".wh.replaced", "")
        .file("replaced", "upper")
        .file(".wh.early", "")
        .dir("early")
        .file("early/upper", "upper")
        .file("late/upper", "upper")
        .file(".wh.late", "")
        .file(".wh.implied", "")
        .file("implied/upper", "upper")
        .file("opaque/upper", "upper")
        .file("opaque/.wh..wh..opq", "")
        .file("merged/upper", "upper")
        .file(".wh..wh.plnk", "")
        .unpack(&upper)
        .expect("upper");
    assert!(is_whiteout(&upper.join("gone")));
    for dir in ["early", "late", "implied", "opaque"] {
        assert!(opaque(&upper.join(dir)), "{dir}");
    }
    assert!(!opaque(&upper.join("merged")));
    let target = outer.path().join("target");
    fs::create_dir(&target).expect("create");
    mount_read_only(&[upper, lower], &target).expect("mount");
    let names = |dir: &str| {
        let mut names: Vec<_> = fs::read_dir(target.join(dir))
            .expect("read")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names.join(" ")
    };
    let seen = ["", "early", "late", "implied", "opaque", "merged"].map(names);
    let replaced = fs::read_to_string(target.join("replaced"));
    unmount(&target, UnmountOptions::default()).expect("unmount");
    assert_eq!(
        seen,
        ["early implied late merged opaque replaced", "upper", "upper", "upper", "upper", "lower upper"]
    );
    assert_eq!(replaced.expect("read"), "upper");
}

#[test]
fn later_entries_replace_earlier_ones() {
    let (_outer, dir) = place();
    Layer::new()
        .file("file", "old and longer")
        .file("file", "new")
        .file("tree/below", "x")
        .file("tree", "a file now")
        .symlink("link", "file")
        .file("link", "no link now")
        .file("dir", "x")
        .dir("dir")
        .file("dir/inside", "x")
        .unpack(&dir)
        .expect("unpack");
    let read = |path: &str| fs::read_to_string(dir.join(path)).expect(path);
    assert_eq!(
        [read("file"), read("tree"), read("link"), read("dir/inside")],
        ["new", "a file now", "no link now", "x"]
    );
}

#[test]
fn nothing_gets_out() {
    let (outer, _) = place();
    let base = outer.path().display().to_string();
    let victim = format!("{base}/victim");
    let cases: Vec<(&str, Layer)> = vec![
        ("parents", Layer::new().file("../victim", "evil")),
        ("deep parents", Layer::new().file("a/../../victim", "evil")),
        ("absolute", Layer::new().file(&victim, "evil")),
        ("through an absolute link", Layer::new().symlink("out", &base).file("out/victim", "evil")),
        ("through a relative link", Layer::new().symlink("out", "..").file("out/victim", "evil")),
        ("through two", Layer::new().symlink("a", "..").symlink("b", "a/..").file("b/victim", "evil")),
        ("over a link", Layer::new().symlink("victim", &victim).file("victim", "evil")),
        ("a hard link", Layer::new().hard_link("mine", &victim)),
        ("a hard link by parents", Layer::new().hard_link("mine", "../victim")),
        ("a hard link through a link", Layer::new().symlink("out", "..").hard_link("mine", "out/victim")),
        ("a whiteout", Layer::new().symlink("out", "..").file("out/.wh.victim", "")),
        ("a whiteout of the parent", Layer::new().dir("a").file("a/.wh...", "")),
        ("an opaque parent", Layer::new().symlink("out", "..").file("out/.wh..wh..opq", "")),
        ("a directory", Layer::new().symlink("out", "..").add(EntryType::Directory, "out", 0o777, "", b"")),
        ("proc", Layer::new().symlink("out", "/proc/self/cwd").file("out/evil", "evil")),
    ];
    let before = snapshot(outer.path());
    for (number, (name, layer)) in cases.into_iter().enumerate() {
        let dir = outer.path().join("layer").join(number.to_string());
        fs::create_dir(&dir).expect("create");
        let outcome = layer.unpack(&dir);
        assert_eq!(snapshot(outer.path()), before, "{name}: {outcome:?}");
        let mine = fs::symlink_metadata(dir.join("mine"));
        assert!(mine.is_err(), "{name}: it has the victim");
    }
    assert!(!Path::new("evil").exists());
}

/// What no file system takes, and what only costs: refused for what it is, before it is written.
#[test]
fn what_breaks_a_rule_is_refused() {
    let (name, path) = ("n".repeat(300), "p/".repeat(2100));
    let huge = [("GNU.sparse.size", &b"1152921504606846976"[..]), ("GNU.sparse.map", b"0,1")];
    let overlapping = [("GNU.sparse.size", &b"100"[..]), ("GNU.sparse.map", b"0,10,5,10")];
    let cases: Vec<(&str, Layer)> = vec![
        ("a name of 300 bytes", Layer::new().pax(&[("path", name.as_bytes())]).file("x", "x")),
        ("a path of 4,200 bytes", Layer::new().pax(&[("path", path.as_bytes())]).file("x", "x")),
        ("a hard link to itself", Layer::new().hard_link("a", "a")),
        ("a cycle of hard links", Layer::new().hard_link("a", "b").hard_link("b", "a")),
        ("a hard link to a directory", Layer::new().dir("d").hard_link("a", "d")),
        ("a loop of symbolic links", Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", "x")),
        ("attributes of 2 MiB", Layer::new().xattr("user.a", &vec![b'x'; 2 << 20]).file("x", "x")),
        ("an attribute of 70,000 bytes", Layer::new().xattr("user.a", &[b'x'; 70_000]).file("x", "x")),
        ("overlapping segments", Layer::new().pax(&overlapping).file("x", &"7".repeat(20))),
        ("a file larger than any layer", Layer::new().pax(&huge).file("x", "x")),
    ];
    for (name, layer) in cases {
        let (outer, dir) = place();
        let before = snapshot(outer.path());
        let error = layer.unpack(&dir).expect_err(name);
        assert_eq!(snapshot(outer.path()), before, "{name}: {error}");
    }
}

/// Names, contents and attributes beside the layer.
fn snapshot(outer: &Path) -> (Vec<String>, String, u64, u32, bool) {
    let mut names: Vec<_> = fs::read_dir(outer)
        .expect("read")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let victim = outer.join("victim");
    let meta = fs::metadata(&victim).expect("victim");
    let mode = fs::metadata(outer).expect("outer").mode();
    (names, fs::read_to_string(&victim).expect("read"), meta.nlink(), mode, opaque(outer))
}

#[test]
fn links_in_parents_are_followed_inside() {
    let (_outer, dir) = place();
    Layer::new()
        .dir("usr/lib")
        .symlink("lib", "/usr/lib")
        .symlink("usr/up", "../../../..")
        .file("lib/a", "a")
        .file("usr/up/b", "b")
        .unpack(&dir)
        .expect("unpack");
    assert_eq!(fs::read_to_string(dir.join("usr/lib/a")).expect("a"), "a");
    assert_eq!(fs::read_to_string(dir.join("b")).expect("b"), "b");
}

#[test]
fn all_compressions_and_both_digests() {
    let tar = Layer::new().file("file", &"text ".repeat(200_000)).tar();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).expect("gzip");
    let gzip = gzip.finish().expect("gzip");
    let zstd = zstd::bulk::compress(&tar, 1).expect("zstd");
    let diff_id = digest(&tar);
    for layer in [&tar, &gzip, &zstd] {
        let (_outer, dir) = place();
        unpack_layer(Trickle { left: layer, reads: 0 }, &dir, &ALONE, &digest(layer), &diff_id)
            .expect("unpack");
        assert_eq!(fs::metadata(dir.join("file")).expect("file").len(), 1_000_000);
        let other = digest(b"other");
        for (sum, diff_id, wrong) in [(&other, &diff_id, "layer digest"), (&digest(layer), &other, "diffID")]
        {
            let (_outer, dir) = place();
            let error = unpack_layer(layer.as_slice(), &dir, &ALONE, sum, diff_id).expect_err("mismatch");
            assert!(matches!(error, UnpackError::Digest { what, .. } if what == wrong), "{error:?}");
        }
    }
}

/// Gives few bytes at a time (one at first), and is interrupted between.
struct Trickle<'a> {
    left: &'a [u8],
    reads: usize,
}

impl std::io::Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.reads += 1;
        if self.reads.is_multiple_of(3) {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let len = self.left.len().min(buffer.len()).min(1 + (self.reads - 1) * 7 % 4093);
        let (now, rest) = self.left.split_at(len);
        buffer[..len].copy_from_slice(now);
        self.left = rest;
        Ok(len)
    }
}

#[test]
fn damaged_layers_are_refused() {
    let numbers: String = (0..20_000).map(|number| format!("{number} ")).collect();
    let tar = Layer::new().file("file", &numbers).tar();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).expect("gzip");
    let gzip = gzip.finish().expect("gzip");
    let zstd = zstd::bulk::compress(&tar, 1).expect("zstd");
    for whole in [&tar, &gzip, &zstd] {
        for len in [0, 1, 3, 4, 100, whole.len() / 2] {
            let (_outer, dir) = place();
            let cut = &whole[..len];
            // By its own digest: what remains is for the decoder, the parser and the diffID to find.
            unpack_layer(cut, &dir, &ALONE, &digest(cut), &digest(&tar)).expect_err("cut short");
        }
        let mut flipped = whole.clone();
        let at = whole.len() / 3;
        flipped[at] ^= 0x55;
        let (_outer, dir) = place();
        unpack_layer(flipped.as_slice(), &dir, &ALONE, &digest(&flipped), &digest(&tar))
            .expect_err("damaged");
    }
}

#[test]
fn a_real_tree_as_tar_writes_it() {
    let (outer, dir) = place();
    let tree = outer.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).expect("create");
    fs::write(tree.join("a/b/c"), "c").expect("write");
    symlink("b/c", tree.join("a/l")).expect("link");
    fs::hard_link(tree.join("a/b/c"), tree.join("a/h")).expect("link");
    let output = std::process::Command::new("tar")
        .args(["--create", "--file=-", "--xattrs", "--numeric-owner", "."])
        .current_dir(&tree)
        .output()
        .expect("these tests need tar(1)");
    let sum = digest(&output.stdout);
    unpack_layer(output.stdout.as_slice(), &dir, &ALONE, &sum, &sum).expect("unpack");
    let differences = std::process::Command::new("diff")
        .args(["--recursive", "--no-dereference"])
        .args([&tree, &dir])
        .output()
        .expect("these tests need diff(1)");
    assert!(differences.status.success(), "{}", String::from_utf8_lossy(&differences.stdout));
    let inode = |path: &str| fs::metadata(dir.join(path)).expect(path).ino();
    assert_eq!(inode("a/h"), inode("a/b/c"));
}

/// As containerd has it (its `mkparent`): what the layer does not describe is as below, by the topmost layer that has it.
#[test]
fn implied_directories_are_as_in_the_layers_below() {
    let (outer, lowest) = place();
    let attributed = |layer: Layer, path: &str, mode| layer.add(EntryType::Directory, path, mode, "", b"");
    let lower =
        attributed(Layer::new(), "both/", 0o700).symlink("link", "usr/real").symlink("out", "/../both");
    let lower = attributed(lower.xattr("user.name", b"value"), "usr/", 0o2775);
    attributed(attributed(lower, "usr/real/", 0o711), "hidden/", 0o700).unpack(&lowest).expect("unpack");
    let (middle, top) = (outer.path().join("middle"), outer.path().join("top"));
    for dir in [&middle, &top] {
        fs::create_dir(dir).expect("create");
    }
    attributed(Layer::new(), "both/", 0o750).file("hidden", "").unpack(&middle).expect("unpack");
    let below = [middle.as_path(), lowest.as_path()];
    let layer = Layer::new().symlink("early", "usr/late").file("early/x", "");
    let layer = layer.file("both/x", "").file("link/x", "").file("usr/x", "").file("out/x", "");
    layer.file("hidden/x", "").file("new/x", "").unpack_above(&top, &below).expect("unpack");
    for (path, mode, owner) in [
        ("both", 0o750, 1000),
        ("usr", 0o2775, 1000),
        ("link", 0o711, 1000),
        ("out", 0o700, 1000),
        ("hidden", 0o755, 0),
        ("new", 0o755, 0),
        ("usr/late", 0o755, 0),
    ] {
        let meta = fs::symlink_metadata(top.join(path)).expect(path);
        assert!(meta.is_dir(), "{path}");
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (mode, owner), "{path}");
        if owner != 0 {
            assert_eq!(meta.mtime(), TIME as i64, "{path}");
        }
    }
    let value = xattr::get(top.join("usr"), "user.name").expect("get");
    assert_eq!(value.as_deref(), Some(&b"value"[..]));
    assert!(top.join("usr/late/x").exists(), "a link of the layer itself is followed");
}
