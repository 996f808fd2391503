//! Pulls by plain clients: streamed through `sluice ctr-pull`, ordinary through `ctr`, and what is in the containers.

use crate::images::{Layer, noise, varied};
use crate::rig::{Rig, assert_same, listed, ok};

#[test]
fn a_streamed_image_runs_before_it_is_here_and_is_what_overlayfs_shows() {
    let rig = Rig::new("[stream]\nfill = false\n");
    let bytes = rig.images.add("app", varied(1), &["sh"]);
    rig.index("app");
    let before = rig.registry.stats().bytes_sent;
    let said = rig.ctr_pull("app");
    assert!(said.contains("3 layers: 3 streamed, 0 there before, 0 downloaded"), "{said}");
    assert_eq!(rig.run("sluice", "app", "first", "cat /data/top"), "the top\n");
    let fetched = rig.registry.stats().bytes_sent - before;
    assert!(fetched < bytes * 3 / 4, "{fetched} of {bytes} bytes: the large file was not asked for");
    let (reasons, text) = rig.events("app");
    assert_eq!(reasons, ["Pulling", "Pulled", "ImageStreaming"], "{text}");
    assert!(text.contains("is backed by image streaming."), "{text}");

    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &rig.reference("app")]);
    let overlayfs = rig.listing("overlayfs", "app", "o");
    assert_same(&rig.listing("sluice", "app", "s"), &overlayfs);
    assert!(overlayfs.iter().any(|line| line.starts_with("./suid f 4755")), "{overlayfs:?}");
}

#[test]
fn an_ordinary_pull_works_with_this_as_the_only_snapshotter() {
    let rig = Rig::new("");
    rig.images.add("app", varied(2), &["sh"]);
    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "sluice", &rig.reference("app")]);
    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &rig.reference("app")]);
    assert_same(&rig.listing("sluice", "app", "s"), &rig.listing("overlayfs", "app", "o"));
    // Pulled again through us: it is there, and stays as it is.
    let said = rig.ctr_pull("app");
    assert!(said.contains("0 streamed, 3 there before"), "{said}");
}

/// Directories that a layer does not describe, and links of lower layers in their place, are what containerd makes of them.
#[test]
fn what_the_agent_unpacks_itself_is_what_overlayfs_shows() {
    let rig = Rig::new("");
    let soft = tar::EntryType::Symlink;
    let mut layers = varied(6);
    layers[0] = std::mem::replace(&mut layers[0], Layer::new())
        .dir("private/", 0o2710)
        .link(soft, "way", "private", 0o777, 0)
        .link(soft, "nowhere", "/missing", 0o777, 0)
        .dir("replaced/", 0o700);
    layers[1] = std::mem::replace(&mut layers[1], Layer::new()).text("replaced", "by a file");
    layers.push(
        Layer::new()
            .text("private/x", "x")
            .text("way/x", "x")
            .text("nowhere/x", "x")
            .text("replaced/x", "x")
            .link(soft, "early", "data/late", 0o777, 0)
            .text("early/x", "x")
            .text("new/x", "x"),
    );
    rig.images.add("app", layers, &["sh"]);
    let dir = rig.path("unpacked");
    std::fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    ok(&rig.sluice(&["mount", "--no-stream", &rig.reference("app"), dir]));
    let ours =
        listed(dir, |script| ok(&std::process::Command::new("sh").arg("-c").arg(script).output().unwrap()));
    ok(&rig.sluice(&["umount", dir]));
    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &rig.reference("app")]);
    assert_same(&ours, &rig.listing("overlayfs", "app", "o"));
}

#[test]
fn an_image_without_an_index_is_pulled_once_and_then_local() {
    let rig = Rig::new("");
    rig.images.add("app", varied(3), &["sh"]);
    let said = rig.ctr_pull("app");
    assert!(said.contains("3 streamed"), "{said}");
    assert_eq!(rig.run("sluice", "app", "first", "cat /data/top"), "the top\n");
    assert_eq!(rig.events("app").0, ["Pulling", "Pulled", "ImageLocal"]);
}

