//! What is there after a restart: everything that was committed to the database, and nothing else.

use sluice_containerd::SnapshotError;

use crate::rig::{Rig, none, served_labels};

#[tokio::test]
async fn snapshots_survive_and_their_images_are_acquired_again() {
    let rig = Rig::new().await;
    let image = rig.dir.path().join("image");
    std::fs::create_dir(&image).unwrap();
    rig.node.chains.lock().unwrap().insert("c1".to_owned(), vec![image]);
    let served = rig.snapshotter.prepare("e", "", served_labels("app", "c1")).await;
    assert!(matches!(served, Err(SnapshotError::Served(_))));
    let base = rig.snapshotter.list(&[]).await.unwrap()[0].name.clone();
    let mounts = rig.snapshotter.prepare("container", &base, none()).await.unwrap();
    rig.layer("ordinary", "", |dir| std::fs::write(dir.join("f"), "").unwrap()).await;
    let before = rig.snapshotter.list(&[]).await.unwrap();
    // Of a crash between the directory and the record.
    std::fs::create_dir_all(rig.dir.path().join("s/snapshots/999/fs")).unwrap();
    let held = std::mem::take(&mut *rig.node.held.lock().unwrap());

    let rig = rig.restarted().await;
    assert_eq!(rig.snapshotter.list(&[]).await.unwrap(), before);
    assert!(!rig.dir.path().join("s/snapshots/999").exists());
    rig.snapshotter.restore().await.unwrap();
    assert_eq!(*rig.node.held.lock().unwrap(), held);
    assert_eq!(rig.snapshotter.mounts("container").await.unwrap(), mounts);
    // Ids go on where they were.
    rig.snapshotter.prepare("new", "ordinary", none()).await.unwrap();
    assert_eq!(rig.ids_on_disk(), 3);
}

#[tokio::test]
async fn an_image_that_is_away_does_not_keep_the_snapshotter_from_starting() {
    let rig = Rig::new().await;
    rig.node.chains.lock().unwrap().insert("c1".to_owned(), vec![rig.dir.path().to_path_buf()]);
    let served = rig.snapshotter.prepare("e", "", served_labels("app", "c1")).await;
    assert!(matches!(served, Err(SnapshotError::Served(_))));
    let base = rig.snapshotter.list(&[]).await.unwrap()[0].name.clone();
    rig.snapshotter.prepare("container", &base, none()).await.unwrap();
    rig.node.chains.lock().unwrap().clear();
    let rig = rig.restarted().await;
    rig.snapshotter.restore().await.unwrap();
    assert!(rig.snapshotter.mounts("container").await.is_err());
    rig.snapshotter.remove("container").await.unwrap();
}
