//! Debian's archive, asked through apt with lists of its own: what a suite offers, and exact versions of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::lock::{Locked, Package};
use crate::ebpf::debian_mirror;
use crate::run::output;

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One suite.
#[derive(Debug)]
pub(super) struct Archive {
    suite: String,
    /// Where packages go.
    packages: PathBuf,
    options: Vec<String>,
}

impl Archive {
    /// Fetches the suite's lists.
    pub(super) fn open(cache: &Path, suite: &str) -> Result<Self> {
        let room = cache.join("apt").join(suite);
        std::fs::create_dir_all(room.join("lists/partial"))?;
        let list = room.join("sources.list");
        let mirror = debian_mirror()?;
        std::fs::write(&list, format!("deb [signed-by={KEYS}] {mirror} {suite} main\n"))?;
        let options = [
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", room.join("lists").display()),
            // In memory: the system's own caches are of other lists.
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ];
        let packages = cache.join("packages");
        std::fs::create_dir_all(&packages)?;
        let this = Self { suite: suite.to_owned(), packages, options: options.to_vec() };
        this.ask("apt-get", &["update"])
            .with_context(|| format!("cannot read the lists of suite {suite}"))?;
        Ok(this)
    }

    /// Fetches a package and checks its digest.
    pub(super) fn download(&self, package: &Package) -> Result<PathBuf> {
        self.fetch(&package.name, &package.version)?;
        let cache = self.packages.parent().unwrap_or(&self.packages);
        downloaded(cache, package)?
            .with_context(|| format!("apt-get left no {} {}", package.name, package.version))
    }

    fn fetch(&self, name: &str, version: &str) -> Result<()> {
        println!("fetching {name} {version}");
        self.ask("apt-get", &["download", &format!("{name}={version}")]).map(|_| ())
    }

    /// What to say when a locked package is gone.
    pub(super) fn offers(&self, locked: &Locked) -> String {
        let wanted = locked.packages.first().map(|one| format!("{} {}", one.name, one.version));
        let now = match self.kernel_packages(&locked.follows) {
            Ok(now) => {
                now.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ")
            }
            Err(error) => format!("unknown: {error:#}"),
        };
        format!(
            "kernel {} is locked to {}, which suite {} does not give; it offers {now} now; \
             `cargo xtask images --bump` moves the lock",
            locked.name,
            wanted.unwrap_or_default(),
            self.suite
        )
    }

    /// The packages of this kernel as they are now, fetched to learn their digests.
    pub(super) fn newest(&self, locked: &Locked) -> Result<Vec<Package>> {
        let mut wanted = self.kernel_packages(&locked.follows)?;
        if locked.rebuild.is_some() {
            wanted.extend(self.sources(&wanted)?);
        }
        let mut packages = Vec::new();
        for (name, version) in wanted {
            self.fetch(&name, &version)?;
            let sha256 = digest(&self.file(&name, &version))?;
            packages.push(Package { name, version, sha256 });
        }
        Ok(packages)
    }

    /// Names and versions of the packages with the kernel that `follows` leads to.
    fn kernel_packages(&self, follows: &str) -> Result<Vec<(String, String)>> {
        let (mut left, mut found) = (vec![follows.to_owned()], Vec::<(String, String)>::new());
        while let Some(name) = left.pop() {
            let shown = self.show(&name)?;
            let needs: Vec<String> = dependencies(&shown)
                .into_iter()
                .filter(|one| {
                    ["linux-image-", "linux-binary-", "linux-modules-"]
                        .iter()
                        .any(|kind| one.starts_with(kind))
                })
                // Those without a version are names that follow versions.
                .filter(|one| {
                    one.split('-').nth(2).is_some_and(|word| word.starts_with(|c: char| c.is_ascii_digit()))
                })
                .collect();
            // From Linux 7.2 on linux-image-* is an empty package.
            if name != follows && needs.is_empty() {
                found.push((name.clone(), field(&shown, "Version")?));
            }
            let known = |one: &String| found.iter().any(|(name, _)| name == one);
            left.extend(needs.into_iter().filter(|one| !known(one)));
        }
        found.sort();
        found.dedup();
        if found.is_empty() {
            bail!("{follows} leads to no kernel in suite {}", self.suite)
        }
        Ok(found)
    }

