//! Starts of containerd's containers are recorded, though nobody says that one begins.

use crate::images::varied;
use crate::rig::{Rig, ok};

/// Lives long enough to be asked for its arguments.
const SCRIPT: &str = "cat /data/top | cat; sleep 2";

#[test]
fn what_a_container_touches_is_learned_under_its_own_arguments() {
    let rig = Rig::new("[stream]\nfill = false\n[probes]\nenabled = true\n");
    rig.wait("probes are loaded", || rig.log("agent.log").contains("probes are loaded"));
    rig.images.add("app", varied(21), &["sh"]);
    rig.index("app");
    rig.ctr_pull("app");
    assert_eq!(rig.run("sluice", "app", "first", SCRIPT), "the top\n");
    let profiles = || ok(&rig.sluice(&["profile", "list"]));
    rig.wait("the start is learned", || {
        profiles().contains("`sh -c cat /data/top | cat; sleep #`: 1 starts")
    });
    let shown = ok(&rig.sluice(&["profile", "show", &rig.reference("app")]));
    // Read, executed, and mapped by the loader.
    for path in ["  /data/top", "  /bin/sh", "  /bin/cat", "/libc.so.6"] {
        assert!(shown.contains(path), "{path}: {shown}");
    }
    assert!(!shown.contains("  /big"), "{shown}");
    // The pages are in memory now, and the image is in use: the next start is seen all the same.
    assert_eq!(rig.run("sluice", "app", "second", SCRIPT), "the top\n");
    rig.wait("the second start is learned", || profiles().contains("/data/top | cat; sleep #`: 2 starts"));
    // A node that knows nothing takes what is published, though the image's own command is another.
    ok(&rig.sluice(&["profile", "push", "--pack", &rig.reference("app")]));
    ok(&rig.sluice(&["profile", "rm", &rig.reference("app")]));
    rig.ctr(&["images", "rm", "--sync", &rig.reference("app")]);
    rig.wait("the image is forgotten", || rig.status()["images"].as_array().unwrap().is_empty());
    rig.ctr_pull("app");
    assert_eq!(rig.run("sluice", "app", "third", SCRIPT), "the top\n");
    rig.wait("the third start is learned", || profiles().contains("/data/top | cat; sleep #`: 3 starts"));
}
