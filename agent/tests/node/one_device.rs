//! Images as one block device, which kernels before 5.16 need and every kernel can do.

use crate::images::assert_image;
use crate::rig::{Node, sha256, wait_until};

const ONE_DEVICE: &str = "[blocks]\none_device = true\n";

#[test]
fn an_image_is_streamed_through_one_device() {
    let node = Node::indexed(ONE_DEVICE);
    let dir = node.room("mount");
    let name = dir.to_string_lossy().into_owned();
    node.ok(&["mount", &node.image(), &name]);
    assert_image(&dir);
    let wanted = format!("{}  /data/large\n", sha256(&crate::rig::large()));
    assert_eq!(node.shell("sha256sum /data/large"), wanted);
    assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
    node.ok(&["umount", &name]);
    wait_until("the block file is gone", || {
        std::fs::read_dir(node.path("state/blocks")).is_ok_and(|files| files.count() == 0)
    });
}

#[test]
fn readers_of_one_device_do_not_notice_that_the_daemon_dies() {
    let node = Node::indexed(ONE_DEVICE);
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert!(dir.join("data/changed").exists());
    node.kill_daemon();
    let reader = std::thread::spawn({
        let dir = dir.clone();
        move || assert_image(&dir)
    });
    node.ok(&["gc"]); // Any command starts the next daemon.
    reader.join().expect("no read failed");
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn a_store_may_come_from_another_kernel() {
    let node = Node::indexed("");
    let first = node.shell("cat /data/changed");
    for config in [ONE_DEVICE, ""] {
        node.ok(&["node", "drain"]);
        std::fs::write(node.path("config.toml"), config).unwrap();
        assert_eq!(node.shell("cat /data/changed"), first);
    }
}
