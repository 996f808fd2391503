//! Images of container runnables: streamed or not, refused, strange ones, and the reference's own example.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sluice_registry_server::{Access, Account, Faults, Link, Server, ServerConfig};

use crate::jobs::{Jobs, failure, job, state};
use crate::rig::{LARGE, sha256, wait_until};

/// The reference's example of image streaming (batch-samples, `image_streaming_simple_job.json`), but for the image.
fn example(image: &str) -> Value {
    json!({
        "taskGroups": [{
            "taskCount": "1",
            "taskCountPerNode": "1",
            "taskSpec": {
                "runnables": [{
                    "container": {
                        "imageUri": image,
                        "commands": ["10m"],
                        "entrypoint": "sleep",
                        "enableImageStreaming": true
                    }
                }]
            }
        }],
        "allocationPolicy": { "instances": [{ "policy": { "machineType": "e2-standard-4" } }] },
        "logsPolicy": { "destination": "CLOUD_LOGGING" }
    })
}

fn container(image: &str, streaming: bool, command: &str) -> Value {
    json!([{ "container": {
        "imageUri": image, "commands": ["sh", "-c", command], "enableImageStreaming": streaming,
    } }])
}

#[test]
fn the_references_example_runs() {
    let jobs = Jobs::new();
    let document = jobs.document(&example(&jobs.node.image()));
    let said = jobs.node.ok(&["batch", "validate", &document]);
    assert_eq!(said, "valid: 1 tasks, 1 at once\n");
    let submitted = jobs.node.run(&["batch", "submit", &document, "--job-id", "example"]);
    assert!(
        String::from_utf8_lossy(&submitted.stderr).contains("allocationPolicy: not applied"),
        "{submitted:?}"
    );
    wait_until("it sleeps", || {
        let asleep =
            |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default() == b"sleep\x0010m\0";
        jobs.processes("example", 0).iter().any(asleep)
    });
    assert_eq!(state(&jobs.describe("example")), "RUNNING");
    jobs.node.ok(&["batch", "cancel", "example"]);
    let ended = jobs.over("example");
    assert_eq!(ended["tasks"][0]["status"]["images"][0]["served"], "streamed", "{ended:#}");
}

#[test]
fn each_task_says_how_its_image_came() {
    let jobs = Jobs::new();
    let image = jobs.node.image();
    let ended = jobs.run("streamed", &job(&container(&image, true, "cat /data/changed"), 1, 1));
    assert_eq!(state(&ended), "SUCCEEDED", "{ended:#}");
    let report = &ended["tasks"][0]["status"]["images"][0];
    assert_eq!(report["served"], "streamed");
    let (bytes, total) = (report["bytes"].as_u64().unwrap(), report["bytesTotal"].as_u64().unwrap());
    assert!(bytes > 0 && bytes < LARGE as u64 && total > LARGE as u64, "{report}");
    let said = jobs.node.ok(&["batch", "describe", "streamed"]);
    assert!(said.contains("READY") && said.contains("streamed") && said.contains("MiB"), "{said}");
    jobs.node.become_another();
    let ended = jobs.run("pulled", &job(&container(&image, false, "cat /data/changed"), 1, 1));
    let report = &ended["tasks"][0]["status"]["images"][0];
    assert_eq!(
        (&report["served"], &report["bytes"]),
        (&json!("unpacked"), &report["bytesTotal"]),
        "{ended:#}"
    );
    assert!(report["readyMs"].as_u64().unwrap() > 0);
}

#[test]
fn schema_1_is_refused_with_the_reason() {
    let jobs = Jobs::new();
    let layout = jobs.node.path("images/old");
    let manifest = json!({ "schemaVersion": 1, "name": "old", "tag": "latest", "architecture": "amd64", "fsLayers": [], "history": [], "signatures": [] });
    write_image(&layout, "application/vnd.docker.distribution.manifest.v1+prettyjws", &manifest);
    let image = format!("{}/old:latest", jobs.node.address);
    for streaming in [true, false] {
        let id = format!("old-{streaming}");
        let ended = jobs.run(&id, &job(&container(&image, streaming, "true"), 1, 1));
        assert_eq!(state(&ended), "FAILED");
        assert!(failure(&ended, 0).contains("manifest of schema 1"), "{ended:#}");
    }
}

