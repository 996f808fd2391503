//! What a guest is made of: an initramfs with PID 1, the kernel's modules and the plan; a disk of programs, taken from this
//! system with their libraries; and an image in a registry's directory, with its index.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::images::Kernel;
use crate::run::{cargo, output, script, show, target};
use crate::sluice::Registry;
use crate::{image_maker, packages};

/// Besides what the commands of tests need already.
const TOOLS: [(&str, &str); 3] = [
    ("ca-certificates", "without any certificate no client of registries can be made"),
    ("e2fsprogs", "makes the guests' disks"),
    ("attr", "reads and writes extended attributes in guests"),
];
/// Programs of this system that cases run.
const PROGRAMS: [&str; 21] = [
    "busybox",
    "sh",
    "true",
    "sha256sum",
    "mv",
    "cp",
    "cat",
    "mount",
    "umount",
    "unshare",
    "losetup",
    "fallocate",
    "getfattr",
    "setfattr",
    "mkfs.ext4",
    "mkfs.erofs",
    "runc",
    "python3",
    "perl",
    "sleep",
    "env",
];
/// Test programs of crates: what cargo calls them, with their package, and what guests do.
const SUITES: [(&str, &str, &str); 2] =
    [("sluice-blockfs", "stack", "stack"), ("sluice-probes", "kernel", "probes")];
/// A file system to write on. Sparse.
const SCRATCH: &str = "8G";

/// Parts that all guests share.
#[derive(Debug)]
pub(super) struct Pack {
    /// The disk of programs.
    pub(super) programs: PathBuf,
    init: PathBuf,
    dir: PathBuf,
}

impl Pack {
    /// Installs what is missing, builds, and packs; with `large` the image of which only one case has use.
    pub(super) fn make(large: bool) -> Result<Self> {
        packages::install(&packages::RUNTIME)?;
        packages::install(&packages::TESTS)?;
        packages::install(&TOOLS)?;
        crate::ebpf::build()?;
        let dir = target().join("kernel-tests");
        std::fs::create_dir_all(&dir)?;
        let init = build_init()?;
        let built = build_suites()?;
        let tree = dir.join("tree");
        if tree.exists() {
            std::fs::remove_dir_all(&tree)?;
        }
        let own = tree.join("usr/lib/kernel-tests");
        std::fs::create_dir_all(&own)?;
        let mut wanted = Vec::new();
        for (name, program) in &built {
            output(Command::new("strip").arg("-o").arg(own.join(name)).arg(program))?;
            wanted.push(program.clone());
        }
        let sluice = built.iter().find(|(name, _)| name == "sluice").context("sluice was not built")?;
        make_image(&dir, &sluice.1, &own.join("images"))?;
        if large {
            make_large_image(&dir, &sluice.1, &own.join("images"))?;
        }
        copy_system(&tree, &wanted)?;
        let programs = dir.join("programs.img");
        make_disk(&programs, "1G", Some(&tree))?;
        std::fs::remove_dir_all(&tree)?;
        Ok(Self { programs, init, dir })
    }

    /// A new disk to write on.
    pub(super) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.disk"));
        make_disk(&path, SCRATCH, None)?;
        Ok(path)
    }

    /// The initramfs of a guest.
    pub(super) fn initramfs(
        &self,
        name: &str,
        kernel: &Kernel,
        without: Option<&str>,
        plan: &str,
    ) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.initramfs"));
        let mut archive = Archive::new(std::io::BufWriter::new(std::fs::File::create(&path)?));
        for dir in ["dev", "modules", "proc", "sys"] {
            archive.directory(dir)?;
        }
        archive.file("init", 0o755, &std::fs::read(&self.init)?)?;
        archive.file("busybox", 0o755, &std::fs::read("/bin/busybox")?)?;
        archive.file("plan", 0o644, plan.as_bytes())?;
        for module in &kernel.modules {
            let file = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is = |name: &str| file.split_once('-').is_some_and(|(_, rest)| rest == format!("{name}.ko"));
            if !without.is_some_and(is) {
                archive.file(&format!("modules/{file}"), 0o644, &std::fs::read(module)?)?;
            }
        }
        archive.finish()?;
        Ok(path)
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.console"))
    }
}

/// PID 1 has no libraries, so that it runs wherever a kernel does.
fn build_init() -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo.args([
        "rustc",
        "--quiet",
        "--package",
        "kernel-tests",
        "--bin",
        "guest",
        "--",
        "-C",
        "target-feature=+crt-static",
    ]);
    show(&mut cargo).context("cannot build the guests' PID 1")?;
    // What else cargo builds under this name is not static.
    let kept = target().join("kernel-tests/guest");
    output(Command::new("strip").arg("-o").arg(&kept).arg(target().join("debug/guest")))?;
    Ok(kept)
}

