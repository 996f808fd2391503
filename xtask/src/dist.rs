//! `cargo xtask dist deb`: a Debian package, by dpkg-deb alone.
//!
//! dpkg owns the program, the units and the default configuration. containerd's configuration belongs to another package: our
//! lines in it come and go with the maintainer scripts, by the same code as `cargo xtask install`, which is in the package.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::install;
use crate::packages;
use crate::run::{output, show, target, top};

/// Options of the package.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The program to package [default: built now, with optimisation]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where the package is written [default: the target directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Scripts run with the package's root in DPKG_ROOT, which is empty on a running system (dpkg(1)).
const POSTINST: &str = r#"#!/bin/sh
set -e
if [ "$1" = configure ]; then
    "$DPKG_ROOT/usr/lib/sluice/setup" install --packaged --no-verify --prefix /usr --root "${DPKG_ROOT:-/}"
fi
"#;
const PRERM: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ]; then
    "$DPKG_ROOT/usr/lib/sluice/setup" uninstall --prefix /usr --root "${DPKG_ROOT:-/}"
fi
"#;

const MAINTAINER: &str = "The Sluice authors <sluice@sluice.invalid>";
const COPYRIGHT: &str = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: sluice

Files: *
Copyright: 2026 The Sluice authors
License: Apache-2.0
 On Debian systems the license is in /usr/share/common-licenses/Apache-2.0.
";

/// What programs begin with that are no scripts.
const ELF: &[u8] = b"\x7fELF";
const STRIP: [&str; 3] = ["--strip-unneeded", "--remove-section=.comment", "--remove-section=.note"];

/// Writes the package and says where.
pub(crate) fn deb(args: &Args) -> Result<()> {
    let binary = match &args.binary {
        Some(path) => path.clone(),
        None => crate::sluice::build()?,
    };
    let out = args.out.clone().unwrap_or_else(target);
    let tree = target().join(format!("sluice-deb-{}", std::process::id()));
    packages::install(&packages::DIST)?;
    let written = build(&binary, &tree, &out).and_then(|package| check(&package).map(|()| package));
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    println!("{}", written?.display());
    Ok(())
}

/// What Debian's own checker complains of is no package.
fn check(package: &Path) -> Result<()> {
    let arguments = ["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"];
    output(Command::new("lintian").args(arguments).arg(package)).map(drop)
}

/// One entry: what is new stands in the sources' history.
fn changelog() -> Result<String> {
    let committed = output(Command::new("git").args(["log", "-1", "--format=%aD"]).current_dir(top()));
    // Sources may have come without their history.
    let date = committed.or_else(|_| output(Command::new("date").arg("-R")))?;
    let (version, date) = (env!("CARGO_PKG_VERSION"), date.trim());
    Ok(format!("sluice ({version}) unstable; urgency=medium\n\n  * Release.\n\n -- {MAINTAINER}  {date}\n"))
}

fn build(binary: &Path, tree: &Path, out: &Path) -> Result<PathBuf> {
    let put = |path: &str, bytes: &[u8], mode: u32| -> Result<()> {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().context("a file in a directory")?)?;
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    for (path, program) in [("usr/bin/sluice", binary), ("usr/lib/sluice/setup", &std::env::current_exe()?)] {
        let bytes = read(program)?;
        put(path, &bytes, 0o755)?;
        if bytes.starts_with(ELF) {
            output(Command::new("strip").args(STRIP).arg(tree.join(path)))?;
        }
    }
    for (path, text) in install::system_files("/usr") {
        put(&path, text.as_bytes(), 0o644)?;
    }
    put("usr/share/doc/sluice/copyright", COPYRIGHT.as_bytes(), 0o644)?;
    put("usr/share/doc/sluice/changelog", changelog()?.as_bytes(), 0o644)?;
    let man = tree.join("usr/share/man/man1");
    fs::create_dir_all(&man)?;
    show(Command::new(binary).arg("man").arg(&man))?;
    let pages = fs::read_dir(&man)?.map(|page| Ok(page?.path())).collect::<Result<Vec<_>>>()?;
    // Without names and times, so that the same sources make the same package.
    let changelog = tree.join("usr/share/doc/sluice/changelog");
    output(Command::new("gzip").arg("-9n").arg(changelog).args(pages))?;
    let completions = output(Command::new(binary).args(["completions", "bash"]))?;
    put("usr/share/bash-completion/completions/sluice", completions.as_bytes(), 0o644)?;
    put("DEBIAN/conffiles", b"/etc/sluice/config.toml\n", 0o644)?;
    put("DEBIAN/postinst", POSTINST.as_bytes(), 0o755)?;
    put("DEBIAN/prerm", PRERM.as_bytes(), 0o755)?;
    let arch = output(Command::new("dpkg").arg("--print-architecture"))?;
    let version = env!("CARGO_PKG_VERSION");
    let control = format!(
        "Package: sluice\nVersion: {version}\nArchitecture: {}\nMaintainer: {MAINTAINER}\nSection: admin\nPriority: optional\nDepends: libc6, diffutils\nRecommends: containerd, runc | crun\nDescription: streams container images\n Containers start while their image is still in the registry.\n",
        arch.trim()
    );
    put("DEBIAN/control", control.as_bytes(), 0o644)?;
    fs::create_dir_all(out)?;
    let package = out.join(format!("sluice_{version}_{}.deb", arch.trim()));
    output(
        Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "--build"]).arg(tree).arg(&package),
    )?;
    Ok(package)
}
