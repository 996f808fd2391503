//! What a start read is known to the next one, also on another node.

use std::fs;
use std::path::PathBuf;

use crate::rig::{Node, noise, sha256, wait_until};

/// Reads two files' worth of three places far apart, after a pause in which a prefetch has time to come first.
const SCRIPT: &str = "sleep 2; for at in 70 110 150; do dd if=/data/large bs=64k skip=$at count=2 2>/dev/null; done | sha256sum; cat /data/changed";

/// What the script says.
fn said() -> String {
    let large = noise(7, crate::rig::LARGE);
    let at = |block: usize| large[block * 65_536..(block + 2) * 65_536].to_vec();
    format!("{}  -\nafter", sha256(&[at(70), at(110), at(150)].concat()))
}

fn counter(node: &Node, name: &str) -> u64 {
    node.status()["reads"][name].as_u64().unwrap()
}

/// One whose artifacts are in a directory; nothing is filled.
fn with_directory() -> Node {
    let node = Node::new("");
    let config =
        format!("index_store = \"file://{}\"\n[stream]\nfill = false\n", node.room("artifacts").display());
    fs::write(node.path("config.toml"), config).unwrap();
    node.ok(&["index", &node.image()]);
    node
}

/// Records a start; bytes that it had to wait for.
fn record(node: &Node) -> u64 {
    let output = node.run(&["trace", "record", &node.image(), "sh", "-c", SCRIPT]);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), said(), "{complaint}");
    assert!(complaint.contains("learned; trace: "), "{complaint}");
    counter(node, "bytes_demand")
}

/// The published blobs of profiles, largest first.
fn published(node: &Node) -> Vec<PathBuf> {
    let dir = node.path("artifacts/sluice/v1/profile/blobs");
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().len()));
    found
}

#[test]
fn a_second_node_fetches_what_the_first_one_read_before_it_is_asked_for() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let demand_first = record(&node);
    let shown = node.ok(&["profile", "show", &node.image()]);
    assert!(shown.contains("1 starts") && shown.contains("/data/large"), "{shown}");
    let list = node.ok(&["profile", "list"]);
    assert!(list.contains("sh -c sleep #"), "{list}");
    node.ok(&["profile", "push", &node.image()]);

    node.become_another();
    assert_eq!(node.shell(SCRIPT), said());
    let (demand, prefetch) = (counter(&node, "bytes_demand"), counter(&node, "bytes_prefetch"));
    assert!(
        demand * 3 < demand_first * 2 && prefetch > 0,
        "{demand} of {demand_first} waited for, {prefetch} fetched before"
    );

    // With the start pack exactly what was read comes, in one request.
    node.ok(&["profile", "push", "--pack", &node.image()]);
    node.become_another();
    assert_eq!(node.shell(SCRIPT), said());
    let log = node.log();
    assert!(log.contains("the start pack is here"), "{log}");
    // What the kernel reads ahead comes besides, with a pack or without.
    let packed = counter(&node, "bytes_prefetch");
    assert!(packed < prefetch, "{packed} bytes with the pack, {prefetch} without");

    // What is known here is united with what is published, and can be forgotten.
    let pulled = node.ok(&["profile", "pull", &node.image(), "sh", "-c", SCRIPT]);
    assert!(pulled.contains("starts of `sh -c sleep #"), "{pulled}");
    node.ok(&["profile", "rm", &node.image()]);
    assert!(node.complaint(&["profile", "show", &node.image()]).contains("there is no profile"));
}

#[test]
fn other_uses_of_the_image_have_profiles_of_their_own() {
    let node = Node::indexed("[stream]\nfill = false\n");
    record(&node);
    node.shell("cat /data/many/7 > /dev/null");
    wait_until("both are learned", || node.ok(&["profile", "list"]).lines().count() == 2);
    node.ok(&["profile", "push", &node.image()]);
    node.ok(&["profile", "push", &node.image()]);
    let pulled = node.ok(&["profile", "pull", &node.image(), "sh", "-c", "cat /data/many/9 > /dev/null"]);
    assert!(pulled.contains("1 starts of `sh -c cat /data/many/#"), "numbers make no class: {pulled}");
}

#[test]
fn a_damaged_start_pack_is_refused_and_the_start_goes_on() {
    let node = with_directory();
    record(&node);
    node.ok(&["profile", "push", "--pack", &node.image()]);
    let pack = published(&node).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    assert!(bytes.starts_with(b"SLUICEPK"), "the largest is the pack");
    let middle = bytes.len() / 2;
    for byte in &mut bytes[middle..middle + 64] {
        *byte ^= 0x5A;
    }
    fs::write(&pack, bytes).unwrap();
    node.become_another();
    assert_eq!(node.shell(SCRIPT), said());
    assert!(node.log().contains("the start pack is refused"), "{}", node.log());
}

