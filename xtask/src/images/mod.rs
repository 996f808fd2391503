//! `cargo xtask images`: the kernels that test guests boot, fetched as `vm-images/kernels.toml` says, verified, unpacked, cached.
//!
//! Debian's packages are fetched by name and version from their suite, through apt with lists of its own, and none is installed:
//! this system stays as it is. What is kept of each is its vmlinuz and the modules that guests load, in `vm-images` of the
//! target directory.

mod archive;
mod lock;
mod rebuild;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use self::archive::Archive;
use self::lock::{Lock, Locked};
use crate::packages;
use crate::run::{output, target, top};

/// Modules that guests load, with what these depend on. What a kernel has built in is in no file.
const MODULES: [&str; 8] =
    ["virtio_pci", "virtio_blk", "virtio_rng", "ext4", "loop", "fuse", "erofs", "overlay"];

/// What fetching and unpacking needs.
const TOOLS: [(&str, &str); 3] = [
    ("kmod", "finds what kernel modules depend on"),
    ("xz-utils", "unpacks kernel modules"),
    ("debian-archive-keyring", "checks Debian's lists of packages"),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Move the lock to what the suites offer now
    #[arg(long)]
    bump: bool,
}

/// A kernel as guests boot it.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// As the lock calls it.
    pub(crate) name: String,
    /// As `uname -r` prints it.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
    /// In the order in which they must be loaded.
    pub(crate) modules: Vec<PathBuf>,
}

impl Kernel {
    /// Whether it is `major.minor` or newer.
    pub(crate) fn at_least(&self, major: u32, minor: u32) -> bool {
        let mut numbers = self.release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse().ok());
        let mut next = || numbers.next().flatten().unwrap_or(0_u32);
        (next(), next()) >= (major, minor)
    }
}

/// What becomes of a kernel whose locked version its suite does not give any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gone {
    /// It is said what the suite gives now.
    Fails,
    /// That one is taken, checked by the suite's signed lists, and it is said so.
    Follows,
}

/// See the module text.
pub(crate) fn images(args: &Args) -> Result<()> {
    packages::install(&TOOLS)?;
    let mut lock = Lock::read(&lock_path())?;
    if args.bump {
        bump(&mut lock)?;
    }
    for kernel in fetch(&lock, &[], Gone::Fails)? {
        println!(
            "{:<10} {:<28} {} modules {}",
            kernel.name,
            kernel.release,
            kernel.modules.len(),
            kernel.vmlinuz.display()
        );
    }
    Ok(())
}

/// The locked kernels of these names, or all, and those at paths.
pub(crate) fn kernels(wanted: &[String], gone: Gone) -> Result<Vec<Kernel>> {
    packages::install(&TOOLS)?;
    let lock = Lock::read(&lock_path())?;
    let (paths, names): (Vec<&String>, Vec<&String>) = wanted.iter().partition(|name| name.contains('/'));
    let unknown = names.iter().find(|name| !lock.kernels.iter().any(|kernel| kernel.name == ***name));
    if let Some(unknown) = unknown {
        let known: Vec<_> = lock.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        bail!("no kernel `{unknown}`: there are {}, and paths", known.join(", "));
    }
    let mut kernels =
        if wanted.is_empty() || !names.is_empty() { fetch(&lock, &names, gone)? } else { Vec::new() };
    for path in paths {
        kernels.push(of_user(Path::new(path))?);
    }
    Ok(kernels)
}

fn lock_path() -> PathBuf {
    top().join("vm-images/kernels.toml")
}

fn cache() -> PathBuf {
    target().join("vm-images")
}

fn fetch(lock: &Lock, names: &[&String], gone: Gone) -> Result<Vec<Kernel>> {
    let wanted = |kernel: &&Locked| names.is_empty() || names.iter().any(|name| **name == kernel.name);
    let fetch = |locked| fetch_one(locked).or_else(|error| follow(locked, error, gone));
    lock.kernels.iter().filter(wanted).map(fetch).collect()
}

