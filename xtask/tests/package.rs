//! The Debian package, installed into a root of its own by dpkg and removed again: nothing is left, nothing is changed.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every path below `dir` with mode and contents; dpkg's own records apart.
fn tree(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting = vec![dir.to_path_buf()];
    while let Some(path) = waiting.pop() {
        if path.starts_with(dir.join("var")) {
            continue;
        }
        let meta = path.symlink_metadata().unwrap();
        let mut contents = String::new();
        if meta.is_dir() {
            waiting.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else {
            contents = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        }
        lines.push(format!("{} {:o} {contents}", path.display(), meta.mode()));
    }
    lines.sort();
    lines
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_package_comes_and_goes_without_a_trace() {
    let dir = std::env::temp_dir().join(format!("sluice-package-{}", std::process::id()));
    let scratch = Scratch(dir.clone());
    let (root, program) = (dir.join("root"), dir.join("sluice"));
    std::fs::create_dir_all(root.join("etc/containerd")).unwrap();
    for made in ["info", "updates", "triggers"] {
        std::fs::create_dir_all(root.join("var/lib/dpkg").join(made)).unwrap();
    }
    for made in ["status", "available"] {
        std::fs::write(root.join("var/lib/dpkg").join(made), "").unwrap();
    }
    let own = "version = 2\n# the operator's\n[grpc]\n  gid = 7\n";
    std::fs::write(root.join("etc/containerd/config.toml"), own).unwrap();
    // Stands for the real one, whose building is no part of this.
    let stand_in = r#"#!/bin/sh
if [ "$1" = man ]; then
    printf '.TH sluice 1\n.SH NAME\nsluice \\- streams container images\n' > "$2/sluice.1"
else
    echo "sluice $*"
fi
"#;
    std::fs::write(&program, stand_in).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut dist = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let said = run(dist.args(["dist", "deb", "--binary"]).arg(&program).arg("--out").arg(&dir));
    let package = PathBuf::from(said.lines().last().unwrap());
    let before = tree(&root);
    let dpkg = |arguments: &[&str], package: &Path| {
        let mut command = Command::new("dpkg");
        let options = ["--force-depends", "--force-script-chrootless", "--force-not-root"];
        run(command.arg(format!("--root={}", root.display())).args(options).args(arguments).arg(package))
    };
    dpkg(&["--install"], &package);
    let config = std::fs::read_to_string(root.join("etc/containerd/config.toml")).unwrap();
    assert!(config.contains("# the operator's") && config.contains("[proxy_plugins.sluice]"), "{config}");
    let service = std::fs::read_to_string(root.join("usr/lib/systemd/system/sluice.service")).unwrap();
    assert!(service.contains("ExecStart=/usr/bin/sluice daemon"), "{service}");
    assert_eq!(run(Command::new(root.join("usr/bin/sluice")).arg("x")), "sluice x\n");
    assert!(root.join("etc/sluice/config.toml").exists());
    dpkg(&["--remove"], Path::new("sluice"));
    let config = std::fs::read_to_string(root.join("etc/containerd/config.toml")).unwrap();
    assert_eq!(config, own, "removal brings containerd's own configuration back");
    dpkg(&["--purge"], Path::new("sluice"));
    assert_eq!(tree(&root), before);
    drop(scratch);
}
