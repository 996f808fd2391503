//! A module of a kernel, built again from Debian's own sources with a patch: nothing else of the kernel changes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::find;
use super::lock::Rebuild;
use crate::packages;
use crate::run::{output, script};

const TOOLS: [(&str, &str); 4] = [
    ("make", "builds a kernel module"),
    ("patch", "brings an old fault back into a kernel module"),
    ("gcc-12", "the compiler that kernel 6.1 was built with"),
    ("libelf1", "what the kernel's build tools need"),
];

/// Puts the patched module in the place of the one in `modules`. The tree holds the kernel's headers and sources, unpacked.
pub(super) fn rebuild(tree: &Path, modules: &Path, rebuild: &Rebuild, recipes: &Path) -> Result<()> {
    packages::install(&TOOLS)?;
    let tree = &tree.canonicalize()?;
    println!("building {} of the kernel anew, with {}", rebuild.module, rebuild.patch);
    let sources = std::fs::read_dir(tree.join("usr/src"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(".tar.xz"))
        .context("no sources of the kernel")?;
    // The one directory is all that is needed; the rest of the sources is long.
    script(
        r#"cd "$1"; mkdir -p build
           tar -xJf "$2" -C build --strip-components=1 --wildcards "*/$3"
           patch -s -d build -p1 < "$4""#,
        &[tree, &sources, Path::new(&rebuild.module), &recipes.join(&rebuild.patch)],
    )
    .context("cannot patch the module's sources")?;
    // The headers name each other by where they would be installed.
    script(
        r#"cd "$1"; for makefile in linux-headers-*/Makefile; do sed -i "s# /usr/src# $1#" "$makefile"; done"#,
        &[&tree.join("usr/src")],
    )?;
    let headers = std::fs::read_dir(tree.join("usr/src"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.join(".config").exists())
        .context("no headers of the kernel")?;
    let source = tree.join("build").join(&rebuild.module);
    output(
        Command::new("make")
            .arg("-C")
            .arg(headers)
            .arg(format!("M={}", source.display()))
            .args(["CONFIG_OVERLAY_FS=m", "modules"]),
    )
    .context("cannot build the module")?;
    for built in find(&source, |name| name.ends_with(".ko"))? {
        let name = built.file_name().unwrap_or_default().to_string_lossy().into_owned();
        output(Command::new("strip").arg("--strip-debug").arg(&built))?;
        let old = find(modules, |one| one == name)?;
        let old = old.first().with_context(|| format!("the kernel has no {name}"))?;
        std::fs::copy(&built, old)?;
    }
    Ok(())
}
