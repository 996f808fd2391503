//! `cargo xtask ebpf`: builds the eBPF programs, and installs what that needs.
//!
//! The object goes to `ebpf/sluice-ebpf.o` in the target directory, where the build script of the `probes` crate finds it: any
//! `cargo build` after that has probes. Without it everything builds too, and says at run time that it has none.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{output, target, top};

/// The linker that makes BPF objects, from crates.io.
const LINKER_VERSION: &str = "0.13.0";
/// Debian's suite with the sources of recent compilers.
const SOURCES_SUITE: &str = "trixie-backports";

/// Builds the programs and puts the object where builds find it; returns its path.
pub(crate) fn build() -> Result<PathBuf> {
    let compiler = Compiler::ask()?;
    compiler.install_sources()?;
    let tools = compiler.install_linker()?;
    let build = target().join("ebpf-build");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(tools.clone()).chain(std::env::split_paths(&path));
    let flags = format!(
        "-C linker=bpf-linker -C link-arg=--btf --cfg bpf_target_arch=\"{}\"",
        std::env::consts::ARCH
    );
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--locked", "--release", "--target", "bpfel-unknown-none", "-Zbuild-std=core"])
        .current_dir(top().join("ebpf/programs"))
        .env("PATH", std::env::join_paths(paths)?)
        .env("CARGO_TARGET_DIR", &build)
        .env("RUSTFLAGS", flags)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // The target is not a stable one: the pinned compiler is asked for what only nightly ones allow by default.
        .env("RUSTC_BOOTSTRAP", "1");
    output(&mut cargo).context("cannot build the eBPF programs")?;
    let built = build.join("bpfel-unknown-none/release/sluice-ebpf");
    let place = target().join("ebpf/sluice-ebpf.o");
    // What is not new keeps its time, or all that embeds it would be built again.
    if modified(&place).is_none_or(|time| modified(&built).is_none_or(|built| built > time)) {
        compiler.strip(&built, &place)?;
    }
    Ok(place)
}

fn modified(path: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}

/// The compiler that builds everything else, too.
struct Compiler {
    version: String,
    sysroot: PathBuf,
    llvm: String,
}

