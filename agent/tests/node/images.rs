//! `mount`, `umount`, `pull`, `status`, `check`, `index`, `rm`, `gc`, `fsck`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;

use crate::rig::{MANY, Node, assert_content, ended, large, one_of_many, wait_until};

/// The image's files are what was put into its layers.
pub(crate) fn assert_image(root: &std::path::Path) {
    assert_content(&root.join("data/large"), &large());
    assert_content(&root.join("data/changed"), b"after");
    assert!(!root.join("data/gone").exists());
    let (changed, linked) =
        (root.join("data/changed").metadata().unwrap(), root.join("data/linked").metadata().unwrap());
    assert_eq!((changed.ino(), changed.nlink(), changed.mode() & 0o7777), (linked.ino(), 2, 0o600));
    for number in 0..MANY {
        assert_content(&root.join(format!("data/many/{number}")), &one_of_many(number));
    }
}

#[test]
fn a_mounted_image_shows_its_files_and_goes_away() {
    let node = Node::indexed("");
    let dir = node.room("mount");
    let name = dir.to_string_lossy().into_owned();
    node.ok(&["mount", &node.image(), &name]);
    assert_image(&dir);
    assert!(std::fs::write(dir.join("data/changed"), "x").is_err(), "it is read-only");
    let complaint = node.complaint(&["rm", &node.image()]);
    assert!(complaint.contains("in use"), "{complaint}");
    node.ok(&["umount", &name]);
    assert!(!dir.join("data").exists());
    let complaint = node.complaint(&["umount", &name]);
    assert!(complaint.contains("nothing is mounted"), "{complaint}");
}

/// The attribute that says how many KiB the kernel reads ahead in files of an image that is mounted below the node's directory.
fn read_ahead(node: &Node) -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let images = node.path("state/images");
    let mount = mounts.lines().find(|line| line.contains(&*images.to_string_lossy())).expect("a mount");
    let device = mount.split(' ').find_map(|word| word.strip_prefix("/dev/")).expect("on a device");
    Path::new("/sys/block").join(device).join("queue/read_ahead_kb")
}

#[test]
fn files_are_read_far_ahead_only_once_that_fetches_nothing() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let mount = |node: &Node| {
        let dir = node.room("mount");
        node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
        dir.to_string_lossy().into_owned()
    };
    let kib = || std::fs::read_to_string(read_ahead(&node)).unwrap().trim().parse::<u64>().unwrap();
    let far = || wait_until("it is read far ahead", || kib() == 512);
    let dir = mount(&node);
    assert_eq!(kib(), 128);
    // Its layers become local while it is in use.
    node.ok(&["pull", &node.image()]);
    far();
    // Had its agent not come to it, the next one would see to it.
    node.ok(&["stop"]);
    std::fs::write(read_ahead(&node), "128").unwrap();
    node.ok(&["gc"]);
    far();
    node.ok(&["umount", &dir]);
    // They are local from the beginning.
    let dir = mount(&node);
    far();
    node.ok(&["umount", &dir]);
}

#[test]
fn the_daemon_does_not_grow_with_the_number_of_files() {
    const FILES: usize = 250_000;
    let node = Node::new("[probes]\nenabled = false\n");
    let crowd = node.crowd(FILES);
    let dir = node.room("mount");
    let name = dir.to_string_lossy().into_owned();
    node.ok(&["mount", &crowd, &name]);
    let found =
        std::fs::read_dir(dir.join("crowd")).unwrap().map(|dir| std::fs::read_dir(dir.unwrap().path()));
    assert_eq!(found.map(|files| files.unwrap().count()).sum::<usize>(), FILES);
    let peak = node.status()["resident_peak_bytes"].as_u64().unwrap();
    assert!(peak < 64 << 20, "the daemon took {} MiB", peak >> 20);
    node.ok(&["umount", &name]);
}

#[test]
fn an_image_is_pulled_used_without_the_registry_and_removed() {
    let mut node = Node::indexed("");
    node.ok(&["pull", &node.image()]);
    node.wait_for_state("local");
    let status = node.status();
    let image = &status["images"][0];
    assert_eq!(image["bytes_local"], image["bytes_total"], "{status}");
    assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
    node.kill_registry();
    assert_eq!(node.shell("cat /data/changed"), "after");
    let said = node.ok(&["rm", &node.image()]);
    assert_eq!(said, "");
    assert_eq!(node.status()["images"].as_array().unwrap().len(), 0);
    assert!(node.status()["disk_bytes"].as_u64().unwrap() < 1 << 20, "{}", node.status());
}

