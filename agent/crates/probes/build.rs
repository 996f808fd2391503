//! Puts the object with the eBPF programs into the crate, if it has been built.
//!
//! `cargo xtask ebpf` builds it into the target directory, as `ebpf/sluice-ebpf.o`; another file is named by
//! `SLUICE_EBPF_OBJECT`. Without it the crate builds all the same, and says at run time that it has no probes.

use std::path::{Path, PathBuf};

fn main() -> std::io::Result<()> {
    println!("cargo::rustc-check-cfg=cfg(with_object)");
    println!("cargo::rerun-if-env-changed=SLUICE_EBPF_OBJECT");
    let object = if let Some(path) = std::env::var_os("SLUICE_EBPF_OBJECT") {
        println!("cargo::rerun-if-changed={}", Path::new(&path).display());
        PathBuf::from(path)
    } else {
        let Some(directory) = directory() else { return Ok(()) };
        // The directory is watched, so that an object that comes later is taken: it must be there.
        std::fs::create_dir_all(&directory)?;
        println!("cargo::rerun-if-changed={}", directory.display());
        directory.join("sluice-ebpf.o")
    };
    if object.is_file() {
        println!("cargo::rustc-cfg=with_object");
        println!("cargo::rustc-env=SLUICE_EBPF_OBJECT_PATH={}", object.display());
    }
    Ok(())
}

/// `ebpf` in the target directory.
fn directory() -> Option<PathBuf> {
    // OUT_DIR is TARGET/PROFILE/build/CRATE-HASH/out, or TARGET/TRIPLE/PROFILE/... when a target is given.
    let out = PathBuf::from(std::env::var_os("OUT_DIR")?);
    let with_triple = std::env::var("TARGET").ok();
    let above = out.ancestors().nth(4)?;
    let triple = above.file_name().and_then(std::ffi::OsStr::to_str).map(str::to_owned);
    let target = if triple.is_some() && triple == with_triple { above.parent()? } else { above };
    Some(target.join("ebpf"))
}
