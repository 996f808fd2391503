//! Ordinary snapshots: chains, views, copy-up, what is refused, usage, labels.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sluice_containerd::Kind;

use crate::rig::{Rig, none, refusal};

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_else(|error| error.kind().to_string())
}

#[tokio::test]
async fn a_chain_shows_what_its_layers_did() {
    let rig = Rig::new().await;
    rig.layer("one", "", |dir| {
        std::fs::write(dir.join("kept"), "1").unwrap();
        std::fs::write(dir.join("changed"), "1").unwrap();
        std::fs::write(dir.join("removed"), "1").unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
        std::fs::write(dir.join("d/inside"), "1").unwrap();
    })
    .await;
    rig.layer("two", "one", |dir| {
        std::fs::write(dir.join("changed"), "2").unwrap();
        std::fs::remove_file(dir.join("removed")).unwrap();
        std::fs::remove_dir_all(dir.join("d")).unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
    })
    .await;
    rig.layer("three", "two", |dir| std::fs::rename(dir.join("kept"), dir.join("moved")).unwrap()).await;
    let view = rig.snapshotter.view("look", "three", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        assert_eq!(read(dir, "moved"), "1");
        assert_eq!(read(dir, "kept"), "entity not found");
        assert_eq!(read(dir, "changed"), "2");
        assert_eq!(read(dir, "removed"), "entity not found");
        assert_eq!(dir.join("d").read_dir().unwrap().count(), 0, "an opaque directory");
        assert!(std::fs::write(dir.join("new"), "").is_err(), "a view is read-only");
    });
    let below = rig.snapshotter.view("look at one", "one", none()).await.unwrap();
    rig.with_mounted(&below, |dir| {
        assert_eq!((read(dir, "changed"), read(dir, "d/inside")), ("1".into(), "1".into()));
        assert!(std::fs::write(dir.join("new"), "").is_err(), "a view of one layer is read-only");
    });
}

#[tokio::test]
async fn kinds_and_parents_are_kept_apart() {
    let rig = Rig::new().await;
    let snapshotter = &rig.snapshotter;
    rig.layer("base", "", |_| {}).await;
    snapshotter.prepare("active", "base", none()).await.unwrap();
    snapshotter.view("view", "base", none()).await.unwrap();
    assert_eq!(rig.kind("base").await, Kind::Committed);
    assert_eq!(rig.kind("active").await, Kind::Active);
    assert_eq!(rig.kind("view").await, Kind::View);
    assert_eq!(snapshotter.stat("active").await.unwrap().parent, "base");
    for (said, wanted) in [
        (refusal(snapshotter.prepare("x", "missing", none()).await), "missing does not exist"),
        (refusal(snapshotter.prepare("x", "active", none()).await), "not committed"),
        (refusal(snapshotter.prepare("x", "view", none()).await), "not committed"),
        (refusal(snapshotter.prepare("active", "base", none()).await), "already exists"),
        (refusal(snapshotter.view("active", "base", none()).await), "already exists"),
        (refusal(snapshotter.prepare("", "", none()).await), "needs a name"),
        (refusal(snapshotter.mounts("base").await), "neither active nor a view"),
        (refusal(snapshotter.mounts("missing").await), "does not exist"),
        (refusal(snapshotter.commit("view", "x", none()).await), "not active"),
        (refusal(snapshotter.commit("base", "x", none()).await), "committed"),
        (refusal(snapshotter.commit("missing", "x", none()).await), "does not exist"),
        (refusal(snapshotter.commit("active", "base", none()).await), "already exists"),
        (refusal(snapshotter.remove("base").await), "has children"),
        (refusal(snapshotter.remove("missing").await), "does not exist"),
        (refusal(snapshotter.stat("missing").await), "does not exist"),
    ] {
        assert!(said.contains(wanted), "{said} / {wanted}");
    }
    // What was refused left nothing behind.
    assert_eq!(rig.ids_on_disk(), 3);
    for key in ["active", "view", "base"] {
        snapshotter.remove(key).await.unwrap();
    }
    assert_eq!(rig.ids_on_disk(), 0);
}

#[tokio::test]
async fn mounts_stay_the_same_and_a_removed_name_is_free_again() {
    let rig = Rig::new().await;
    let first = rig.snapshotter.prepare("a", "", none()).await.unwrap();
    assert_eq!(rig.snapshotter.mounts("a").await.unwrap(), first);
    rig.with_mounted(&first, |dir| std::fs::write(dir.join("f"), "old").unwrap());
    rig.snapshotter.remove("a").await.unwrap();
    let second = rig.snapshotter.prepare("a", "", none()).await.unwrap();
    assert_ne!(first, second, "directories are never used again");
    rig.with_mounted(&second, |dir| assert_eq!(dir.read_dir().unwrap().count(), 0));
}

#[tokio::test]
async fn nested_snapshots_are_removed_from_the_top() {
    let rig = Rig::new().await;
    rig.layer("1", "", |_| {}).await;
    rig.layer("2", "1", |_| {}).await;
    rig.layer("3", "2", |_| {}).await;
    for name in ["1", "2"] {
        assert!(refusal(rig.snapshotter.remove(name).await).contains("has children"));
    }
    for name in ["3", "2", "1"] {
        rig.snapshotter.remove(name).await.unwrap();
    }
    assert!(rig.snapshotter.list(&[]).await.unwrap().is_empty());
}