/// The kernel that the suite of a locked one gives now, if it is another one.
fn follow(locked: &Locked, error: anyhow::Error, gone: Gone) -> Result<Kernel> {
    if gone == Gone::Fails {
        return Err(error);
    }
    let offered = Archive::open(&cache(), &locked.suite).and_then(|archive| archive.newest(locked));
    match offered {
        Ok(packages) if packages != locked.packages => {
            println!("{error:#}\nkernel {}: what the suite offers is taken", locked.name);
            fetch_one(&Locked { packages, ..locked.clone() })
        }
        _ => Err(error),
    }
}

/// From the cache, if it is of these packages.
fn fetch_one(locked: &Locked) -> Result<Kernel> {
    let dir = cache().join(&locked.name);
    let patch = match &locked.rebuild {
        Some(rebuild) => std::fs::read_to_string(top().join("vm-images").join(&rebuild.patch))?,
        None => String::new(),
    };
    let stamp = format!("{locked:?}\n{MODULES:?}\n{patch}");
    if std::fs::read_to_string(dir.join("stamp")).is_ok_and(|known| known == stamp) {
        return cached(&locked.name, &dir);
    }
    println!("fetching kernel {} from {}", locked.name, locked.suite);
    let mut archive = None;
    let tree = cache().join("tree");
    remove(&tree)?;
    remove(&dir)?;
    for package in &locked.packages {
        let file = match archive::downloaded(&cache(), package)? {
            Some(file) => file,
            None => {
                if archive.is_none() {
                    archive = Some(Archive::open(&cache(), &locked.suite)?);
                }
                let archive = archive.as_ref().context("an archive was opened")?;
                archive.download(package).with_context(|| archive.offers(locked))?
            }
        };
        output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&tree))?;
    }
    keep(&tree, &dir, Some(locked))?;
    remove(&tree)?;
    std::fs::write(dir.join("stamp"), stamp)?;
    cached(&locked.name, &dir)
}

/// Takes what guests need out of an unpacked package.
fn keep(tree: &Path, dir: &Path, locked: Option<&Locked>) -> Result<()> {
    let kernels = find(tree, |name| name.starts_with("vmlinuz"))?;
    let vmlinuz = kernels.first().with_context(|| format!("no vmlinuz in {}", tree.display()))?;
    let under = ["lib/modules", "usr/lib/modules"].map(|one| tree.join(one));
    let under = under.iter().find(|one| one.is_dir()).context("no lib/modules beside the vmlinuz")?;
    let release = std::fs::read_dir(under)?.next().context("no modules")??.file_name();
    let release = release.to_string_lossy().into_owned();
    let modules = under.join(&release);
    if let Some(rebuild) = locked.and_then(|locked| locked.rebuild.as_ref()) {
        rebuild::rebuild(tree, &modules, rebuild, &top().join("vm-images"))?;
    }
    let base = if under.ends_with("usr/lib/modules") { tree.join("usr") } else { tree.to_path_buf() };
    output(Command::new("depmod").arg("-b").arg(base).arg(&release))?;
    std::fs::create_dir_all(dir.join("modules"))?;
    std::fs::copy(vmlinuz, dir.join("vmlinuz"))?;
    let order = load_order(&std::fs::read_to_string(modules.join("modules.dep"))?, &MODULES);
    for (number, module) in order.iter().enumerate() {
        let name = Path::new(module).file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let plain = dir.join("modules").join(format!("{number:02}-{}", name.trim_end_matches(".xz")));
        if name.ends_with(".xz") {
            let unpacked = Command::new("xz").arg("-dc").arg(modules.join(module)).output()?;
            if !unpacked.status.success() {
                bail!("cannot unpack {name}: {}", String::from_utf8_lossy(&unpacked.stderr));
            }
            std::fs::write(plain, unpacked.stdout)?;
        } else {
            std::fs::copy(modules.join(module), plain)?;
        }
    }
    Ok(std::fs::write(dir.join("release"), release)?)
}