    /// What a module of that kernel is built from.
    fn sources(&self, kernel: &[(String, String)]) -> Result<Vec<(String, String)>> {
        let (image, version) = kernel.first().context("no kernel")?;
        let release = image.trim_start_matches("linux-image-");
        let series = version.split('.').take(2).collect::<Vec<_>>().join(".");
        let common = release.rsplit_once("-cloud").map_or(release, |(start, _)| start);
        let names = [
            format!("linux-source-{series}"),
            format!("linux-headers-{release}"),
            format!("linux-headers-{common}-common"),
            format!("linux-kbuild-{series}"),
        ];
        Ok(names.into_iter().map(|name| (name, version.clone())).collect())
    }

    fn show(&self, name: &str) -> Result<String> {
        self.ask("apt-cache", &["show", "--no-all-versions", name])
    }

    fn file(&self, name: &str, version: &str) -> PathBuf {
        file_of(&self.packages, name, version).unwrap_or_default()
    }

    fn ask(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        output(command.args(arguments).current_dir(&self.packages))
    }
}

/// The package, if it is in the cache, with the right digest.
pub(super) fn downloaded(cache: &Path, package: &Package) -> Result<Option<PathBuf>> {
    let Some(file) = file_of(&cache.join("packages"), &package.name, &package.version) else {
        return Ok(None);
    };
    let found = digest(&file)?;
    if found != package.sha256 {
        std::fs::remove_file(&file)?;
        bail!(
            "{} {} has the digest {found}, and not {}, which vm-images/kernels.toml names",
            package.name,
            package.version,
            package.sha256
        );
    }
    Ok(Some(file))
}

fn file_of(packages: &Path, name: &str, version: &str) -> Option<PathBuf> {
    // apt writes the colon of an epoch as %3a.
    let start = format!("{name}_{}_", version.replace(':', "%3a"));
    let entries = std::fs::read_dir(packages).ok()?;
    let fits =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start));
    entries.filter_map(|entry| Some(entry.ok()?.path())).find(fits)
}

fn digest(file: &Path) -> Result<String> {
    let said = output(Command::new("sha256sum").arg("-b").arg(file))?;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Names that a package's record depends on.
fn dependencies(record: &str) -> Vec<String> {
    let line = record.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    line.split(',').filter_map(|one| one.split_whitespace().next().map(str::to_owned)).collect()
}

fn field(record: &str, name: &str) -> Result<String> {
    let found = record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    found.map(str::to_owned).with_context(|| format!("a package's record without {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let record = "Package: a\nVersion: 1.2\nDepends: b (= 1.2), c | d, linux-image-5.1-x (= 1)\n";
        assert_eq!(dependencies(record), ["b", "c", "linux-image-5.1-x"]);
        assert_eq!(field(record, "Version").expect("is there"), "1.2");
        assert!(field(record, "Size").is_err());
    }

    #[test]
    fn a_package_of_another_digest_is_refused_and_removed() {
        let cache = std::env::temp_dir().join(format!("sluice-archive-{}", std::process::id()));
        std::fs::create_dir_all(cache.join("packages")).expect("a directory");
        let file = cache.join("packages/a_1_amd64.deb");
        std::fs::write(&file, b"other bytes").expect("written");
        let package = Package { name: "a".into(), version: "1".into(), sha256: "0".repeat(64) };
        let refused = downloaded(&cache, &package).expect_err("another digest").to_string();
        assert!(refused.contains("vm-images/kernels.toml"), "{refused}");
        assert!(!file.exists());
        assert!(downloaded(&cache, &package).expect("nothing there").is_none());
        std::fs::remove_dir_all(cache).expect("removed");
    }
}