#[test]
fn empty_and_duplicate_layers_work() {
    let jobs = Jobs::new();
    let layout = jobs.node.path("images/image");
    let read = |digest: &Value| {
        let hex = digest.as_str().unwrap().trim_start_matches("sha256:").to_owned();
        serde_json::from_slice::<Value>(&fs::read(layout.join("blobs/sha256").join(hex)).unwrap()).unwrap()
    };
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let mut manifest = read(&index["manifests"][0]["digest"]);
    let mut config = read(&manifest["config"]["digest"]);
    // What is there are a base, a change and an empty layer: the base once more, the change again, and nothing twice.
    for number in [0, 1, 2, 2] {
        let (layer, diff) =
            (manifest["layers"][number].clone(), config["rootfs"]["diff_ids"][number].clone());
        manifest["layers"].as_array_mut().unwrap().push(layer);
        config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(diff);
    }
    let config = config.to_string();
    manifest["config"]["digest"] = json!(put(&layout, config.as_bytes()));
    manifest["config"]["size"] = json!(config.len());
    let doubled = jobs.node.path("images/doubled");
    fs::create_dir_all(&doubled).unwrap();
    fs::rename(layout.join("blobs"), doubled.join("blobs")).unwrap();
    write_image(&doubled, "application/vnd.oci.image.manifest.v1+json", &manifest);
    let image = format!("{}/doubled:latest", jobs.node.address);
    jobs.node.ok(&["index", &image]);
    for streaming in [true, false] {
        let id = format!("doubled-{streaming}");
        jobs.node.become_another();
        let ended = jobs.run(
            &id,
            &job(&container(&image, streaming, "cat /data/changed; ls /data/gone 2>/dev/null | wc -l"), 1, 1),
        );
        assert_eq!(jobs.lines(&id, 0), ["after0"], "{ended:#}");
        let served = if streaming { "streamed" } else { "unpacked" };
        assert_eq!(ended["tasks"][0]["status"]["images"][0]["served"], served, "{ended:#}");
    }
}

#[test]
fn the_references_rule_about_streamed_containers() {
    let jobs = Jobs::new();
    let mut runnables =
        container(&jobs.node.image(), true, "cat /proc/net/dev | grep -vc -e lo: -e '|'; echo $ADDED");
    runnables[0]["container"]["options"] = json!("--network none --env ADDED=yes");
    let document = jobs.document(&job(&runnables, 1, 1));
    let said = jobs.node.complaint(&["batch", "submit", &document, "--job-id", "strict"]);
    assert!(said.contains("taskGroups[0].taskSpec.runnables[0].container.options: "), "{said}");
    assert!(said.contains("only supports imageUri, commands, entrypoint and volumes"), "{said}");
    jobs.node.ok(&["batch", "submit", &document, "--job-id", "relaxed", "--relaxed", "--wait"]);
    assert_eq!(jobs.lines("relaxed", 0), ["0", "yes"]);
}

#[test]
fn a_private_registrys_login_stands_in_the_document() {
    let jobs = Jobs::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let private = runtime.block_on(Server::start(ServerConfig {
        root: jobs.node.path("images"),
        listen: "127.0.0.1:0".parse().unwrap(),
        link: Link::default(),
        faults: Faults::default(),
        referrers_api: true,
    }));
    let private = private.unwrap();
    let account =
        Account { name: "team".into(), password: "right".into(), repositories: vec!["image".into()] };
    private.set_access(Some(Access { accounts: vec![account], token_life: Some(Duration::from_secs(60)) }));
    jobs.node.become_another();
    let kept = jobs.node.path("docker/config.json");
    let config = fs::read_to_string(jobs.node.path("config.toml")).unwrap();
    fs::write(jobs.node.path("config.toml"), format!("{config}\n[registry]\ndocker_config = {kept:?}\n"))
        .unwrap();
    for (password, ends) in [("wrong", "FAILED"), ("right", "SUCCEEDED")] {
        let mut runnables =
            container(&format!("{}/image:latest", private.address()), true, "cat /data/changed");
        runnables[0]["container"]["username"] = json!("team");
        runnables[0]["container"]["password"] = json!(password);
        let document = jobs.document(&job(&runnables, 1, 1));
        let arguments = ["batch", "submit", &document, "--job-id", password, "--relaxed", "--wait"];
        assert_eq!(jobs.node.run(&arguments).status.success(), ends == "SUCCEEDED");
        let ended = jobs.describe(password);
        assert_eq!(state(&ended), ends, "{ended:#}");
        if password == "wrong" {
            assert!(failure(&ended, 0).contains("401"), "{ended:#}");
        } else {
            assert_eq!(jobs.lines(password, 0), ["after"]);
            assert_eq!(ended["tasks"][0]["status"]["images"][0]["served"], "streamed", "{ended:#}");
        }
        assert!(!ended.to_string().contains(&format!("\"{password}\"")), "a password is shown: {ended:#}");
    }
}

/// Writes a blob of a layout; its digest.
fn put(layout: &Path, bytes: &[u8]) -> String {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let digest = sha256(bytes);
    fs::write(blobs.join(&digest), bytes).unwrap();
    format!("sha256:{digest}")
}

/// Makes `manifest` the image of a layout.
fn write_image(layout: &Path, media_type: &str, manifest: &Value) {
    let text = manifest.to_string();
    let digest = put(layout, text.as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": media_type, "digest": digest, "size": text.len(),
        "annotations": { "org.opencontainers.image.ref.name": "latest" },
    }] });
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
}