/// Builds test programs as `cargo test` does, so that neither builds the other's anew; what each is called in guests.
fn build_suites() -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo();
    // The binary itself is built for the tests that drive it, of which `node` are.
    cargo.args([
        "test",
        "--workspace",
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--test",
        "node",
    ]);
    for (_, name, _) in SUITES {
        cargo.args(["--test", name]);
    }
    let messages = output(&mut cargo).context("cannot build the tests that guests run")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut built = vec![("sluice".to_owned(), target().join("debug/sluice"))];
    for message in messages {
        let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (package, name, program) = (text("/package_id"), text("/target/name"), text("/executable"));
        let is_test = message.pointer("/target/kind/0").and_then(Value::as_str) == Some("test");
        let path = |package: &str| format!("/crates/{}", package.trim_start_matches("sluice-"));
        let suite = SUITES.iter().find(|(of, one, _)| *one == name && package.contains(&path(of)));
        if let Some((_, _, called)) = suite.filter(|_| is_test && !program.is_empty()) {
            built.push(((*called).to_owned(), PathBuf::from(program)));
        }
    }
    if built.len() != SUITES.len() + 1 {
        bail!("cargo built {built:?} only");
    }
    Ok(built)
}

/// An image with a bit of everything, in a directory for registries, indexed.
fn make_image(dir: &Path, sluice: &Path, images: &Path) -> Result<()> {
    let work = dir.join("image");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    let (base, upper) = (work.join("base"), work.join("upper"));
    std::fs::create_dir_all(&base)?;
    std::fs::create_dir_all(&upper)?;
    script(
        r#"cd "$1"
           mkdir -p bin data/dir data/gone etc proc dev sys tmp
           cp /bin/busybox bin/busybox
           for name in sh cat echo ls mv sha256sum sleep; do ln -s busybox bin/$name; done
           echo 'root:x:0:0::/:/bin/sh' > etc/passwd
           echo small > data/small
           head -c 10485760 /dev/urandom > data/large
           for n in 0 1 2 3 4 5 6 7 8 9; do head -c 20000 /dev/urandom > data/file$n; done
           for n in '' 1 2 3 4 5 6 7 8; do ln -s target data/link$n; done
           mkfifo data/fifo
           echo x > data/dir/x; echo x > data/gone/x
           echo hard > data/hard1; ln data/hard1 data/hard2
           echo attributed > data/attributed; setfattr -n user.test -v value data/attributed
           cd "$2"; mkdir data; echo changed > data/changed; echo small > data/small"#,
        &[&base, &upper],
    )
    .context("cannot make the guests' image")?;
    let layout = image_maker::of_trees(&work, &[&base, &upper])?;
    std::fs::create_dir_all(images)?;
    output(Command::new("cp").arg("-a").arg(layout).arg(images.join("image")))?;
    // The upper layer's files hide the base's.
    script(
        r#"cp -a "$2"/. "$1"/; cd "$1"; find . -type f -exec sha256sum {} + > "$3"/SUMS"#,
        &[&base, &upper, images],
    )?;
    make_index(&work, sluice, images, "image")?;
    Ok(std::fs::remove_dir_all(work)?)
}

/// An image with a file of more than 2 GiB, `data/huge`: a hole but for three marks, which the case `large-file` knows. The layer
/// is made once, its index by every build.
fn make_large_image(dir: &Path, sluice: &Path, images: &Path) -> Result<()> {
    let (work, kept) = (dir.join("large-image"), dir.join("large"));
    if !kept.join("index.json").exists() {
        for place in [&work, &kept] {
            if place.exists() {
                std::fs::remove_dir_all(place)?;
            }
        }
        let tree = work.join("tree/data");
        std::fs::create_dir_all(&tree)?;
        let file = std::fs::File::create(tree.join("huge"))?;
        for (at, mark) in [(0, "first"), ((2 << 30) - 3, "across"), ((2 << 30) + 65_536, "last")] {
            file.write_all_at(mark.as_bytes(), at)?;
        }
        std::fs::rename(image_maker::of_trees(&work, &[&work.join("tree")])?, &kept)?;
        std::fs::remove_dir_all(&work)?;
    }
    output(Command::new("cp").arg("-aT").arg(kept).arg(images.join("large")))?;
    std::fs::create_dir_all(&work)?;
    make_index(&work, sluice, images, "large")?;
    Ok(std::fs::remove_dir_all(work)?)
}

