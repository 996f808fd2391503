//! `cargo xtask install` and `cargo xtask uninstall`: Sluice on a node, and away from it without a trace.
//!
//! What is changed is written down beside the binary, with the bytes that were there: that record is what uninstalling
//! goes by. A file that the operator changed since is left as the operator wants it, without our lines.

mod containerd;
mod record;
mod verify;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::show;
use record::Record;
pub(crate) use verify::make_image;

const SERVICE: &str = include_str!("../../../deploy/systemd/sluice.service");
const SOCKETS: &str = include_str!("../../../deploy/systemd/sluice.socket");
const MODULES: &str = include_str!("../../../deploy/systemd/modules-load.conf");
const TMPFILES: &str = include_str!("../../../deploy/systemd/tmpfiles.conf");
const CONFIG: &str = include_str!("../../../deploy/config.toml");

const CONTAINERD_CONFIG: &str = "etc/containerd/config.toml";
const SOCKET: &str = "/run/sluice/snapshotter.sock";
/// systemd's own test of being the running init system (sd_booted(3)).
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// Where and how.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Directory of programs on the node
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Install below this directory instead of on this node
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// No units: the agent is started by other means
    #[arg(long)]
    no_systemd: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Only containerd's configuration: a package brought the other files
    #[arg(long, hide = true)]
    packaged: bool,
    /// The program to install [default: built now]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Do not stream a small image with what was installed
    #[arg(long)]
    no_verify: bool,
}

/// One file as it is to be.
#[derive(Debug)]
struct Wanted {
    /// Relative to the root.
    path: PathBuf,
    bytes: Vec<u8>,
    mode: u32,
    /// The operator's: written only where it is missing.
    keep: bool,
}

/// Installs, after showing what changes.
pub(crate) fn install(args: &Args) -> Result<()> {
    let binary = match &args.binary {
        Some(path) => path.clone(),
        None if args.packaged => args.root.join(args.relative_prefix()).join("bin/sluice"),
        None => crate::sluice::build()?,
    };
    let mut record = Record::load(&args.root, &args.record())?;
    let mut changed = false;
    for wanted in args.wanted(&binary)? {
        changed |= place(args, &mut record, &wanted)?;
    }
    if args.dry_run {
        println!("nothing was changed (--dry-run)");
        return Ok(());
    }
    if !changed {
        println!("everything is as it should be");
    }
    if !args.no_verify {
        verify::verify(&args.root.join(args.relative_prefix()).join("bin/sluice"))?;
    }
    args.activate(changed)
}

/// Takes away what `install` brought, and brings back what it changed.
pub(crate) fn uninstall(args: &Args) -> Result<()> {
    let record = Record::load(&args.root, &args.record())?;
    if record.is_empty() {
        println!("nothing is installed below {}", args.root.display());
        return Ok(());
    }
    if args.dry_run {
        for path in record.paths() {
            println!("would restore {}", args.root.join(path).display());
        }
        return Ok(());
    }
    let program = args.root.join(args.relative_prefix()).join("bin/sluice");
    if args.root == Path::new("/") && program.exists() {
        // Ends the server of block files too, which outlives a stop.
        show(Command::new(&program).args(["node", "drain"]))?;
    }
    if args.runs_systemd() {
        show(Command::new("systemctl").args(["disable", "--now", "sluice.socket", "sluice.service"]))?;
    }
    record.restore(&|path, text| {
        if path == Path::new(CONTAINERD_CONFIG) {
            containerd::without_sluice(text).map(Some)
        } else {
            Ok(None)
        }
    })?;
    if args.runs_systemd() {
        show(Command::new("systemctl").arg("daemon-reload"))?;
        show(Command::new("systemctl").args(["try-restart", "containerd.service"]))?;
    }
    Ok(())
}

impl Args {
    fn relative_prefix(&self) -> PathBuf {
        self.prefix.strip_prefix("/").unwrap_or(&self.prefix).to_path_buf()
    }

    fn record(&self) -> PathBuf {
        self.relative_prefix().join("lib/sluice/installed.json")
    }

    fn runs_systemd(&self) -> bool {
        !self.no_systemd && self.root == Path::new("/") && Path::new(SYSTEMD_RUNS).exists()
    }

