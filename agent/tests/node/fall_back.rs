//! What prevents streaming is one clear line and an ordinary pull; the command still runs.

use serde_json::json;

use crate::rig::Node;

/// Runs a command, which must succeed; what was said beside its output.
#[track_caller]
fn run_and_hear(node: &Node, arguments: &[&str]) -> String {
    let output = node.run(&[arguments, &[&node.image(), "cat", "/data/changed"]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "after", "{said}\n{}", node.log());
    said
}

#[test]
fn no_stream_unpacks_to_directories() {
    let node = Node::indexed("");
    run_and_hear(&node, &["run", "--no-stream"]);
    assert_eq!(node.status()["images"][0]["state"], "unpacked");
}

#[test]
fn a_damaged_index_is_left_aside() {
    let node = Node::new("");
    let url = format!("file://{}", node.path("indexes").display());
    node.ok(&["index", "--store", &url, &node.image()]);
    let mut damaged = 0;
    for path in files_below(&node.path("indexes")) {
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes.first() != Some(&b'{') && bytes.len() > 4096 {
            let middle = bytes.len() / 2;
            bytes[200] ^= 1;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0, "there are index blobs");
    std::fs::write(node.path("config.toml"), format!("index_store = {url:?}\n")).unwrap();
    let said = run_and_hear(&node, &["run"]);
    assert!(said.contains("index"), "{said}");
}

#[test]
fn a_registry_without_ranges_is_pulled_from() {
    let node = Node::indexed("");
    node.faults(&json!({ "path": "/blobs/", "ignore_ranges": true }));
    run_and_hear(&node, &["run"]);
}

fn files_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}