#[test]
fn an_index_is_published_shown_and_used() {
    // Loading probes takes memory of its own, whatever the image.
    let node = Node::new("[probes]\nenabled = false\n");
    let output = node.run(&["check", &node.image()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("not streamable yet"));
    let said = node.ok(&["index", "--dry-run", &node.image()]);
    assert!(said.contains("layers indexed"), "{said}");
    assert_eq!(node.run(&["check", &node.image()]).status.code(), Some(1), "a dry run publishes nothing");
    node.ok(&["index", &node.image()]);
    assert!(node.ok(&["check", &node.image()]).ends_with("streamable\n"));
    assert!(node.ok(&["index", "show", &node.image()]).contains("sha256:"));
}

#[test]
fn an_index_may_be_in_an_object_store() {
    let node = Node::new("");
    let url = format!("file://{}", node.path("indexes").display());
    node.ok(&["index", "--store", &url, &node.image()]);
    assert_eq!(node.run(&["check", &node.image()]).status.code(), Some(1), "the registry has none");
    assert!(node.ok(&["check", "--store", &url, &node.image()]).ends_with("streamable\n"));
    std::fs::write(node.path("config.toml"), format!("index_store = {url:?}\n[stream]\nfill = false\n"))
        .unwrap();
    assert_eq!(node.shell("cat /data/changed"), "after");
    assert_eq!(node.status()["images"][0]["state"], "streaming");
}

#[test]
fn a_first_pull_makes_the_index_for_the_next_node() {
    let node = Node::new("");
    assert_eq!(node.shell("cat /data/changed"), "after");
    assert_eq!(node.status()["images"][0]["state"], "local");
    crate::rig::wait_until("the index is published", || node.run(&["check", &node.image()]).status.success());
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert_image(&dir);
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn unused_layers_are_freed() {
    let node = Node::indexed("");
    node.ok(&["pull", &node.image()]);
    assert_eq!(node.ok(&["gc"]), "0 layers removed, 0 bytes freed\n");
}

#[test]
fn fsck_mends_layers_whose_files_are_gone_though_nobody_uses_them() {
    let node = Node::indexed("");
    for lost in ["data", "index"] {
        node.ok(&["pull", &node.image()]);
        node.wait_for_state("local");
        let layer = std::fs::read_dir(node.path("root/layers")).unwrap().next().unwrap().unwrap();
        std::fs::remove_file(layer.path().join(lost)).unwrap();
        let checked = node.run(&["fsck"]);
        let said = String::from_utf8(checked.stdout).unwrap();
        assert!(!checked.status.success());
        assert!(said.contains("files of it are gone") && said.ends_with(" 1 problems\n"), "{said}");
        assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"), "after {lost} was lost");
        assert_eq!(node.shell("cat /data/changed"), "after");
    }
}

#[test]
fn a_quota_takes_what_nobody_uses_and_never_what_is_mounted() {
    let node = Node::indexed("[store]\nquota_mib = 8\nmemory_budget_mib = 2\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    crate::rig::wait_until("the store is full", || node.status()["disk_full"] == true);
    node.kill_daemon();
    node.ok(&["gc"]);
    // More than disk and memory may hold: it is all there nevertheless.
    assert_content(&dir.join("data/large"), &large());
    let status = node.status();
    assert!(status["disk_bytes"].as_u64().unwrap() <= 9 << 20, "{status}");
    assert_eq!(status["images"].as_array().unwrap().len(), 1);
    node.ok(&["umount", &dir.to_string_lossy()]);
    crate::rig::wait_until("the image is evicted", || node.status()["images"].as_array().unwrap().is_empty());
    assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
}

/// The layers of an image that is being made are its own from the moment on in which that begins.
#[test]
fn nothing_is_removed_from_an_image_that_is_being_made() {
    let node = Node::new("");
    node.add_version();
    let newer = node.image().replace("latest", "newer");
    let blob = format!("/blobs/{}", node.layers_of(1)[1]);
    for command in [vec!["pull", &newer], vec!["run", "--no-stream", &newer, "cat", "/data/changed"]] {
        node.become_another();
        // The lower layer is there, by another image that nobody uses.
        match command[0] {
            "pull" => node.ok(&["pull", &node.image()]),
            _ => node.ok(&["run", "--no-stream", &node.image(), "cat", "/data/changed"]),
        };
        node.bytes_sent();
        node.faults(&json!({ "path": blob, "bytes_per_second": 50, "times": 1 }));
        let mut making = node.command(&command);
        let making = making.stdout(Stdio::null()).spawn().unwrap();
        node.wait_for_slow_blob();
        node.ok(&["rm", &node.image()]);
        node.ok(&["gc"]);
        let complaint = node.complaint(&["rm", &newer]);
        assert!(complaint.contains("no image"), "{complaint}");
        assert!(ended(command[0], making).success(), "{command:?}: {}", node.log());
        assert_eq!(node.ok(&["run", &newer, "cat", "/data/changed"]), "newer");
    }
}

/// Nobody has published an index of it; the node has its own.
#[test]
fn a_layer_that_was_indexed_here_is_fetched_again_without_a_published_index() {
    let node = Node::new("publish_index = false\n");
    node.ok(&["pull", &node.image()]);
    node.ok(&["stop"]);
    for layer in std::fs::read_dir(node.path("root/layers")).unwrap() {
        std::fs::remove_file(layer.unwrap().path().join("data")).unwrap();
    }
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let (root, read) = (dir.clone(), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        assert_image(&root);
        read.0.send(()).unwrap();
    });
    let came = read.1.recv_timeout(std::time::Duration::from_secs(90));
    assert!(came.is_ok(), "{}", node.log());
    node.wait_for_state("local");
    node.ok(&["umount", &dir.to_string_lossy()]);
}