#[test]
fn a_damaged_profile_is_refused_and_the_start_goes_on() {
    let node = with_directory();
    record(&node);
    node.ok(&["profile", "push", &node.image()]);
    for blob in published(&node) {
        let mut bytes = fs::read(&blob).unwrap();
        bytes[20..].reverse();
        fs::write(&blob, bytes).unwrap();
    }
    node.become_another();
    assert_eq!(node.shell(SCRIPT), said());
    assert!(node.log().contains("the published profile is not used"), "{}", node.log());
}

#[test]
fn prefetch_and_recording_can_be_switched_off() {
    let node = Node::indexed("[stream]\nfill = false\n[prefetch]\nenabled = false\nrecord = false\n");
    let output = node.run(&["trace", "record", &node.image(), "cat", "/data/changed"]);
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("nothing was recorded"), "{complaint}");
    assert_eq!(node.ok(&["profile", "list"]), "");
    assert_eq!(counter(&node, "bytes_prefetch"), 0);
}

/// Nothing is known of the start: what it loads is guessed from the program that it reads.
#[test]
fn a_library_comes_before_it_is_asked_for_when_a_program_that_needs_it_is_read() {
    let library = noise(11, 1 << 20);
    let script = "busybox cat /opt/bin/program > /dev/null; busybox sleep 2; busybox cat /opt/lib/libneeded.so | busybox sha256sum | busybox head -c 64";
    let mut waited_for = Vec::new();
    for (switches, ahead) in [("", 0), ("\"elf\"", 1 << 20)] {
        let node = Node::indexed(&format!("[stream]\nfill = false\n[prefetch]\nguess = [{switches}]\n"));
        let image = node.program(&library);
        assert_eq!(node.ok(&["run", &image, "/bin/busybox", "sh", "-c", script]), sha256(&library));
        let fetched = counter(&node, "bytes_prefetch");
        assert!(fetched >= ahead && (ahead > 0 || fetched == 0), "{fetched} bytes guessed by [{switches}]");
        waited_for.push(counter(&node, "bytes_demand"));
    }
    assert!(waited_for[1] + (1 << 20) <= waited_for[0], "bytes waited for, without and with: {waited_for:?}");
}

#[test]
fn a_start_is_over_when_the_container_is_ready() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let script =
        "cat /data/changed > /dev/null; echo now ready; sleep 1; cat /data/large > /dev/null; echo end";
    let output = node.run(&["trace", "record", "--ready-log", "now r.*y", &node.image(), "sh", "-c", script]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "now ready\nend\n");
    let shown = node.ok(&["profile", "show", &node.image()]);
    assert!(shown.contains("  /data/changed") && !shown.contains("  /data/large"), "{shown}");
    node.ok(&["profile", "rm", &node.image()]);
    let test = "busybox test -e /tmp/up";
    let script = "cat /data/many/3 > /dev/null; touch /tmp/up; sleep 2; cat /data/large > /dev/null";
    node.ok(&["run", "--ready-exec", test, &node.image(), "busybox", "sh", "-c", script]);
    let shown = node.ok(&["profile", "list"]);
    assert!(shown.contains("busybox sh -c cat"), "{shown}");
    node.ok(&["profile", "rm", &node.image()]);
    let port = free_port().to_string();
    let script = format!(
        "cat /data/many/3 > /dev/null; busybox nc -l -p {port} < /dev/null; sleep 2; cat /data/large > /dev/null"
    );
    node.ok(&["run", "--ready-port", &port, &node.image(), "sh", "-c", &script]);
    let shown = node.ok(&["profile", "show", &node.image()]);
    assert!(shown.contains("  /data/many/3") && !shown.contains("  /data/large"), "{shown}");
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).unwrap().port()
}

#[test]
fn a_new_version_of_the_image_inherits_what_was_learned_of_the_same_files() {
    let node = Node::indexed("[stream]\nfill = false\n");
    record(&node);
    node.add_version();
    node.bytes_sent();
    let newer = node.image().replace(":latest", ":newer");
    node.ok(&["index", &newer]);
    assert_eq!(node.ok(&["run", &newer, "sh", "-c", SCRIPT]), said().replace("after", "newer"));
    let log = node.log();
    assert!(log.contains("inherited from an earlier version"), "{log}");
    wait_until("the prefetch is done", || node.log().contains("what the profile says is here"));
    // An own start replaces what was inherited.
    wait_until("both have profiles", || node.ok(&["profile", "list"]).lines().count() == 2);
}
