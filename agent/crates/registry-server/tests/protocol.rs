//! The distribution protocol as other programs speak it, and what it leaves on the disk.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::Method;
use reqwest::header::{CONTENT_RANGE, LINK, LOCATION, RANGE};
use serde_json::Value;
use sluice_registry_server::Link;
use support::{digest, image, manifest, noise, registry, run};

/// Digests of an image's manifest and layers, as skopeo sees them.
fn inspected(reference: &str) -> (String, Vec<String>) {
    let text = run("skopeo", &["inspect", "--tls-verify=false", reference]);
    let seen: Value = serde_json::from_str(&text).expect("JSON");
    let layers = seen["Layers"].as_array().expect("layers").iter();
    let layers = layers.map(|layer| layer.as_str().expect("a digest").to_owned()).collect();
    (seen["Digest"].as_str().unwrap_or("").to_owned(), layers)
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_copies_to_and_from_it() {
    let work = tempfile::tempdir().expect("a directory");
    let registry = registry(Link::default()).await;
    let source = format!("oci:{}:a", image(work.path()).display());
    let (_, layers) = inspected(&source);
    for (name, format) in [("team/oci", "oci"), ("team/docker", "v2s2")] {
        let remote = format!("docker://{}/{name}:1", registry.server.address());
        let copy = ["copy", "--insecure-policy", "--preserve-digests", "--src-tls-verify=false"];
        let push = ["copy", "--insecure-policy", "--dest-tls-verify=false", "--format", format];
        run("skopeo", &[&push[..], &[&source, &remote]].concat());
        let (pushed, remote_layers) = inspected(&remote);
        assert_eq!(remote_layers, layers, "{format}");
        let back = work.path().join(format);
        run("skopeo", &[&copy[..], &[&remote, &format!("dir:{}", back.display())]].concat());
        assert_eq!(digest(&fs::read(back.join("manifest.json")).expect("a manifest")), pushed);
        for layer in &layers {
            let bytes = fs::read(back.join(layer.trim_start_matches("sha256:"))).expect("a layer");
            assert_eq!(digest(&bytes), *layer);
        }
    }
    run(
        "skopeo",
        &["delete", "--tls-verify=false", &format!("docker://{}/team/oci:1", registry.server.address())],
    );
    assert_eq!(registry.get("/v2/team/oci/manifests/1").await.status(), 404);
    assert_eq!(registry.get("/v2/team/docker/manifests/1").await.status(), 200);
}

#[tokio::test]
async fn ranges_are_answered_exactly() {
    let registry = registry(Link::default()).await;
    let bytes = noise(300_000);
    let path = registry.push_blob(&bytes).await;
    let table = [
        ("bytes=0-0", 206, 0..1),
        ("bytes=100-199999", 206, 100..200_000),
        ("bytes=299999-400000", 206, 299_999..300_000),
        ("bytes=-5", 206, 299_995..300_000),
        ("bytes=7-", 206, 7..300_000),
        ("bytes=0-1,4-5", 200, 0..300_000),
        ("bytes=300000-", 416, 0..0),
    ];
    for (range, status, wanted) in table {
        let asked = registry.http.get(registry.url(&path)).header(RANGE, range).send().await;
        let answer = asked.expect("an answer");
        assert_eq!(answer.status(), status, "{range}");
        let stated =
            answer.headers().get(CONTENT_RANGE).map(|value| value.to_str().expect("text").to_owned());
        match status {
            206 => {
                assert_eq!(stated, Some(format!("bytes {}-{}/300000", wanted.start, wanted.end - 1)));
            }
            416 => {
                assert_eq!(stated.as_deref(), Some("bytes */300000"));
                continue;
            }
            _ => assert_eq!(stated, None),
        }
        assert!(answer.bytes().await.expect("a body") == bytes[wanted], "{range}");
    }
}

#[tokio::test]
async fn tags_come_in_pages() {
    let registry = registry(Link::default()).await;
    for tag in ["v3", "v1", "v5", "v2", "v4"] {
        registry.push_manifest(tag, &manifest(tag, None)).await.expect("pushed");
    }
    let (mut path, mut pages) = ("/v2/a/b/tags/list?n=2".to_owned(), Vec::new());
    loop {
        let answer = registry.get(&path).await;
        let link = answer.headers().get(LINK).map(|value| value.to_str().expect("text").to_owned());
        let page: Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
        pages.push(page["tags"].to_string());
        let Some(link) = link else { break };
        path = link.trim_start_matches('<').replace(">; rel=\"next\"", "");
    }
    assert_eq!(pages, [r#"["v1","v2"]"#, r#"["v3","v4"]"#, r#"["v5"]"#]);
    assert_eq!(registry.get("/v2/a/b/tags/list?n=x").await.status(), 400);
    assert_eq!(registry.get("/v2/no/such/tags/list").await.status(), 404);
}

#[tokio::test]
async fn a_manifest_deleted_by_digest_is_gone_and_a_deleted_tag_is_only_a_name() {
    let registry = registry(Link::default()).await;
    let subject = registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    registry.push_manifest("two", &manifest("one", None)).await.expect("pushed");
    let referrer = registry.push_manifest("sig", &manifest("sig", Some(&subject))).await.expect("pushed");
    let inner = registry.push_manifest(&digest(manifest("in", None).as_bytes()), &manifest("in", None)).await;
    let inner = inner.expect("pushed");

    let by = |name: &str| format!("/v2/a/b/manifests/{name}");
    assert_eq!(registry.ask(Method::DELETE, &by("one")).await.status(), 202);
    assert_eq!(registry.get(&by("one")).await.status(), 404);
    assert_eq!(registry.get(&by("two")).await.status(), 200);
    assert_eq!(registry.ask(Method::DELETE, &by("one")).await.status(), 404);

    // A referrer without its tag is still one.
    assert_eq!(registry.ask(Method::DELETE, &by("sig")).await.status(), 202);
    let list = registry.get(&format!("/v2/a/b/referrers/{subject}")).await.bytes().await.expect("a body");
    assert!(String::from_utf8_lossy(&list).contains(&referrer));

    for digest in [&subject, &inner] {
        assert_eq!(registry.get(&by(digest)).await.status(), 200);
        assert_eq!(registry.ask(Method::DELETE, &by(digest)).await.status(), 202);
        assert_eq!(registry.get(&by(digest)).await.status(), 404);
    }
    assert_eq!(registry.get(&by("two")).await.status(), 404);
    assert_eq!(registry.ask(Method::DELETE, &by(&subject)).await.status(), 404);
}

#[tokio::test]
async fn a_damaged_index_is_an_error_and_stays_as_it_is() {
    let registry = registry(Link::default()).await;
    let digest = registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    let index = registry.dir.path().join("a/b/index.json");
    for damage in ["{\"manifests\": [", "[]", "{\"schemaVersion\":2}"] {
        fs::write(&index, damage).expect("written");
        let paths = ["manifests/one".to_owned(), "tags/list".to_owned(), format!("referrers/{digest}")];
        for path in paths {
            let answer = registry.get(&format!("/v2/a/b/{path}")).await;
            assert_eq!(answer.status(), 500, "{damage} {path}");
            let text = answer.text().await.expect("a body");
            assert!(text.contains("index.json of a/b is damaged"), "{text}");
        }
        assert_eq!(registry.push_manifest("two", &manifest("two", None)).await, Err(500));
        assert_eq!(registry.ask(Method::DELETE, "/v2/a/b/manifests/one").await.status(), 500);
        assert_eq!(fs::read_to_string(&index).expect("read"), damage);
    }
}

#[tokio::test]
async fn what_it_does_not_know_of_an_index_is_kept() {
    let registry = registry(Link::default()).await;
    registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    let index = registry.dir.path().join("a/b/index.json");
    let mut document: Value = serde_json::from_slice(&fs::read(&index).expect("read")).expect("JSON");
    document["annotations"] = serde_json::json!({ "kept": "yes" });
    fs::write(&index, document.to_string()).expect("written");
    registry.push_manifest("two", &manifest("two", None)).await.expect("pushed");
    let after: Value = serde_json::from_slice(&fs::read(&index).expect("read")).expect("JSON");
    assert_eq!(after["annotations"]["kept"], "yes");
    assert_eq!(after["manifests"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn files_are_readable_and_no_other_is_left() {
    let registry = registry(Link::default()).await;
    registry.push_blob(&noise(1000)).await;
    registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    assert_eq!(registry.push_manifest("bad", "no JSON").await, Err(400));
    let mut files = Vec::new();
    walk(registry.dir.path(), &mut files);
    assert_eq!(files.len(), 4, "two blobs, the index, the marker: {files:?}");
    for file in files {
        let mode = fs::metadata(&file).expect("metadata").permissions().mode() & 0o7777;
        assert_eq!(mode, 0o644, "{file}");
    }
}

fn walk(dir: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { walk(&path, files) } else { files.push(path.display().to_string()) }
    }
}

fn sessions(dir: &Path) -> usize {
    let names = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").file_name());
    names.filter(|name| name.to_string_lossy().starts_with(".upload-")).count()
}

#[tokio::test]
async fn uploads_in_pieces_and_what_is_given_up() {
    let registry = registry(Link::default()).await;
    let begin = || async {
        let answer = registry.ask(Method::POST, "/v2/a/b/blobs/uploads/").await;
        assert_eq!(answer.status(), 202);
        registry.url(answer.headers()[LOCATION].to_str().expect("text"))
    };
    let bytes = noise(200_000);
    let session = begin().await;
    for (piece, from) in [(&bytes[..150_000], 0), (&bytes[150_000..], 150_000)] {
        let range = format!("{from}-{}", from + piece.len() - 1);
        let patch = registry.http.patch(&session).header(CONTENT_RANGE, range).body(piece.to_vec());
        assert_eq!(patch.send().await.expect("an answer").status(), 202);
    }
    let again = registry.http.patch(&session).header(CONTENT_RANGE, "0-9").body("0123456789");
    assert_eq!(again.send().await.expect("an answer").status(), 416);
    let status = registry.http.get(&session).send().await.expect("an answer");
    assert_eq!(
        (status.status().as_u16(), status.headers()["range"].to_str().expect("text")),
        (204, "0-199999")
    );
    let wrong = format!("{session}?digest={}", digest(b"else"));
    let put = format!("{session}?digest={}", digest(&bytes));
    assert_eq!(registry.http.put(put).send().await.expect("an answer").status(), 201);
    assert_eq!(sessions(registry.dir.path()), 0);
    assert_eq!(registry.http.put(wrong).send().await.expect("an answer").status(), 404);

    let (wrong, left) = (begin().await, begin().await);
    let wrong = format!("{wrong}?digest={}", digest(b"else"));
    assert_eq!(registry.http.put(wrong).body("bytes").send().await.expect("an answer").status(), 400);
    assert_eq!(sessions(registry.dir.path()), 1);
    assert_eq!(registry.http.delete(&left).send().await.expect("an answer").status(), 204);
    assert_eq!(sessions(registry.dir.path()), 0);

    // One that was forgotten goes when the next begins, or when the server starts.
    let forgotten = begin().await;
    let name = forgotten.rsplit('/').next().expect("a name");
    let file = fs::File::options().append(true).open(registry.dir.path().join(name)).expect("the session");
    file.set_modified(SystemTime::now() - Duration::from_secs(7200)).expect("a time");
    begin().await;
    assert_eq!(sessions(registry.dir.path()), 1);
    assert_eq!(registry.http.get(&forgotten).send().await.expect("an answer").status(), 404);
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_no_bytes() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let registry = registry(Link::default()).await;
    let answer = registry.ask(Method::POST, "/v2/a/b/blobs/uploads/").await;
    let path = answer.headers()[LOCATION].to_str().expect("text").to_owned();
    let mut socket = tokio::net::TcpStream::connect(registry.server.address()).await.expect("a connection");
    let head = format!("PATCH {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nonly this");
    socket.write_all(head.as_bytes()).await.expect("sent");
    socket.shutdown().await.expect("closed");
    // The server closes when it has seen the end.
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).await.expect("closed");
    let status = registry.get(&path).await;
    assert_eq!(status.headers()["range"].to_str().expect("text"), "0-0");
    let file = registry.dir.path().join(path.rsplit('/').next().expect("a name"));
    assert_eq!(fs::metadata(file).expect("the session").len(), 0);
}