impl Compiler {
    fn ask() -> Result<Self> {
        // Where the programs are, since a toolchain file there or above decides.
        let ask = |argument: &[&str]| output(Command::new("rustc").args(argument).current_dir(top()));
        let text = ask(&["-vV"])?;
        let value = |name: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            found.with_context(|| format!("rustc does not tell its {name}"))
        };
        let llvm = value("LLVM version:")?;
        Ok(Self {
            version: value("release:")?.to_owned(),
            sysroot: PathBuf::from(ask(&["--print", "sysroot"])?.trim()),
            llvm: llvm.split('.').next().unwrap_or(llvm).to_owned(),
        })
    }

    /// The sources of the core library, exactly of this compiler: they are compiled for BPF.
    fn install_sources(&self) -> Result<()> {
        let place = self.sysroot.join("lib/rustlib/src/rust");
        if place.join("library/core/src/lib.rs").exists() {
            return Ok(());
        }
        println!("installing rust-src: the core library is compiled for BPF");
        let component =
            output(Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(top()));
        let Err(no_component) = component else { return Ok(()) };
        let package = self.sources_from_package(&place);
        package
            .with_context(|| format!("neither the component manager nor Debian has them: {no_component:#}"))
    }

    /// Takes them out of Debian's package of the same version, which need not be installed.
    fn sources_from_package(&self, place: &Path) -> Result<()> {
        let room = target().join("ebpf-tools/rust-src");
        if room.exists() {
            std::fs::remove_dir_all(&room)?;
        }
        let lists = room.join("lists/partial");
        std::fs::create_dir_all(&lists)?;
        let list = room.join("sources.list");
        let mirror = debian_mirror()?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        std::fs::write(&list, format!("deb [signed-by={keys}] {mirror} {SOURCES_SUITE} main\n"))?;
        let apt = |arguments: &[&str]| {
            let mut command = Command::new("apt-get");
            command.arg("-o").arg(format!("Dir::Etc::sourcelist={}", list.display()));
            command.args(["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"]);
            command.arg("-o").arg(format!("Dir::State::lists={}", room.join("lists").display()));
            output(command.args(arguments).current_dir(&room))
        };
        apt(&["update"])?;
        // The newest of its revisions.
        apt(&["download", &format!("rust-src={}*", self.version)])?;
        let package = std::fs::read_dir(&room)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get downloaded nothing")?;
        output(Command::new("dpkg").arg("-x").arg(package).arg(room.join("tree")))?;
        let sources = room.join("tree/usr/src").join(format!("rustc-{}", self.version));
        if !sources.join("library/core/src/lib.rs").exists() {
            bail!("Debian's rust-src is not of version {}", self.version);
        }
        if let Some(above) = place.parent() {
            std::fs::create_dir_all(above)?;
        }
        if place.is_symlink() {
            std::fs::remove_file(place)?;
        }
        std::os::unix::fs::symlink(sources, place)?;
        Ok(())
    }

    /// bpf-linker, made with the compiler's own version of LLVM; returns the directory it is in.
    fn install_linker(&self) -> Result<PathBuf> {
        let root = target().join("ebpf-tools");
        let binaries = root.join("bin");
        let known = output(Command::new(binaries.join("bpf-linker")).arg("--version"));
        if known.is_ok_and(|text| text.trim().ends_with(LINKER_VERSION)) && self.tool("llvm-objcopy").exists()
        {
            return Ok(binaries);
        }
        let (llvm, polly) = (format!("llvm-{}-dev", self.llvm), format!("libpolly-{}-dev", self.llvm));
        let reason = "the linker of eBPF programs is built with it";
        packages::install(&[
            (&llvm, reason),
            (&polly, reason),
            ("zlib1g-dev", reason),
            ("libzstd-dev", reason),
        ])?;
        println!("building bpf-linker {LINKER_VERSION}: it makes eBPF objects");
        let mut cargo = Command::new("cargo");
        cargo
            .args(["install", "bpf-linker", "--locked", "--force", "--no-default-features"])
            .args(["--version", LINKER_VERSION, "--features", &format!("llvm-{}", self.llvm)])
            .arg("--root")
            .arg(&root)
            .current_dir(top())
            .env("CARGO_TARGET_DIR", root.join("build"))
            .env("LLVM_PREFIX", self.prefix())
            .env_remove("RUSTFLAGS");
        output(&mut cargo).context("cannot build bpf-linker")?;
        Ok(binaries)
    }

    /// Leaves debugging information out; what the loader needs is made from it already. An equal object stays as it is,
    /// so that nothing is built anew.
    fn strip(&self, built: &Path, place: &Path) -> Result<()> {
        let stripped = built.with_extension("stripped");
        output(Command::new(self.tool("llvm-objcopy")).arg("--strip-debug").arg(built).arg(&stripped))?;
        let new = std::fs::read(&stripped)?;
        if std::fs::read(place).is_ok_and(|old| old == new) {
            return Ok(());
        }
        if let Some(directory) = place.parent() {
            std::fs::create_dir_all(directory)?;
        }
        // Whole or not at all: a build may be reading it.
        let beside = stripped.with_extension("new");
        std::fs::write(&beside, new)?;
        Ok(std::fs::rename(beside, place)?)
    }

    fn prefix(&self) -> PathBuf {
        PathBuf::from(format!("/usr/lib/llvm-{}", self.llvm))
    }

    fn tool(&self, name: &str) -> PathBuf {
        self.prefix().join("bin").join(name)
    }
}

/// The archive that this machine gets Debian's packages from.
pub(crate) fn debian_mirror() -> Result<String> {
    let format = "$(REPO_URI) $(ORIGIN) $(LABEL)";
    let text =
        output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let mut lines = text.lines().filter_map(|line| line.strip_suffix(" Debian Debian"));
    lines.next().map(str::to_owned).context("apt knows no archive of Debian's; run apt-get update?")
}
