//! What containerd's own test-suite for snapshotters (`core/snapshots/testsuite`) asks of one, where `ordinary.rs` does not yet.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use crate::rig::{Rig, none, refusal};

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().permissions().mode() & 0o7777
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn parents_are_known_all_the_way_down_and_while_walking() {
    let rig = Rig::new().await;
    rig.layer("1", "", |_| {}).await;
    rig.layer("2", "1", |_| {}).await;
    rig.snapshotter.prepare("active", "2", none()).await.unwrap();
    rig.snapshotter.view("view", "1", none()).await.unwrap();
    for info in rig.snapshotter.list(&[]).await.unwrap() {
        let stat = rig.snapshotter.stat(&info.name).await.unwrap();
        assert_eq!((&stat.name, &stat.parent, stat.kind), (&info.name, &info.parent, info.kind));
    }
    for (name, parent) in [("1", ""), ("2", "1"), ("active", "2"), ("view", "1")] {
        assert_eq!(rig.snapshotter.stat(name).await.unwrap().parent, parent, "{name}");
    }
    // One in the middle goes only when nothing stands on it, committed or active.
    assert!(refusal(rig.snapshotter.remove("2").await).contains("has children"));
    rig.snapshotter.remove("active").await.unwrap();
    rig.snapshotter.remove("2").await.unwrap();
    assert!(refusal(rig.snapshotter.remove("1").await).contains("has children"), "a view stands on it");
}

#[tokio::test]
async fn views_are_read_only_with_parents_and_without() {
    let rig = Rig::new().await;
    rig.layer("1", "", |dir| std::fs::write(dir.join("f"), "one").unwrap()).await;
    rig.layer("2", "1", |dir| std::fs::write(dir.join("g"), "two").unwrap()).await;
    for parent in ["", "1", "2"] {
        let key = format!("view-of-{parent}");
        let mounts = rig.snapshotter.view(&key, parent, none()).await.unwrap();
        rig.with_mounted(&mounts, |dir| {
            let refused = std::fs::write(dir.join("new"), "x").unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{parent}");
        });
        assert!(refusal(rig.snapshotter.commit(&key, "x", none()).await).contains("not active"));
    }
}

#[tokio::test]
async fn what_a_layer_deletes_stays_deleted_and_may_come_again() {
    let rig = Rig::new().await;
    rig.layer("1", "", |dir| {
        std::fs::create_dir_all(dir.join("dir1/sub")).unwrap();
        std::fs::write(dir.join("dir1/old"), "old").unwrap();
        std::fs::create_dir(dir.join("dir2")).unwrap();
        std::fs::write(dir.join("file"), "1").unwrap();
    })
    .await;
    rig.layer("2", "1", |dir| {
        std::fs::remove_dir_all(dir.join("dir1")).unwrap();
        std::fs::remove_file(dir.join("file")).unwrap();
    })
    .await;
    rig.layer("3", "2", |dir| {
        assert_eq!(names(dir), ["dir2"]);
        // Opaque: nothing of the first layer's shows through.
        std::fs::create_dir(dir.join("dir1")).unwrap();
        std::fs::write(dir.join("dir1/new"), "new").unwrap();
        // Another kind of thing in its place.
        std::fs::create_dir(dir.join("file")).unwrap();
        std::fs::remove_dir(dir.join("dir2")).unwrap();
        std::fs::write(dir.join("dir2"), "a file").unwrap();
    })
    .await;
    let view = rig.snapshotter.view("view", "3", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        assert_eq!(names(dir), ["dir1", "dir2", "file"]);
        assert_eq!(names(&dir.join("dir1")), ["new"]);
        assert!(dir.join("dir2").is_file() && dir.join("file").is_dir());
    });
    let view = rig.snapshotter.view("lower", "1", none()).await.unwrap();
    rig.with_mounted(&view, |dir| assert_eq!(names(&dir.join("dir1")), ["old", "sub"]));
}

#[tokio::test]
async fn modes_and_owners_survive_commits_and_changes_of_what_is_in_a_directory() {
    let rig = Rig::new().await;
    let dirs = [("root", 0o700, 0), ("sticky", 0o1777, 0), ("own", 0o711, 1000), ("suid", 0o4755, 1)];
    rig.layer("1", "", |dir| {
        for (name, mode, owner) in dirs {
            let path = dir.join(name);
            std::fs::create_dir(&path).unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(mode(dir), 0o755, "the root of everything is for everybody");
    })
    .await;
    rig.layer("2", "1", |dir| {
        for (name, ..) in dirs {
            std::fs::write(dir.join(name).join("file"), "x").unwrap();
        }
    })
    .await;
    let view = rig.snapshotter.view("view", "2", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        for (name, wanted, owner) in dirs {
            let meta = dir.join(name).metadata().unwrap();
            assert_eq!((mode(&dir.join(name)), meta.uid(), meta.gid()), (wanted, owner, owner), "{name}");
        }
    });
}

#[tokio::test]
async fn hard_links_are_copied_up_whole_and_lower_ones_stay() {
    let rig = Rig::new().await;
    rig.layer("1", "", |dir| {
        std::fs::write(dir.join("a"), "content").unwrap();
        std::fs::hard_link(dir.join("a"), dir.join("b")).unwrap();
        symlink("a", dir.join("s")).unwrap();
    })
    .await;
    rig.layer("2", "1", |dir| {
        // Unmodified but for a new name: the content goes with it.
        std::fs::hard_link(dir.join("a"), dir.join("c")).unwrap();
        chown(dir.join("c"), Some(5), Some(6)).unwrap();
        std::os::unix::fs::lchown(dir.join("s"), Some(7), Some(7)).unwrap();
        std::fs::rename(dir.join("b"), dir.join("moved")).unwrap();
    })
    .await;
    rig.layer("3", "2", |dir| std::fs::write(dir.join("c"), "changed").unwrap()).await;
    let view = rig.snapshotter.view("view", "3", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        assert_eq!(names(dir), ["a", "c", "moved", "s"]);
        let text = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!((text("c"), text("moved")), ("changed".to_owned(), "content".to_owned()));
        let owner =
            |name: &str| dir.join(name).symlink_metadata().map(|meta| (meta.uid(), meta.gid())).unwrap();
        assert_eq!((owner("c"), owner("s")), ((5, 6), (7, 7)));
    });
    let view = rig.snapshotter.view("lower", "1", none()).await.unwrap();
    rig.with_mounted(&view, |dir| {
        let (a, b) = (dir.join("a").metadata().unwrap(), dir.join("b").metadata().unwrap());
        assert_eq!((a.ino(), a.nlink(), a.uid()), (b.ino(), 2, 0), "the lower layer is as it was");
    });
}