    fn wanted(&self, binary: &Path) -> Result<Vec<Wanted>> {
        let containerd = self.root.join(CONTAINERD_CONFIG);
        let there = record::read(&containerd)?;
        let mode = there.as_ref().map_or(0o644, |there| there.mode);
        let text = String::from_utf8(there.map(|there| there.bytes).unwrap_or_default())
            .with_context(|| format!("{} is not text", containerd.display()))?;
        let text = containerd::with_sluice(&text, SOCKET)
            .with_context(|| format!("cannot change {}", containerd.display()))?;
        let file = |path: &str, text: &str| Wanted {
            path: path.into(),
            bytes: text.as_bytes().to_vec(),
            mode: 0o644,
            keep: false,
        };
        let containerd = Wanted { mode, ..file(CONTAINERD_CONFIG, &text) };
        if self.packaged {
            return Ok(vec![containerd]);
        }
        let program = std::fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
        let bin = self.relative_prefix().join("bin/sluice");
        let mut all = vec![
            Wanted { path: bin, bytes: program, mode: 0o755, keep: false },
            Wanted { keep: true, ..file("etc/sluice/config.toml", CONFIG) },
            containerd,
            file("etc/modules-load.d/sluice.conf", MODULES),
        ];
        if !self.no_systemd {
            let service = SERVICE.replace("@PREFIX@", &self.prefix.display().to_string());
            all.push(file("etc/systemd/system/sluice.service", &service));
            all.push(file("etc/systemd/system/sluice.socket", SOCKETS));
            all.push(file("etc/tmpfiles.d/sluice.conf", TMPFILES));
        }
        Ok(all)
    }

    /// What makes the files take effect on this node, or a word on what is left to do.
    fn activate(&self, changed: bool) -> Result<()> {
        if self.runs_systemd() {
            show(Command::new("systemctl").arg("daemon-reload"))?;
            show(Command::new("systemd-tmpfiles").args(["--create", "sluice.conf"]))?;
            show(Command::new("modprobe").args(["-a", "erofs", "fuse", "loop", "overlay"]))?;
            show(Command::new("systemctl").args(["enable", "--now", "sluice.socket", "sluice.service"]))?;
            if changed {
                // Containers go on while containerd restarts.
                show(Command::new("systemctl").args(["restart", "sluice.service"]))?;
                show(Command::new("systemctl").args(["try-restart", "containerd.service"]))?;
            }
            return Ok(());
        }
        let program = self.prefix.join("bin/sluice");
        println!("start `{} daemon`, then restart containerd", program.display());
        Ok(())
    }
}

/// What a package brings besides the program, in a package's places.
pub(crate) fn system_files(prefix: &str) -> Vec<(String, String)> {
    [
        ("etc/sluice/config.toml", CONFIG.to_owned()),
        ("usr/lib/systemd/system/sluice.service", SERVICE.replace("@PREFIX@", prefix)),
        ("usr/lib/systemd/system/sluice.socket", SOCKETS.to_owned()),
        ("usr/lib/tmpfiles.d/sluice.conf", TMPFILES.to_owned()),
        ("usr/lib/modules-load.d/sluice.conf", MODULES.to_owned()),
    ]
    .map(|(path, text)| (path.to_owned(), text))
    .into()
}

/// Brings one file to what it is to be; true if it was not.
fn place(args: &Args, record: &mut Record, wanted: &Wanted) -> Result<bool> {
    let path = args.root.join(&wanted.path);
    let there = record::read(&path)?;
    let same = there.as_ref().is_some_and(|there| there.bytes == wanted.bytes && there.mode == wanted.mode);
    if same || (there.is_some() && wanted.keep) {
        return Ok(false);
    }
    print_difference(&path, there.as_ref().map(|there| there.bytes.as_slice()), &wanted.bytes)?;
    if !args.dry_run {
        record.write(&wanted.path, there, &wanted.bytes, wanted.mode)?;
    }
    Ok(true)
}

