//! Debian packages that the commands need: installed when they are missing, with the reason.

use std::process::Command;

use anyhow::{Context, Result, bail};

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

/// Packages that the soak needs.
pub(crate) const SOAK: [(&str, &str); 2] =
    [("libfaketime", "makes the daemon's clock jump"), ("e2fsprogs", "makes the node's disk")];

/// Packages that the test with systemd needs.
pub(crate) const SYSTEMD: [(&str, &str); 1] = [("systemd", "the service manager that the units are for")];

/// Packages that making a package needs.
pub(crate) const DIST: [(&str, &str); 2] =
    [("binutils", "strips the programs"), ("lintian", "finds what is wrong with the package")];

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
    apt(&[], &["update"])
        .context("cannot read the lists of packages; is this a Debian-like system, and are you root?")?;
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    install_these(&[], &names)
}

/// Installs a package of which this major version is needed, or a newer one: from the system's own suites, or from the backports to it,
/// which are asked by lists of their own, so that the system's stay as they are. It may take the place of an older one.
pub(crate) fn install_at_least(wanted: &(&str, &str), major: u32) -> Result<()> {
    let (name, reason) = *wanted;
    println!("installing {name} {major} or newer: {reason}");
    apt(&[], &["update"]).context("cannot read the lists of packages")?;
    let policy =
        |options: &[String]| run::output(Command::new("apt-cache").args(options).args(["policy", name]));
    if offers(&policy(&[])?, major) {
        return install_these(&[], &[name]);
    }
    let release = std::fs::read_to_string("/etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = format!("{}-backports", codename.context("a system without a code name")?);
    let room = run::target().join("backports");
    std::fs::create_dir_all(room.join("lists/partial"))?;
    let list = room.join("sources.list");
    let own = std::fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    std::fs::write(&list, format!("{own}\ndeb {} {suite} main\n", crate::ebpf::debian_mirror()?))?;
    let options: Vec<String> = [
        format!("Dir::Etc::sourcelist={}", list.display()),
        format!("Dir::State::lists={}", room.join("lists").display()),
        "Dir::Cache::pkgcache=".to_owned(),
        "Dir::Cache::srcpkgcache=".to_owned(),
        "APT::Sandbox::User=root".to_owned(),
        format!("APT::Default-Release={suite}"),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect();
    apt(&options, &["update"]).with_context(|| format!("cannot read the lists of {suite}"))?;
    if !offers(&policy(&options)?, major) {
        bail!("{suite} does not offer it");
    }
    install_these(&options, &[name])
}

/// Whether `apt-cache policy` names a candidate of this major version or a newer one.
fn offers(policy: &str, major: u32) -> bool {
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    let version = candidate.map(|version| version.split_once(':').map_or(version, |(_epoch, rest)| rest));
    let number = version.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    number.is_some_and(|number| number >= major)
}

fn install_these(options: &[String], names: &[&str]) -> Result<()> {
    let arguments: Vec<&str> =
        ["install", "-y", "--no-install-recommends"].iter().chain(names).copied().collect();
    apt(options, &arguments).context("cannot install packages")
}

fn apt(options: &[String], arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["-qq", "-o", "Dpkg::Use-Pty=0"])
        .args(options)
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    run::output(&mut command).map(|_| ())
}

fn installed(name: &str) -> bool {
    let status = run::output(Command::new("dpkg-query").args(["-W", "-f", "${Status}", name]));
    status.is_ok_and(|status| status.ends_with("install ok installed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_compared_by_their_major_version() {
        let policy = |version: &str| format!("qemu:\n  Installed: (none)\n  Candidate: {version}\n");
        assert!(offers(&policy("1:10.0.2+ds-2~bpo12+1"), 10) && offers(&policy("11.1"), 10));
        assert!(!offers(&policy("1:7.2+dfsg-7+deb12u18"), 10) && !offers(&policy("(none)"), 10));
        assert!(!offers("", 10));
    }
}
