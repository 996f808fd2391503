//! `cargo xtask test-containerd --suite SUITE`: the tests with a real containerd, with another Debian suite's.
//!
//! The package is fetched with lists of its own and unpacked into a root of its own; nothing of the machine's is replaced. Its
//! programs run as they are (Go's depend on old symbols of the C library only); runc is the machine's, since newer ones are
//! linked against a newer C library.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{output, show, target, top};

/// What to test with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Debian suite: bookworm has containerd 1.6, trixie 1.7, sid 2.1 or newer
    #[arg(long)]
    suite: String,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Fetches the suite's containerd and runs the tests with it.
pub(crate) fn test(args: &Args) -> Result<()> {
    packages::install(&packages::RUNTIME)?;
    let programs = fetch(&args.suite, "containerd", &["containerd", "containerd-shim-runc-v2", "ctr"])?;
    println!("{}", output(Command::new(programs.join("containerd")).arg("--version"))?.trim());
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("cargo");
    command
        .args(["test", "--package", "sluice", "--test", "containerd"])
        .args(&args.filter)
        .env("PATH", format!("{}:{path}", programs.display()))
        .current_dir(top());
    show(&mut command)
}

/// A package of a suite, unpacked; a directory with the named programs of it.
fn fetch(suite: &str, package: &str, programs: &[&str]) -> Result<PathBuf> {
    if suite.is_empty() || !suite.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        bail!("`{suite}` is no suite's name");
    }
    let dir = target().join("sluice-suites").join(suite);
    let apt = Apt::new(&dir, suite)?;
    apt.get(&dir, &["update"])?;
    let unpacked = dir.join(package);
    if unpacked.exists() {
        fs::remove_dir_all(&unpacked)?;
    }
    let (downloads, root, bin) = (unpacked.join("download"), unpacked.join("root"), unpacked.join("bin"));
    for made in [&downloads, &root, &bin] {
        fs::create_dir_all(made)?;
    }
    apt.get(&downloads, &["download", package])?;
    for entry in fs::read_dir(&downloads)? {
        output(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&root))?;
    }
    for program in programs {
        symlink(root.join("usr/bin").join(program), bin.join(program))?;
    }
    Ok(bin)
}

/// apt with state, cache and sources of its own.
#[derive(Debug)]
struct Apt(Vec<String>);

impl Apt {
    fn new(dir: &Path, suite: &str) -> Result<Self> {
        for made in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(made))?;
        }
        fs::write(dir.join("status"), "")?;
        // The machine's own mirror has all suites.
        let mirrors = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Created-By: Packages",
            "Label: Debian",
        ]))?;
        let mirror = mirrors.lines().next().context("this machine has no Debian mirror among its sources")?;
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        fs::write(dir.join("sources.list"), format!("deb [signed-by={keyring}] {mirror} {suite} main\n"))?;
        let own = |key: &str, name: &str| format!("{key}={}", dir.join(name).display());
        Ok(Self(vec![
            own("Dir::State", "state"),
            own("Dir::Cache", "cache"),
            own("Dir::State::status", "status"),
            own("Dir::Etc::SourceList", "sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // The directory is root's.
            "APT::Sandbox::User=root".to_owned(),
        ]))
    }

    fn get(&self, dir: &Path, arguments: &[&str]) -> Result<()> {
        let options = self.0.iter().flat_map(|option| ["-o", option]);
        let mut command = Command::new("apt-get");
        output(command.arg("-qq").args(options).args(arguments).current_dir(dir)).map(|_| ())
    }
}
