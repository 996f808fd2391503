//! Starts that really became slower are found: by the command, and by the node.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::rig::{Node, wait_until};

/// The node's registry behind a long line.
struct FarRegistry(Child);

impl FarRegistry {
    fn instead_of(node: &mut Node) -> Self {
        node.kill_registry();
        let mut process = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .arg("registry")
            .arg(node.path("images"))
            .args(["--delay", "300ms", "--listen", &node.address])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self(process)
    }
}

impl Drop for FarRegistry {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A start on a node that has nothing of the image; its trace goes to `keep`.
fn start(node: &Node, keep: &Path) {
    let script = "dd if=/data/large bs=64k count=8 of=/dev/null 2>/dev/null";
    node.ok(&["trace", "record", &node.image(), "sh", "-c", script]);
    wait_until("nobody uses the image", || node.status()["images"][0]["users"] == 0);
    node.ok(&["rm", &node.image()]);
    fs::create_dir_all(keep).unwrap();
    for entry in fs::read_dir(node.path("root/traces")).unwrap() {
        let path = entry.unwrap().path();
        fs::rename(&path, keep.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn slower_starts_are_found() {
    let mut node = Node::indexed("[stream]\nfill = false\n[prefetch]\nenabled = false\n");
    let (base, new) = (node.path("base"), node.path("new"));
    (0..5).for_each(|_| start(&node, &base));
    let far = FarRegistry::instead_of(&mut node);
    (0..5).for_each(|_| start(&node, &new));
    drop(far);
    let (base, new) = (base.to_str().unwrap(), new.to_str().unwrap());
    let output = node.run(&["regress", base, new, "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2), "{report:#}");
    let kinds: Vec<&str> =
        report["findings"].as_array().unwrap().iter().map(|one| one["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"slower_ready") && kinds.contains(&"more_blocked"), "{report:#}");
    assert!(!kinds.contains(&"new_files") && !kinds.contains(&"new_failures"), "{report:#}");
    let junit = node.run(&["regress", base, new, "--junit"]);
    assert!(
        String::from_utf8(junit.stdout)
            .unwrap()
            .contains("name=\"slower_ready\"><failure message=\"time to ready went from")
    );
    // The node saw it by itself, and said it once.
    let events = node.ok(&["events"]);
    let told: Vec<&str> = events.lines().filter(|line| line.contains("StartRegressed")).collect();
    assert_eq!(told.iter().filter(|line| line.contains("time to ready went from")).count(), 1, "{events}");
    // The other way round nothing is worse.
    let output = node.run(&["regress", new, base]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("nothing became worse"), "{said}");
}