#[tokio::test]
async fn directories_of_a_lower_layer_can_be_renamed_and_owners_changed() {
    let rig = Rig::new().await;
    rig.layer("base", "", |dir| {
        std::fs::create_dir_all(dir.join("a/b")).unwrap();
        std::fs::write(dir.join("a/b/file"), "content").unwrap();
        std::fs::hard_link(dir.join("a/b/file"), dir.join("link")).unwrap();
        std::os::unix::fs::symlink("a/b/file", dir.join("symlink")).unwrap();
        std::os::unix::fs::chown(dir, Some(7), Some(8)).unwrap();
    })
    .await;
    rig.layer("changed", "base", |dir| {
        std::os::unix::fs::chown(dir.join("link"), Some(1), Some(2)).unwrap();
        std::fs::rename(dir.join("symlink"), dir.join("renamed")).unwrap();
        std::fs::remove_file(dir.join("a/b/file")).unwrap();
        std::fs::write(dir.join("a/b/file"), "other").unwrap();
    })
    .await;
    let view = rig.snapshotter.view("look", "changed", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        let root = dir.metadata().unwrap();
        assert_eq!((root.uid(), root.gid()), (7, 8), "the root's owner goes up with the layers");
        let link = dir.join("link").metadata().unwrap();
        assert_eq!((link.uid(), link.gid()), (1, 2));
        assert_eq!(read(dir, "link"), "content");
        assert_eq!(read(dir, "renamed"), "other");
    });
}

#[tokio::test]
async fn a_hundred_and_twenty_six_layers_stack() {
    let rig = Rig::new().await;
    let mut parent = String::new();
    for number in 0..126 {
        let name = format!("layer{number}");
        rig.layer(&name, &parent, |dir| {
            std::fs::write(dir.join(format!("f{number}")), "").unwrap();
            std::fs::write(dir.join("top"), number.to_string()).unwrap();
        })
        .await;
        parent = name;
    }
    let mounts = rig.snapshotter.prepare("container", &parent, none()).await.unwrap();
    rig.with_mounted(&mounts, |dir| {
        assert_eq!(dir.read_dir().unwrap().count(), 127);
        assert_eq!(read(dir, "top"), "125");
        std::fs::write(dir.join("top"), "mine").unwrap();
    });
}

#[tokio::test]
async fn labels_and_filters() {
    let rig = Rig::new().await;
    let snapshotter = &rig.snapshotter;
    let labels = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    snapshotter.prepare("a", "", labels(&[("x", "1"), ("y", "1")])).await.unwrap();
    let before = snapshotter.stat("a").await.unwrap();
    let updated = snapshotter.update("a", labels(&[("x", "2")]), vec!["labels.x".into()]).await.unwrap();
    assert_eq!(updated.labels, labels(&[("x", "2"), ("y", "1")]));
    assert!(updated.updated > before.updated && updated.created == before.created);
    let updated = snapshotter.update("a", labels(&[("z", "3")]), vec!["labels".into()]).await.unwrap();
    assert_eq!(updated.labels, labels(&[("z", "3")]));
    assert!(refusal(snapshotter.update("a", none(), vec!["parent".into()]).await).contains("cannot be"));
    assert!(refusal(snapshotter.update("b", none(), vec![]).await).contains("does not exist"));
    snapshotter.commit("a", "committed", labels(&[("own", "4")])).await.unwrap();
    assert_eq!(snapshotter.stat("committed").await.unwrap().labels, labels(&[("own", "4")]));
    snapshotter.prepare("b", "committed", none()).await.unwrap();
    for (filter, names) in [
        ("kind==committed", vec!["committed"]),
        ("parent==committed", vec!["b"]),
        ("labels.own", vec!["committed"]),
    ] {
        let found = snapshotter.list(&[filter.to_owned()]).await.unwrap();
        assert_eq!(found.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(), names, "{filter}");
    }
}

#[tokio::test]
async fn usage_is_what_a_snapshot_has_itself() {
    let rig = Rig::new().await;
    let mounts = rig.snapshotter.prepare("a", "", none()).await.unwrap();
    let empty = rig.snapshotter.usage("a").await.unwrap();
    rig.with_mounted(&mounts, |dir| std::fs::write(dir.join("f"), vec![1; 1 << 20]).unwrap());
    let filled = rig.snapshotter.usage("a").await.unwrap();
    assert_eq!(filled.inodes, empty.inodes + 1);
    assert!(filled.bytes >= empty.bytes + (1 << 20), "{filled:?}");
    rig.snapshotter.commit("a", "base", none()).await.unwrap();
    assert_eq!(rig.snapshotter.usage("base").await.unwrap(), filled);
    rig.snapshotter.prepare("b", "base", none()).await.unwrap();
    assert_eq!(rig.snapshotter.usage("b").await.unwrap(), empty);
}
