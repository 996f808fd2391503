//! What a kubelet does, over the real CRI API: pull, pod, exec, restarts, removal.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::images::{Layer, varied};
use crate::rig::Rig;
use crate::runtime_client::Kubelet;

#[test]
fn an_image_that_a_kubelet_pulls_is_streamed() {
    let rig = Rig::new("[stream]\nfill = false\n");
    let bytes = rig.images.add("app", varied(40), &["sh"]);
    rig.index("app");
    let mut kubelet = Kubelet::new(&rig);
    let before = rig.registry.stats().bytes_sent;
    kubelet.pull("app");
    let (reasons, text) = rig.events("app");
    assert_eq!(reasons, ["Pulling", "Pulled", "ImageStreaming"], "{text}");
    let fetched = rig.registry.stats().bytes_sent - before;
    assert!(fetched < bytes / 4, "{fetched} of {bytes} bytes for a pull");
    assert!(kubelet.has_image("app"));

    let pod = kubelet.pod("streamed");
    let container = kubelet.container(&pod, "app", &["sleep", "infinity"]);
    assert_eq!(kubelet.exec(&container, "cat /data/top; echo x > /own; cat /own"), "the top\nx\n");
    assert_eq!(
        kubelet.exec(&container, "sha256sum < /data/linked"),
        kubelet.exec(&container, "sha256sum < /data/kept")
    );
    kubelet.remove(pod);
    kubelet.remove_image("app");
    assert!(!kubelet.has_image("app"));
    rig.wait("the image is forgotten", || {
        let status = rig.status();
        let images = status["images"].as_array().unwrap();
        images.iter().all(|image| image["reference"] != rig.reference("app").as_str())
    });
}

#[test]
fn pods_outlive_containerd_and_the_agent() {
    let mut rig = Rig::new("");
    rig.images.add("app", varied(41), &["sh"]);
    rig.index("app");
    let (pod, container) = {
        let mut kubelet = Kubelet::new(&rig);
        kubelet.pull("app");
        let pod = kubelet.pod("long");
        let container = kubelet.container(&pod, "app", &["sleep", "infinity"]);
        (pod, container)
    };
    rig.wait_until_local("app");
    rig.end_agent(Signal::SIGKILL);
    rig.end_containerd();
    rig.start_agent();
    rig.start_containerd();
    let mut kubelet = Kubelet::new(&rig);
    assert!(kubelet.is_running(&container));
    assert_eq!(kubelet.exec(&container, "cat /data/top"), "the top\n");
    let second = kubelet.container(&pod, "app", &["sleep", "infinity"]);
    assert_eq!(kubelet.exec(&second, "cat /data/top"), "the top\n");
    kubelet.remove(pod);
    kubelet.remove_image("app");
}

#[test]
fn the_image_file_system_counts_what_is_on_the_node() {
    let rig = Rig::new("");
    let mut kubelet = Kubelet::new(&rig);
    rig.images.add("app", varied(42), &["sh"]);
    let mut shares: Vec<_> = varied(42).into_iter().take(2).collect();
    shares.push(Layer::new().text("own", "own\n"));
    rig.images.add("shares", shares, &["sh"]);
    rig.images.add("pads", vec![Layer::new().text("below", "b"), varied(42).remove(0)], &["sh"]);
    let (before, mount_point) = kubelet.image_fs();
    assert!(mount_point.starts_with(rig.dir.path().to_str().unwrap()), "{mount_point}");
    kubelet.pull("app");
    // containerd measures every ten seconds.
    rig.wait("the image is counted", || kubelet.image_fs().0 > before + (8 << 20));
    // What images share is there once, also where it does not stand on the same layers.
    kubelet.pull("shares");
    kubelet.pull("pads");
    for name in ["app", "shares", "pads"] {
        rig.wait_until_local(name);
    }
    let layers = rig.path("root/layers");
    assert_eq!(std::fs::read_dir(&layers).unwrap().count(), 5);
    let mut counted = 0;
    rig.wait("exactly what the layers take is counted", || {
        counted = kubelet.image_fs().0 - before;
        // The directory itself is nobody's.
        counted + allocated(&layers, false) == allocated(&layers, true)
    });
}

/// Bytes that a directory has on the disk, with all that is in it or alone.
fn allocated(path: &Path, whole: bool) -> u64 {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let inside = (whole && meta.is_dir()).then(|| std::fs::read_dir(path).unwrap().flatten());
    let inside = inside.into_iter().flatten().map(|entry| allocated(&entry.path(), true)).sum::<u64>();
    meta.blocks() * 512 + inside
}
