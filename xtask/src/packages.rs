//! Debian packages that the commands need: installed when they are missing, with the reason.

use std::process::Command;

use anyhow::{Context, Result};

use crate::run;

/// What a package is for, by name.
pub(crate) const RUNTIME: [(&str, &str); 5] = [
    ("containerd", "the full pull to compare with"),
    ("runc", "runs containers"),
    ("debootstrap", "makes test images"),
    ("erofs-utils", "checks the EROFS images that are written"),
    ("attr", "compares extended attributes"),
];

/// Packages that fuzzing needs.
pub(crate) const FUZZ: [(&str, &str); 1] = [("g++", "compiles libFuzzer")];

/// Packages that only tests need.
pub(crate) const TESTS: [(&str, &str); 10] = [
    ("crun", "the other runtime that containers run by"),
    ("skopeo", "makes and copies test images"),
    ("umoci", "unpacks images the way others do"),
    ("busybox-static", "the program of the smallest test image"),
    ("libcap2-bin", "gives a test file a capability"),
    ("docker-registry", "a registry that is not ours"),
    ("python3", "touches pages of mapped files"),
    ("python3-venv", "has the programs of others that read what is exported"),
    ("chromium-headless-shell", "shows the report of a start"),
    ("prometheus", "checks the metrics"),
];

/// Installs what is missing of `wanted`.
pub(crate) fn install(wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&(&str, &str)> = wanted.iter().filter(|(name, _)| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for (name, reason) in &missing {
        println!("installing {name}: {reason}");
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-qq", "-o", "Dpkg::Use-Pty=0"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        run::output(&mut command)
    };
    apt(&["update"])
        .context("cannot read the lists of packages; is this a Debian-like system, and are you root?")?;
    let names = missing.iter().map(|(name, _)| *name);
    let arguments: Vec<&str> =
        ["install", "-y", "--no-install-recommends"].into_iter().chain(names).collect();
    apt(&arguments).context("cannot install packages")?;
    Ok(())
}

fn installed(name: &str) -> bool {
    let status = run::output(Command::new("dpkg-query").args(["-W", "-f", "${Status}", name]));
    status.is_ok_and(|status| status.ends_with("install ok installed"))
}