fn make_index(work: &Path, sluice: &Path, images: &Path, name: &str) -> Result<()> {
    let registry = Registry::start(sluice, images, "10gbit", "0ms")?;
    let mut index = Command::new(sluice);
    for (option, name) in [("--root", "root"), ("--state", "state")] {
        index.arg(option).arg(work.join(name));
    }
    output(index.arg("index").arg(registry.image(name)))
        .with_context(|| format!("cannot index the guests' image {name}"))?;
    Ok(())
}

/// Programs of this system, and the libraries of these and of `others`.
fn copy_system(tree: &Path, others: &[PathBuf]) -> Result<()> {
    let mut files = BTreeSet::new();
    for name in PROGRAMS {
        let found =
            ["/usr/bin", "/usr/sbin"].iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
        files.insert(found.with_context(|| format!("there is no {name}"))?);
    }
    let mut libraries = BTreeSet::new();
    for program in files.iter().chain(others) {
        // A static program or a script has none, which ldd says by failing.
        if let Ok(said) = output(Command::new("ldd").arg(program)) {
            let paths = said.split_whitespace().filter(|word| word.starts_with('/'));
            libraries.extend(paths.map(PathBuf::from));
        }
    }
    files.extend(libraries);
    let python = "import sys,mmap\nfor m in list(sys.modules.values()):\n f=getattr(m,'__file__',None)\n \
                  if f: print(f); c=getattr(m,'__cached__',None); c and print(c)\n";
    let modules = output(Command::new("/usr/bin/python3").args(["-c", python]))?;
    files.extend(modules.lines().map(PathBuf::from).filter(|path| path.exists()));
    for path in &files {
        let place = tree.join(in_usr(path));
        if let Some(above) = place.parent() {
            std::fs::create_dir_all(above)?;
        }
        output(Command::new("cp").args(["-L", "--preserve=mode", "--reflink=auto"]).arg(path).arg(&place))?;
    }
    let perl = output(Command::new("perl").args(["-e", "print grep { m{perl-base} } @INC"]))?;
    let place = tree.join(in_usr(Path::new(perl.trim())));
    std::fs::create_dir_all(&place)?;
    output(Command::new("cp").arg("-aT").arg(perl.trim()).arg(place))?;
    let etc = tree.join("etc");
    std::fs::create_dir_all(&etc)?;
    std::fs::write(etc.join("passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    std::fs::write(etc.join("group"), "root:x:0:\n")?;
    std::fs::write(etc.join("hosts"), "127.0.0.1 localhost\n")?;
    // Without any certificate no client of registries can be made.
    let certificates = Path::new("/etc/ssl/certs/ca-certificates.crt");
    std::fs::create_dir_all(etc.join("ssl/certs"))?;
    std::fs::copy(certificates, etc.join("ssl/certs/ca-certificates.crt"))
        .with_context(|| format!("cannot copy {}", certificates.display()))?;
    if Path::new("/etc/mke2fs.conf").exists() {
        std::fs::copy("/etc/mke2fs.conf", etc.join("mke2fs.conf"))?;
    }
    Ok(())
}

/// Where a file of `/bin`, `/lib` and their like lies, as a relative path: below `usr`, of which these are links.
fn in_usr(path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").unwrap_or(path);
    if relative.starts_with("usr") { relative.to_path_buf() } else { Path::new("usr").join(relative) }
}

fn make_disk(path: &Path, size: &str, tree: Option<&Path>) -> Result<()> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let mut make = Command::new("mke2fs");
    make.args([
        "-q",
        "-t",
        "ext4",
        "-O",
        "^metadata_csum_seed,^orphan_file",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1",
    ]);
    if let Some(tree) = tree {
        make.arg("-d").arg(tree);
    }
    output(make.arg(path).arg(size)).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(())
}

/// The archive that kernels take an initramfs in (cpio, `newc`; Linux's `Documentation/driver-api/early-userspace`).
struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | mode, bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).context("too large for an initramfs")?;
        let name_size = u32::try_from(name.len() + 1)?;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len())
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        let zeros = [0; 4];
        Ok(self.out.write_all(zeros.get(..written.next_multiple_of(4) - written).unwrap_or_default())?)
    }

    fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initramfs_is_what_others_read() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.directory("dir").expect("written");
        archive.file("dir/file", 0o644, b"hello").expect("written");
        archive.finish().expect("written");
        let mut child = Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("busybox is there");
        child.stdin.take().expect("piped").write_all(&bytes).expect("taken");
        let listed = child.wait_with_output().expect("listed");
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "dir\ndir/file\n");
    }

    #[test]
    fn links_of_the_root_lead_below_usr() {
        assert_eq!(in_usr(Path::new("/lib/x/libc.so.6")), Path::new("usr/lib/x/libc.so.6"));
        assert_eq!(in_usr(Path::new("/usr/bin/sh")), Path::new("usr/bin/sh"));
    }
}
