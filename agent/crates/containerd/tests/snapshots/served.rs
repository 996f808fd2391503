//! Layers that the node serves, alone and mixed with ordinary ones.

use std::path::PathBuf;

use sluice_containerd::{Kind, SnapshotError};

use crate::rig::{Rig, none, served_labels};

/// Makes the node serve `chain` from a directory with one file of that name.
fn serve(rig: &Rig, chain: &str) -> PathBuf {
    let dir = rig.dir.path().join(format!("image-{chain}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(chain), "from the node").unwrap();
    rig.node.chains.lock().unwrap().insert(chain.to_owned(), vec![dir.clone()]);
    dir
}

/// Pulls a layer as containerd does; the name that its metadata store would find by its filter.
async fn pull(rig: &Rig, chain: &str, parent: &str) -> String {
    let prepared = rig.snapshotter.prepare("extract", parent, served_labels("app", chain)).await;
    assert!(matches!(prepared, Err(SnapshotError::Served(_))), "{prepared:?}");
    let filter = format!(r#"labels."containerd.io/snapshot.ref"=={chain},parent=={parent:?}"#);
    let found = rig.snapshotter.list(&[filter]).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].kind, Kind::Committed);
    found[0].name.clone()
}

#[tokio::test]
async fn a_container_stands_on_the_one_directory_of_its_image() {
    let rig = Rig::new().await;
    serve(&rig, "c1");
    let top = serve(&rig, "c2");
    let first = pull(&rig, "c1", "").await;
    let second = pull(&rig, "c2", &first).await;
    assert_eq!(rig.ids_on_disk(), 0, "served layers have no directories");
    let mounts = rig.snapshotter.prepare("container", &second, none()).await.unwrap();
    let lower = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
    assert_eq!(lower, top.display().to_string());
    assert_eq!(rig.node.held.lock().unwrap().len(), 1);
    rig.with_mounted(&mounts, |dir| {
        assert!(dir.join("c2").exists());
        std::fs::write(dir.join("own"), "").unwrap();
    });
    let view = rig.snapshotter.view("view", &second, none()).await.unwrap();
    assert_eq!((view[0].kind, view[0].source.clone()), ("bind", top.display().to_string()));
    for key in ["container", "view"] {
        rig.snapshotter.remove(key).await.unwrap();
    }
    assert!(rig.node.held.lock().unwrap().is_empty(), "removed snapshots give their image back");
    rig.snapshotter.remove(&second).await.unwrap();
    assert!(rig.node.forgotten.lock().unwrap().is_empty(), "a layer of the image is left");
    rig.snapshotter.remove(&first).await.unwrap();
    assert_eq!(*rig.node.forgotten.lock().unwrap(), ["sha256:manifest-of-app"]);
}

#[tokio::test]
async fn pulling_again_finds_the_same_snapshot() {
    let rig = Rig::new().await;
    serve(&rig, "c1");
    let name = pull(&rig, "c1", "").await;
    assert_eq!(pull(&rig, "c1", "").await, name);
}

#[tokio::test]
async fn what_the_node_refuses_is_an_ordinary_snapshot() {
    let rig = Rig::new().await;
    let mounts = rig.snapshotter.prepare("e1", "", served_labels("app", "c1")).await.unwrap();
    assert_eq!(mounts[0].kind, "bind");
    rig.snapshotter.commit("e1", "c1", none()).await.unwrap();
    rig.snapshotter.prepare("e2", "c1", served_labels("app", "c2")).await.unwrap();
    rig.snapshotter.commit("e2", "c2", none()).await.unwrap();
    assert_eq!(*rig.node.offers.lock().unwrap(), 1, "an image is refused once, not layer by layer");
    // A new pull asks anew.
    serve(&rig, "c1");
    let again = rig.snapshotter.prepare("e3", "", served_labels("app", "c1")).await;
    assert!(matches!(again, Err(SnapshotError::Served(_))), "{again:?}");
}

#[tokio::test]
async fn labels_without_an_image_are_an_ordinary_snapshot() {
    let rig = Rig::new().await;
    serve(&rig, "c1");
    let mut labels = served_labels("app", "c1");
    labels.remove(sluice_containerd::labels::MANIFEST);
    rig.snapshotter.prepare("e", "", labels).await.unwrap();
    assert_eq!(*rig.node.offers.lock().unwrap(), 0);
}

#[tokio::test]
async fn ordinary_layers_stand_on_served_ones_and_the_other_way_round() {
    let rig = Rig::new().await;
    let served = serve(&rig, "c1");
    let base = pull(&rig, "c1", "").await;
    rig.layer("ordinary", &base, |dir| {
        assert!(dir.join("c1").exists());
        std::fs::remove_file(dir.join("c1")).unwrap();
        std::fs::write(dir.join("mine"), "").unwrap();
    })
    .await;
    assert!(rig.node.held.lock().unwrap().is_empty(), "a committed layer holds nothing");
    let mounts = rig.snapshotter.prepare("container", "ordinary", none()).await.unwrap();
    rig.with_mounted(&mounts, |dir| {
        assert!(dir.join("mine").exists() && !dir.join("c1").exists());
    });
    assert!(served.join("c1").exists());
    // Served on ordinary: the image's one directory stands for everything below.
    let whole = serve(&rig, "c3");
    let third = pull(&rig, "c3", "ordinary").await;
    let view = rig.snapshotter.view("whole", &third, none()).await.unwrap();
    assert_eq!(view[0].source, whole.display().to_string());
}

#[tokio::test]
async fn usage_of_content_counts_once() {
    let rig = Rig::new().await;
    serve(&rig, "c1");
    rig.layer("other", "", |_| {}).await;
    let first = pull(&rig, "c1", "").await;
    let second = pull(&rig, "c1", "other").await;
    assert_ne!(first, second);
    assert_eq!(rig.snapshotter.usage(&first).await.unwrap().bytes, 4096);
    assert_eq!(rig.snapshotter.usage(&second).await.unwrap().bytes, 0);
}

#[tokio::test]
async fn a_container_whose_image_is_gone_is_refused_with_the_reason() {
    let rig = Rig::new().await;
    serve(&rig, "c1");
    let base = pull(&rig, "c1", "").await;
    rig.node.chains.lock().unwrap().clear();
    let error = rig.snapshotter.prepare("container", &base, none()).await.unwrap_err();
    assert!(error.to_string().contains("registry.example/app:latest"), "{error}");
    assert_eq!(rig.ids_on_disk(), 0);
}
