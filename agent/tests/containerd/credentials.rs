//! A registry that demands logins: credentials of pulls, of plugins and of secrets, and what a tenant is not handed.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::images::varied;
use crate::rig::{Rig, ok};
use crate::runtime_client::Kubelet;

/// Sums of both files of an image that nothing reads at its start.
const READ_ALL: &str = "sha256sum < /big; sha256sum < /data/kept";

#[test]
fn credentials_of_a_pull_serve_lazy_reads_when_tokens_are_old_and_agents_new() {
    let mut rig = Rig::new("[stream]\nfill = false\n[credentials]\ncri_proxy = true\n");
    rig.images.add("app", varied(60), &["sh"]);
    rig.index("app");
    let (pod, container) = {
        let mut kubelet = Kubelet::with_images_at(&rig, "state/cri.sock");
        kubelet.pull("pause");
        let logins = [("alice", "alices-word", "app"), ("bob", "bobs-word", "other")];
        rig.demand(&logins, Some(Duration::from_secs(6)));
        for login in [None, Some(("alice", "wrong")), Some(("bob", "bobs-word"))] {
            kubelet.try_pull("app", login).expect_err("pulled without the right login");
        }
        kubelet.try_pull("app", Some(("alice", "alices-word"))).unwrap();
        let (reasons, text) = rig.events("app");
        assert!(reasons.ends_with(&["ImageStreaming".to_owned()]), "{text}");
        // On the node it is now, but not for everybody.
        for login in [None, Some(("bob", "bobs-word"))] {
            kubelet.try_pull("app", login).expect_err("handed to somebody else");
        }
        let pod = kubelet.pod("private");
        let container = kubelet.container(&pod, "app", &["sleep", "infinity"]);
        (pod, container)
    };
    let kept = rig.path("state/credentials.json");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&kept).unwrap();
    assert!(text.contains("alices-word") && !text.contains("wrong") && !text.contains("bobs"), "{text}");
    // Longer than any token lives; the next agent has none of its own either.
    std::thread::sleep(Duration::from_secs(7));
    rig.end_agent(Signal::SIGKILL);
    rig.start_agent();
    let mut kubelet = Kubelet::with_images_at(&rig, "state/cri.sock");
    let read = kubelet.exec(&container, READ_ALL);
    rig.registry.set_access(None);
    rig.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &rig.reference("app")]);
    assert_eq!(read, rig.run("overlayfs", "app", "o", READ_ALL));
    kubelet.remove(pod);
    let log = std::fs::read_to_string(rig.path("agent.log")).unwrap();
    assert!(!log.contains("-word"), "a password in the log");
}

#[test]
fn a_manifest_does_not_open_layers_that_its_repository_has_not() {
    let rig = Rig::new("");
    rig.images.add("app", varied(61), &["sh"]);
    rig.images.add("thief", varied(61), &["sh"]);
    // It names the layers, and does not have them.
    let layers = |dir: std::path::PathBuf| -> Vec<std::path::PathBuf> {
        let blobs = std::fs::read_dir(dir.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
        blobs.filter(|path| std::fs::read(path).unwrap().starts_with(&[0x1f, 0x8b])).collect()
    };
    let stolen = layers(rig.path("layouts/thief"));
    assert_eq!(stolen.len(), 3);
    stolen.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    assert!(rig.ctr_pull("app").contains("3 streamed"));
    rig.wait_until_local("app");
    // Another namespace of containerd, whose own store of snapshots has none of them.
    let pull = |name: &str| rig.sluice(&["ctr-pull", "--namespace", "second", &rig.reference(name)]);
    let refused = pull("thief");
    assert!(!refused.status.success(), "handed over");
    let (reasons, text) = rig.events("thief");
    assert_eq!(reasons, ["StreamingFellBack"], "{text}");
    assert!(text.contains("does not give layer"), "{text}");
    assert!(ok(&pull("app")).contains("3 streamed"), "who has them gets them without a download");
}

#[test]
fn plugins_of_kubelet_and_pull_secrets_give_credentials() {
    let mut rig = Rig::new("[stream]\nfill = false\n");
    for (name, seed) in [("app", 62), ("second", 63)] {
        rig.images.add(name, varied(seed), &["sh"]);
        rig.index(name);
    }
    let logins = [("robot", "robots-word", "app"), ("team", "teams-word", "second")];
    rig.demand(&logins, None);
    let refused = rig.sluice(&["ctr-pull", &rig.reference("app")]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("401"), "{refused:?}");

    let host = rig.registry.address();
    let program = rig.path("provider");
    let answer = format!(
        r#"{{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"Image","auth":{{"{host}/app":{{"username":"robot","password":"robots-word"}}}}}}"#
    );
    let script = format!("#!/bin/sh\ncat >> {0}/asked\necho '{answer}'\n", rig.dir.path().display());
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let providers = format!(
        "providers:\n  - name: provider\n    matchImages: [\"{host}/app\"]\n    defaultCacheDuration: 12h\n    apiVersion: credentialprovider.kubelet.k8s.io/v1\n"
    );
    std::fs::write(rig.path("providers.yaml"), providers).unwrap();
    std::fs::create_dir(rig.path("secrets")).unwrap();
    let secret = format!(r#"{{"auths":{{"{host}/second":{{"username":"team","password":"teams-word"}}}}}}"#);
    std::fs::write(rig.path("secrets/team"), secret).unwrap();
    let config = std::fs::read_to_string(rig.path("config.toml")).unwrap();
    let credentials = format!(
        "[credentials]\nprovider_config = {:?}\nprovider_bin_dir = {:?}\npull_secrets = {:?}\n",
        rig.path("providers.yaml"),
        rig.dir.path(),
        rig.path("secrets")
    );
    std::fs::write(rig.path("config.toml"), config + &credentials).unwrap();
    rig.end_agent(Signal::SIGTERM);
    rig.start_agent();
    for name in ["app", "second"] {
        assert!(rig.ctr_pull(name).contains("3 streamed"), "{}", rig.log("agent.log"));
        assert_eq!(rig.run("sluice", name, "r", "cat /data/top"), "the top\n");
    }
    let asked = std::fs::read_to_string(rig.path("asked")).unwrap();
    let request = format!(
        r#"{{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"{host}/app","kind":"CredentialProviderRequest"}}"#
    );
    assert_eq!(asked, request.repeat(2), "once by the agent and once by the pull, and for no other image");
}