/// As diff(1) shows it; programs by their sizes.
fn print_difference(path: &Path, old: Option<&[u8]>, new: &[u8]) -> Result<()> {
    let Ok(text) = std::str::from_utf8(new) else {
        println!("{}: {} bytes become {}", path.display(), old.map_or(0, <[u8]>::len), new.len());
        return Ok(());
    };
    println!("--- {}", if old.is_some() { path.display().to_string() } else { "(none)".to_owned() });
    println!("+++ {}", path.display());
    let Some(old) = old else {
        text.lines().for_each(|line| println!("+{line}"));
        return Ok(());
    };
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let staging =
        std::env::temp_dir().join(format!("sluice-install-{}-{}", std::process::id(), since.as_nanos()));
    std::fs::create_dir(&staging)?;
    let (before, after) = (staging.join("before"), staging.join("after"));
    std::fs::write(&before, old)?;
    std::fs::write(&after, new)?;
    let output = Command::new("diff").arg("-u").arg(&before).arg(&after).output();
    std::fs::remove_dir_all(&staging)?;
    let output = output.context("cannot start diff")?;
    // 1 says that they differ (diff(1)).
    if output.status.code() != Some(1) {
        bail!("diff failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8_lossy(&output.stdout).lines().skip(2).for_each(|line| println!("{line}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn args(root: &Path, binary: &Path) -> Args {
        Args {
            prefix: "/usr/local".into(),
            root: root.into(),
            no_systemd: false,
            packaged: false,
            dry_run: false,
            binary: Some(binary.into()),
            no_verify: true,
        }
    }

    /// Every path below `dir` with mode, owner, times and contents.
    fn tree(dir: &Path) -> Vec<String> {
        let mut lines = Vec::new();
        let mut waiting = vec![dir.to_path_buf()];
        while let Some(path) = waiting.pop() {
            let meta = path.symlink_metadata().expect("stat");
            let (contents, time) = if meta.is_dir() {
                waiting.extend(path.read_dir().expect("list").map(|entry| entry.expect("entry").path()));
                (Vec::new(), 0)
            } else {
                (std::fs::read(&path).expect("read"), meta.mtime_nsec())
            };
            lines.push(format!("{} {:o} {} {time} {contents:?}", path.display(), meta.mode(), meta.uid()));
        }
        lines.sort();
        lines
    }

    fn node() -> (std::path::PathBuf, Args) {
        let unique =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time").as_nanos();
        let root = std::env::temp_dir().join(format!("sluice-install-{}-{unique}", std::process::id()));
        std::fs::create_dir_all(root.join("etc/containerd")).expect("create");
        std::fs::create_dir_all(root.join("usr/bin")).expect("create");
        let config = "version = 2\n# the operator's\n[grpc]\n  gid = 7\n";
        std::fs::write(root.join(CONTAINERD_CONFIG), config).expect("write");
        let binary = root.join("usr/bin/built");
        std::fs::write(&binary, [0xff, 0, 1]).expect("write");
        let args = args(&root, &binary);
        (root, args)
    }

    #[test]
    fn uninstalling_brings_back_every_byte() {
        let (root, args) = node();
        let before = tree(&root);
        install(&Args { dry_run: true, ..args.clone() }).expect("dry run");
        assert_eq!(tree(&root), before, "a dry run changes nothing");
        install(&args).expect("install");
        let installed = tree(&root);
        assert_ne!(installed, before);
        let config = std::fs::read_to_string(root.join(CONTAINERD_CONFIG)).expect("read");
        assert!(config.contains("# the operator's") && config.contains("[proxy_plugins.sluice]"), "{config}");
        let dump = crate::run::output(
            Command::new("containerd")
                .arg("--config")
                .arg(root.join(CONTAINERD_CONFIG))
                .args(["config", "dump"]),
        );
        let dump = dump.expect("containerd reads its configuration");
        for line in ["snapshotter = \"sluice\"", "disable_snapshot_annotations = false", "gid = 7"] {
            assert!(dump.contains(line), "{line} is not in\n{dump}");
        }
        install(&args).expect("again");
        assert_eq!(tree(&root), installed, "installing again changes nothing");
        uninstall(&args).expect("uninstall");
        assert_eq!(tree(&root), before);
        uninstall(&args).expect("again");
        std::fs::remove_dir_all(root).expect("remove");
    }

    #[test]
    fn an_upgrade_remembers_what_was_there_first() {
        let (root, args) = node();
        let before = tree(&root);
        install(&args).expect("install");
        let newer = root.with_extension("newer");
        std::fs::write(&newer, "#!/bin/sh\n").expect("write");
        install(&Args { binary: Some(newer.clone()), ..args.clone() }).expect("upgrade");
        assert_eq!(std::fs::read(root.join("usr/local/bin/sluice")).expect("read"), b"#!/bin/sh\n");
        uninstall(&args).expect("uninstall");
        assert_eq!(tree(&root), before);
        std::fs::remove_file(newer).expect("remove");
        std::fs::remove_dir_all(root).expect("remove");
    }

    #[test]
    fn what_the_operator_changed_stays() {
        let (root, args) = node();
        install(&args).expect("install");
        let own = root.join("etc/sluice/config.toml");
        std::fs::write(&own, "[stream]\nfill = false\n").expect("write");
        let containerd = root.join(CONTAINERD_CONFIG);
        let text = std::fs::read_to_string(&containerd).expect("read");
        std::fs::write(&containerd, text.replace("gid = 7", "gid = 8")).expect("write");
        install(&args).expect("again");
        assert_eq!(std::fs::read_to_string(&own).expect("read"), "[stream]\nfill = false\n");
        uninstall(&args).expect("uninstall");
        assert!(own.exists(), "the operator's configuration is not ours to remove");
        let text = std::fs::read_to_string(&containerd).expect("read");
        assert!(text.contains("gid = 8") && !text.contains("sluice"), "{text}");
        assert!(!root.join("usr/local/bin/sluice").exists());
        std::fs::remove_dir_all(root).expect("remove");
    }
}
