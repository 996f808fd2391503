//! What is not streamed, and says so: lists, the node's switch, registries that fail.

use crate::images::varied;
use crate::rig::{Rig, ok};

#[test]
fn a_denied_image_is_pulled_the_ordinary_way_with_the_reason() {
    let rig = Rig::new("[images]\nallow = [\"127.0.0.1:*\"]\ndeny = [\"*/app:*\"]\n");
    rig.images.add("app", varied(30), &["sh"]);
    let said = rig.ctr_pull("app");
    assert!(said.contains("3 downloaded"), "{said}");
    assert_eq!(rig.run("sluice", "app", "r", "cat /data/top"), "the top\n");
    let (reasons, text) = rig.events("app");
    assert_eq!(reasons, ["StreamingFellBack"], "once an image, not once a layer");
    assert!(text.contains("`*/app:*`") && text.contains("Warning"), "{text}");
}

#[test]
fn the_switch_holds_for_new_images_only_and_over_restarts() {
    let mut rig = Rig::new("");
    rig.images.add("old", varied(31), &["sh"]);
    rig.images.add("new", varied(32), &["sh"]);
    rig.index("old");
    rig.ctr_pull("old");
    rig.start("old", "running");
    assert!(ok(&rig.sluice(&["node", "disable"])).contains("streaming: off"));
    rig.end_agent(nix::sys::signal::Signal::SIGTERM);
    rig.start_agent();
    assert!(ok(&rig.sluice(&["node", "status"])).contains("off (streaming is switched off on this node)"));
    assert_eq!(rig.exec("running", "cat /data/top"), "the top\n");
    assert_eq!(rig.run("sluice", "old", "second", "cat /data/top"), "the top\n");
    assert!(rig.ctr_pull("new").contains("3 downloaded"));
    assert!(ok(&rig.sluice(&["node", "enable"])).contains("streaming: on"));
    rig.images.add("newer", varied(33), &["sh"]);
    assert!(rig.ctr_pull("newer").contains("3 streamed"));
    rig.stop("running");
}

#[test]
fn an_image_whose_index_lies_still_runs() {
    let rig = Rig::new("");
    rig.images.add("app", varied(34), &["sh"]);
    rig.index("app");
    // Whatever the registry answers for the index, the layers themselves are good.
    let layout = rig.path("layouts/app/blobs/sha256");
    for entry in std::fs::read_dir(layout).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes.starts_with(b"SLUICEIX") {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0xff;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    rig.ctr_pull("app");
    assert_eq!(
        rig.run("sluice", "app", "r", "cat /data/top; sha256sum /data/kept | cat > /dev/null"),
        "the top\n"
    );
}

#[test]
fn events_are_followed() {
    use std::io::{BufRead, BufReader};
    let rig = Rig::new("");
    rig.images.add("app", varied(35), &["sh"]);
    let mut follower = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"))
        .arg("--config")
        .arg(rig.path("config.toml"))
        .arg("--state")
        .arg(rig.path("state"))
        .args(["events", "--follow"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    rig.ctr_pull("app");
    let mut said = String::new();
    for wanted in ["Pulling image", "Pulled image", "is on this node"] {
        let line = lines.next().unwrap().unwrap();
        assert!(line.contains(wanted), "{line}");
        said += &line;
    }
    assert!(said.contains(" fetched)"), "{said}");
    follower.kill().unwrap();
    follower.wait().unwrap();
}