/// Files of `modules.dep` for these modules, what each depends on before it.
fn load_order(dependencies: &str, wanted: &[&str]) -> Vec<String> {
    let stem = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or(path);
        name.split('.').next().unwrap_or(name).replace('-', "_")
    };
    let mut order: Vec<String> = Vec::new();
    for module in wanted {
        let line =
            dependencies.lines().filter_map(|line| line.split_once(':')).find(|(p, _)| stem(p) == *module);
        let Some((path, needs)) = line else { continue };
        // Those listed last are needed by those before them.
        for one in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == one) {
                order.push(one.to_owned());
            }
        }
    }
    order
}

fn cached(name: &str, dir: &Path) -> Result<Kernel> {
    let mut modules: Vec<PathBuf> =
        std::fs::read_dir(dir.join("modules"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    modules.sort();
    let release = std::fs::read_to_string(dir.join("release"))?;
    Ok(Kernel { name: name.to_owned(), release, vmlinuz: dir.join("vmlinuz"), modules })
}

/// A kernel of the user's own: a directory as its package unpacks to, or a vmlinuz-RELEASE whose modules this system has.
fn of_user(path: &Path) -> Result<Kernel> {
    let name = path.file_name().context("--kernel names no file")?.to_string_lossy().into_owned();
    let dir = cache().join("own").join(&name);
    remove(&dir)?;
    if path.is_dir() {
        keep(path, &dir, None)?;
        return cached(&name, &dir);
    }
    let release = name.strip_prefix("vmlinuz-").context("give a directory, or a file vmlinuz-RELEASE")?;
    let tree = cache().join("own-tree");
    remove(&tree)?;
    std::fs::create_dir_all(tree.join("lib/modules"))?;
    std::fs::copy(path, tree.join(&name))?;
    let modules = Path::new("/lib/modules").join(release);
    let modules = if modules.is_dir() { modules } else { path.with_file_name("modules") };
    output(
        Command::new("cp")
            .args(["-r", "--reflink=auto"])
            .arg(modules)
            .arg(tree.join("lib/modules").join(release)),
    )?;
    keep(&tree, &dir, None)?;
    remove(&tree)?;
    cached(&name, &dir)
}

/// Moves every kernel of the lock to what its suite offers.
fn bump(lock: &mut Lock) -> Result<()> {
    for number in 0..lock.kernels.len() {
        let Some(locked) = lock.kernels.get(number).cloned() else { continue };
        let archive = Archive::open(&cache(), &locked.suite)?;
        let offered = archive.newest(&locked).with_context(|| format!("kernel {}", locked.name))?;
        if offered == locked.packages {
            println!("{:<10} stays", locked.name);
            continue;
        }
        for package in &offered {
            println!("{:<10} {} {}", locked.name, package.name, package.version);
        }
        lock.set_packages(number, offered);
    }
    lock.write(&lock_path())
}

fn find(dir: &Path, fits: impl Fn(&str) -> bool + Copy) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(find(&entry.path(), fits)?);
        } else if fits(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let text = "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2.ko kernel/lib/crc16.ko\nkernel/lib/crc16.ko:\n\
                    kernel/drivers/virtio-pci.ko.xz: kernel/lib/crc16.ko\n";
        let order = load_order(text, &["ext4", "virtio_pci", "absent"]);
        let names = ["kernel/lib/crc16.ko", "kernel/fs/jbd2.ko", "kernel/fs/ext4/ext4.ko"];
        assert_eq!(order, names.into_iter().chain(["kernel/drivers/virtio-pci.ko.xz"]).collect::<Vec<_>>());
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        let kernel = |release: &str| Kernel {
            name: String::new(),
            release: release.to_owned(),
            vmlinuz: PathBuf::new(),
            modules: Vec::new(),
        };
        assert!(kernel("5.10.0-32-cloud-amd64").at_least(5, 10));
        assert!(!kernel("5.10.0-32-cloud-amd64").at_least(5, 16));
        assert!(kernel("6.12.107+deb13").at_least(6, 2));
        assert!(kernel("7.3.4").at_least(6, 14));
    }
}