#[test]
fn images_share_layers_streamed_and_ordinary_ones() {
    let rig = Rig::new("[images]\ndeny = [\"*/denied:*\"]\n");
    let base = || Layer::new().tools().text("base", "base\n").text("below", "b");
    let shared = || Layer::new().text("shared", "shared\n");
    rig.images.add("app", vec![base(), shared(), Layer::new().text("own", "app\n")], &["sh"]);
    rig.images.add(
        "denied",
        vec![base(), shared(), Layer::new().whiteout("below").text("own", "denied\n")],
        &["sh"],
    );
    rig.images.add("third", vec![base(), shared(), Layer::new().text("own", "third\n")], &["sh"]);
    assert!(rig.ctr_pull("app").contains("3 streamed, 0 there before, 0 downloaded"));
    // Its lower layers are there as streamed ones, of another image; its own is unpacked upon them.
    assert!(rig.ctr_pull("denied").contains("0 streamed, 2 there before, 1 downloaded"));
    assert!(rig.ctr_pull("third").contains("1 streamed, 2 there before, 0 downloaded"));
    for name in ["app", "denied", "third"] {
        let script = "cat /base /shared /own; ls /below 2>/dev/null; true";
        let below = if name == "denied" { "" } else { "/below\n" };
        assert_eq!(rig.run("sluice", name, "r", script), format!("base\nshared\n{name}\n{below}"));
    }
    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &rig.reference("denied")]);
    assert_same(&rig.listing("sluice", "denied", "s"), &rig.listing("overlayfs", "denied", "o"));
}

#[test]
fn the_other_way_round_a_streamed_layer_stands_on_ordinary_ones() {
    let rig = Rig::new("[images]\ndeny = [\"*/denied:*\"]\n");
    let base = || Layer::new().tools().text("base", "base\n");
    rig.images.add("denied", vec![base(), Layer::new().text("own", "denied\n")], &["sh"]);
    rig.images.add("app", vec![base(), Layer::new().text("own", "app\n")], &["sh"]);
    assert!(rig.ctr_pull("denied").contains("0 streamed, 0 there before, 2 downloaded"));
    assert!(rig.ctr_pull("app").contains("1 streamed, 1 there before, 0 downloaded"));
    assert_eq!(rig.run("sluice", "app", "r", "cat /base /own"), "base\napp\n");
    assert_eq!(rig.run("sluice", "denied", "r", "cat /base /own"), "base\ndenied\n");
}

#[test]
fn namespaces_share_what_is_streamed() {
    let rig = Rig::new("");
    rig.images.add("app", varied(4), &["sh"]);
    assert!(rig.ctr_pull("app").contains("3 streamed"));
    let (socket, reference) = (rig.path("c.sock").display().to_string(), rig.reference("app"));
    let pull = ["ctr-pull", "--address", &socket, "--namespace", "second", &reference];
    let said = crate::rig::ok(&rig.sluice(&pull));
    assert!(said.contains("3 streamed"), "{said}");
    let arguments =
        ["--namespace", "second", "run", "--rm", "--net-host", "--snapshotter", "sluice", &reference];
    let said = rig.ctr(&[&arguments[..], &[rig.id("two").as_str(), "cat", "/data/top"][..]].concat());
    assert_eq!(said, "the top\n");
    // One namespace's removal leaves the other's.
    rig.ctr(&["images", "rm", "--sync", &reference]);
    let said = rig.ctr(&[&arguments[..], &[rig.id("two").as_str(), "cat", "/data/top"][..]].concat());
    assert_eq!(said, "the top\n");
}

#[test]
fn many_layers_streamed_and_ordinary() {
    let rig = Rig::new("[images]\ndeny = [\"*/ordinary:*\"]\n");
    let layers = |seed: u64| {
        let mut layers = vec![Layer::new().tools()];
        for number in 0..100 {
            let layer = Layer::new().text("top", &format!("{number}\n"));
            layers.push(layer.file(&format!("f{number}"), &noise(seed + number, 5_000), 0o644, 0));
        }
        layers
    };
    rig.images.add("streamed", layers(1000), &["sh"]);
    rig.images.add("ordinary", layers(2000), &["sh"]);
    assert!(rig.ctr_pull("streamed").contains("101 layers: 101 streamed"));
    assert!(rig.ctr_pull("ordinary").contains("101 layers: 0 streamed, 1 there before, 100 downloaded"));
    for name in ["streamed", "ordinary"] {
        assert_eq!(rig.run("sluice", name, "r", "cat /top; ls /f0"), "99\n/f0\n");
    }
}
