//! A registry that goes away and comes back, and one that lies.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{Node, assert_content, ended, large, wait_until};

#[test]
fn a_blocked_read_waits_for_the_registry() {
    let mut node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_registry();
    let reader = std::thread::spawn({
        let path = dir.join("data/large");
        move || assert_content(&path, &large())
    });
    std::thread::sleep(Duration::from_millis(700));
    assert!(!reader.is_finished(), "nothing can have come");
    assert_eq!(node.status()["reads"]["waiting"].as_u64().map(|waiting| waiting > 0), Some(true));
    // The refusing registry takes no connection for its faults either: it is told by a signal of its own making.
    node.revive_registry();
    reader.join().unwrap();
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn only_after_the_time_out_a_read_fails() {
    let mut node = Node::indexed("[stream]\nfill = false\noutage_timeout_s = 1\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_registry();
    let start = Instant::now();
    let error = std::fs::read(dir.join("data/large")).expect_err("the registry is dead");
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
    assert!(start.elapsed() >= Duration::from_secs(1), "it waited {:?}", start.elapsed());
    let log = node.log();
    let line = log.lines().find(|line| line.contains("read failed")).expect("it is logged");
    for word in ["layer=", "offset=", "size="] {
        assert!(line.contains(word), "{line}");
    }
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Of every process that the node has; collectors take no other lines.
#[test]
fn a_log_for_collectors_is_json_throughout() {
    let config = "log_format = \"json\"\n[stream]\nfill = false\noutage_timeout_s = 1\n";
    let mut node = Node::indexed(config);
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_registry();
    std::fs::read(dir.join("data/large")).expect_err("the registry is dead");
    let blocks = std::fs::read_to_string(node.path("state/blocks.log")).unwrap();
    let lines: Vec<Value> = [node.log(), blocks]
        .iter()
        .flat_map(|log| log.lines())
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        for field in ["time", "level", "module", "msg"] {
            assert!(line[field].is_string(), "{field} in {line}");
        }
    }
    let failed = lines.iter().find(|line| line["msg"] == "read failed").expect("it is logged");
    assert_eq!((&failed["level"], failed["offset"].is_u64()), (&json!("error"), true), "{failed}");
    for field in ["layer", "error", "size"] {
        assert!(!failed[field].is_null(), "{field} in {failed}");
    }
    let streaming = lines.iter().find(|line| line["reason"] == "ImageStreaming").expect("it is logged");
    assert_eq!(streaming["image"], node.image(), "{streaming}");
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// The end of a mount waits for what was read ahead; all else of the node goes on, without which that would never come.
#[test]
fn an_image_is_given_back_while_reads_of_it_wait() {
    let mut node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_registry();
    read_ahead(&dir.join("data/large"));
    let mut umount = node.command(&["umount", &dir.to_string_lossy()]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(umount.try_wait().unwrap().is_none(), "it has nothing to wait for");
    assert_eq!(node.status()["reads"]["waiting"].as_u64().map(|waiting| waiting > 0), Some(true));
    node.revive_registry();
    assert!(umount.wait().unwrap().success());
    let again = node.room("again");
    node.ok(&["mount", &node.image(), &again.to_string_lossy()]);
    assert_content(&again.join("data/large"), &large());
    node.ok(&["umount", &again.to_string_lossy()]);
}

#[test]
fn drain_does_not_wait_for_a_dead_registry() {
    let mut node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_registry();
    read_ahead(&dir.join("data/large"));
    let start = Instant::now();
    node.ok(&["node", "drain"]);
    assert!(start.elapsed() < Duration::from_secs(15), "it took {:?}", start.elapsed());
    wait_until("nothing is left", || node.leftovers().is_empty());
}

/// Nor for a slow one: whoever waits for it asks the next daemon.
#[test]
fn a_daemon_that_stops_does_not_wait_for_a_slow_registry() {
    let node = Node::new("");
    let (image, blob) = (node.image(), format!("/blobs/{}", node.layers()[0]));
    for command in [vec!["pull", &image], vec!["run", &image, "cat", "/data/changed"]] {
        node.become_another();
        node.bytes_sent();
        // Once only, and for longer than `stop` would wait.
        node.faults(&json!({ "path": blob, "bytes_per_second": 100_000, "times": 1 }));
        let mut asking = node.command(&command);
        let asking = asking.stdout(Stdio::null()).spawn().unwrap();
        let mut sent = 0;
        wait_until("the layer comes", || {
            sent += node.bytes_sent();
            sent > 20_000
        });
        let stopped = ended("the stop", node.command(&["stop"]).spawn().unwrap());
        assert!(stopped.success(), "{}", node.log());
        assert!(node.log().contains("cut short"), "{}", node.log());
        let asked = ended(command[0], asking);
        assert!(asked.success(), "{command:?}: {}", node.log());
        assert_eq!(node.status()["images"].as_array().unwrap().len(), 1);
    }
}

/// Has the kernel ask for a file's first bytes, and waits for none.
fn read_ahead(path: &std::path::Path) {
    let file = std::fs::File::open(path).unwrap();
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
}

#[test]
fn a_flipped_bit_never_reaches_a_reader() {
    let node = Node::indexed("[stream]\nfill = false\noutage_timeout_s = 1\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    // Of the layer, not of its windows: one that no fetch begins with would not be noticed.
    let blob = format!("/blobs/{}", node.layers()[0]);
    node.faults(&json!({ "path": blob, "flip": true, "times": 1 }));
    assert_content(&dir.join("data/large"), &large());
    assert!(node.log().contains("damaged bytes"), "{}", node.log());
    node.ok(&["umount", &dir.to_string_lossy()]);
}
