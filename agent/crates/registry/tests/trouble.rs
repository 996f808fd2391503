//! Registries that are away, busy, slow or wrong, and what is done about it.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use sluice_registry::{Client, Limits, Reference, RegistryConfig, RegistryError};
use sluice_registry_server::{Faults, Link, Server, ServerConfig};
use support::fake::{Fake, Reply, Seen, Tiny, nobody};
use support::{client, digest};

/// What the mirrors of these tests stand for: a registry at an address.
fn behind(dir: &Path, registry: &str, mirrors: &[String]) -> RegistryConfig {
    let hosts: PathBuf = dir.join("hosts");
    let text: String = mirrors.iter().map(|mirror| format!("[host.\"{mirror}\"]\n")).collect();
    std::fs::create_dir_all(hosts.join(registry)).expect("a directory");
    std::fs::write(hosts.join(registry).join("hosts.toml"), text).expect("a file");
    RegistryConfig { hosts_dir: Some(hosts), ..RegistryConfig::default() }
}

async fn read(client: &Client, reference: &Reference, tiny: &Tiny) -> Result<(), RegistryError> {
    let blob = client.blob(reference, &digest(&tiny.layer), tiny.layer.len() as u64);
    let bytes = blob.read_all(5..50_000, false).await?;
    assert!(bytes == tiny.layer[5..50_000]);
    Ok(())
}

/// A registry with the image; the first answers are those of `first`.
async fn after(tiny: Tiny, first: Vec<fn() -> Reply>) -> Fake {
    let number = AtomicUsize::new(0);
    Fake::start(move |seen| match first.get(number.fetch_add(1, Ordering::SeqCst)) {
        Some(reply) => reply(),
        None => tiny.answer(seen),
    })
    .await
}

#[tokio::test]
async fn a_dead_mirror_is_left_alone_for_a_while() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    // One that takes connections and closes them, counted.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mirror = format!("http://{}", listener.local_addr().expect("an address"));
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            drop(socket);
        }
    });
    let registry = after(tiny.clone(), vec![]).await;
    let config = behind(dir.path(), &registry.address.to_string(), &[mirror]);
    let limits = Limits { backoff: Duration::from_millis(800), ..Limits::default() };
    let client = Client::with_limits(config, limits).expect("a client");
    let begun = Instant::now();
    for _ in 0..10 {
        read(&client, &registry.reference(), &tiny).await.expect("from the registry");
    }
    let took = begun.elapsed();
    let first = taken.load(Ordering::SeqCst);
    eprintln!("ten reads beside a dead mirror: {took:?}, {first} connections to it");
    // The client may have tried a second connection by itself.
    assert!((1..=2).contains(&first) && took < Duration::from_millis(800), "{first} in {took:?}");
    tokio::time::sleep(Duration::from_millis(900)).await;
    read(&client, &registry.reference(), &tiny).await.expect("from the registry");
    assert!(taken.load(Ordering::SeqCst) > first, "it is asked again later");
}

#[tokio::test]
async fn a_mirror_serves_when_the_registry_is_away() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let mirror = after(tiny.clone(), vec![]).await;
    let away = nobody().await.to_string();
    let client = client(behind(dir.path(), &away, &[mirror.url("")]));
    let reference = Client::parse(&format!("{away}/a/b:1")).expect("a reference");
    client.resolve(&reference).await.expect("resolved");
    read(&client, &reference, &tiny).await.expect("read");
}

#[tokio::test]
async fn a_mirror_that_answers_nonsense_is_passed_by() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let nonsense: [fn(&Seen) -> Reply; 4] = [
        |_| Reply::new(206, vec![0; 49_995]).with("content-range", "bytes 0-49994/300000"),
        |_| Reply::new(204, ""),
        |_| Reply::new(404, ""),
        |_| Reply::new(403, ""),
    ];
    for answer in nonsense {
        let mirror = Fake::start(answer).await;
        let registry = after(tiny.clone(), vec![]).await;
        let client = client(behind(dir.path(), &registry.address.to_string(), &[mirror.url("")]));
        read(&client, &registry.reference(), &tiny).await.expect("from the registry");
        assert_eq!(mirror.seen("").len(), 1);
    }
}

#[tokio::test]
async fn errors_of_the_server_are_tried_again_and_others_are_not() {
    let tiny = Tiny::new();
    let registry =
        after(tiny.clone(), vec![|| Reply::new(500, ""), || Reply::new(503, ""), || Reply::new(429, "")])
            .await;
    read(&client(RegistryConfig::default()), &registry.reference(), &tiny).await.expect("in the end");
    assert_eq!(registry.seen("").len(), 4);
    for status in [400, 401, 403, 404, 416, 501] {
        let registry = Fake::start(move |_| Reply::new(status, "")).await;
        let error = read(&client(RegistryConfig::default()), &registry.reference(), &tiny)
            .await
            .expect_err("an error");
        assert!(matches!(error, RegistryError::Status { status: got, .. } if got == status), "{error:?}");
        assert_eq!(registry.seen("").len(), 1, "{status}");
    }
    let registry = Fake::start(|_| Reply::new(502, "")).await;
    let error =
        read(&client(RegistryConfig::default()), &registry.reference(), &tiny).await.expect_err("an error");
    assert!(error.is_transient());
    assert_eq!(registry.seen("").len(), 4);
}

#[tokio::test]
async fn a_busy_registry_is_left_alone_as_long_as_it_asks() {
    let tiny = Tiny::new();
    let registry = after(tiny.clone(), vec![|| Reply::new(429, "").with("retry-after", "1")]).await;
    let begun = Instant::now();
    read(&client(RegistryConfig::default()), &registry.reference(), &tiny).await.expect("in the end");
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(registry.seen("").len(), 2);

    // A date, in whole seconds: two seconds on is at least one.
    let date = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    let number = AtomicUsize::new(0);
    let content = tiny.clone();
    let registry = Fake::start(move |seen| match number.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(503, "").with("retry-after", &date()),
        _ => content.answer(seen),
    });
    let registry = registry.await;
    let begun = Instant::now();
    read(&client(RegistryConfig::default()), &registry.reference(), &tiny).await.expect("in the end");
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_pause_that_is_too_long_is_told_at_once_and_kept() {
    let tiny = Tiny::new();
    let registry = Fake::start(|_| Reply::new(429, "").with("retry-after", "40")).await;
    let limits = Limits { longest_retry_after: Duration::from_secs(39), ..Limits::default() };
    let client = Client::with_limits(RegistryConfig::default(), limits).expect("a client");
    let begun = Instant::now();
    for _ in 0..3 {
        let error = read(&client, &registry.reference(), &tiny).await.expect_err("too long");
        assert!(
            error.is_transient() && error.to_string().contains("asks to be left alone for 40 s")
                || error.to_string().contains("asked to be left alone for 40 s more"),
            "{error}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(registry.seen("").len(), 1, "it is not asked again");

    // Longer than the 30 s that once were the limit, and within it: waited for, not told.
    let registry = Fake::start(|_| Reply::new(429, "").with("retry-after", "40")).await;
    let client = support::client(RegistryConfig::default());
    let waiting =
        tokio::time::timeout(Duration::from_secs(2), read(&client, &registry.reference(), &tiny)).await;
    assert!(waiting.is_err(), "{waiting:?}");
}

#[tokio::test]
async fn a_busy_mirror_does_not_hold_up_a_read() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let mirror = Fake::start(|_| Reply::new(429, "").with("retry-after", "30")).await;
    let registry = after(tiny.clone(), vec![]).await;
    let client = client(behind(dir.path(), &registry.address.to_string(), &[mirror.url("")]));
    let begun = Instant::now();
    for _ in 0..5 {
        read(&client, &registry.reference(), &tiny).await.expect("from the registry");
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(mirror.seen("").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_way_are_bounded_per_host() {
    let tiny = Tiny::new();
    for (configured, wanted) in [(0, 8), (3, 3), (1, 1)] {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, highest) = (Arc::clone(&now), Arc::clone(&most));
        let registry = Fake::start(move |_| {
            highest.fetch_max(counted.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let counted = Arc::clone(&counted);
            let body = futures::stream::once(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                counted.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, std::io::Error>(axum::body::Bytes::from_static(b"0123456789"))
            });
            Reply::new(206, axum::body::Body::from_stream(body)).with("content-range", "bytes 0-9/300000")
        });
        let registry = registry.await;
        let client = client(RegistryConfig { connections_per_host: configured, ..RegistryConfig::default() });
        let blob = client.blob(&registry.reference(), &digest(&tiny.layer), tiny.layer.len() as u64);
        let reads = |background| {
            let blob = &blob;
            futures::future::join_all((0..24).map(move |_| blob.read_all(0..10, background)))
        };
        for read in reads(false).await {
            read.expect("read");
        }
        assert_eq!(most.swap(0, Ordering::SeqCst), wanted, "{configured}");
        for read in reads(true).await {
            read.expect("read");
        }
        assert_eq!(most.load(Ordering::SeqCst), wanted.saturating_sub(2).max(1), "background, {configured}");
    }
}

async fn embedded(dir: &Path) -> (Server, Tiny, Reference) {
    let listen = "127.0.0.1:0".parse().expect("an address");
    let (link, faults) = (Link::default(), Faults::default());
    let config = ServerConfig { root: dir.to_path_buf(), listen, link, faults, referrers_api: true };
    let server = Server::start(config).await.expect("a server");
    let (http, tiny) = (reqwest::Client::new(), Tiny::new());
    let base = format!("http://{}/v2/a/b", server.address());
    for bytes in [&tiny.config, &tiny.layer] {
        let url = format!("{base}/blobs/uploads/?digest={}", digest(bytes));
        assert_eq!(http.post(url).body(bytes.clone()).send().await.expect("an answer").status(), 201);
    }
    let put = http
        .put(format!("{base}/manifests/1"))
        .header("content-type", "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(put.body(tiny.manifest.clone()).send().await.expect("an answer").status(), 201);
    let reference = Client::parse(&format!("{}/a/b:1", server.address())).expect("a reference");
    (server, tiny, reference)
}

/// The faults of the embedded registry, each for one request, as a read and as a resolution see them.
#[tokio::test]
async fn faults_of_the_embedded_registry() {
    sluice_registry::install_crypto();
    let dir = tempfile::tempdir().expect("a directory");
    let (server, tiny, reference) = embedded(dir.path()).await;
    let limits = Limits { stall: Duration::from_millis(500), ..Limits::default() };
    let client = Client::with_limits(RegistryConfig::default(), limits).expect("a client");
    // (fault, what a read says, whether it may pass, whether resolving gets over it)
    let table: [(&str, Option<&str>, bool); 7] = [
        (r#"{"status":503,"times":1}"#, None, true),
        (r#"{"status":429,"retry_after":1,"times":1}"#, None, true),
        (r#"{"status":403,"times":1}"#, Some("answered 403 to blobs/"), false),
        (r#"{"truncate_at":100,"times":1}"#, Some("cannot reach"), true),
        (r#"{"stall":true,"times":1}"#, Some("it did not answer in time"), true),
        (r#"{"ignore_ranges":true,"times":1}"#, None, true),
        (r#"{"status":501,"times":1}"#, Some("answered 501"), false),
    ];
    for (fault, wanted, resolves) in table {
        let faults: Faults = serde_json::from_str(fault).expect("faults");
        server.set_faults(faults.clone());
        match (read(&client, &reference, &tiny).await, wanted) {
            (Ok(()), None) => {}
            (Err(error), Some(wanted)) => assert!(error.to_string().contains(wanted), "{fault}: {error}"),
            (got, _) => panic!("{fault}: {got:?}"),
        }
        read(&client, &reference, &tiny).await.expect("it was one");
        server.set_faults(Faults { path: "/manifests/".to_owned(), ..faults });
        assert_eq!(client.resolve(&reference).await.is_ok(), resolves, "{fault}");
    }
    server.set_faults(Faults { flip: true, path: "/blobs/".to_owned(), ..Faults::default() });
    let error = client.resolve(&reference).await.expect_err("another digest");
    assert!(matches!(error, RegistryError::Digest { .. }) && !error.is_transient(), "{error:?}");
    server.set_faults(Faults { refuse: true, ..Faults::default() });
    server.stop();
    let error = client.resolve(&reference).await.expect_err("away");
    assert!(error.is_transient() && error.to_string().starts_with("cannot reach 127.0.0.1:"), "{error}");
}

#[tokio::test]
async fn the_image_of_this_machine_is_chosen() {
    let own = if cfg!(target_arch = "x86_64") { ("amd64", "") } else { ("arm64", "") };
    let images = [Tiny::of("s390x", ""), Tiny::of(own.0, own.1), Tiny::of("riscv64", "")];
    let entry = |tiny: &Tiny, platform: bool, architecture: &str| {
        let mut entry = json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&tiny.manifest),
            "size": tiny.manifest.len(),
        });
        if platform {
            entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        }
        entry
    };
    let index = |entries: Vec<serde_json::Value>| {
        let kind = "application/vnd.oci.image.index.v1+json";
        json!({ "schemaVersion": 2, "mediaType": kind, "manifests": entries }).to_string()
    };
    let flat = index(vec![
        entry(&images[0], true, "s390x"),
        entry(&images[1], true, own.0),
        entry(&images[2], true, "riscv64"),
    ]);
    // Entries that do not say what they are for: their configurations do.
    let silent = index(vec![entry(&images[0], false, ""), entry(&images[1], false, "")]);
    let inner = json!({
        "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest(flat.as_bytes()), "size": flat.len(),
    });
    let nested = index(vec![inner]);
    let none = index(vec![entry(&images[0], true, "s390x"), entry(&images[2], false, "")]);
    for (top, found) in [(&flat, true), (&silent, true), (&nested, true), (&none, false)] {
        let (top, flat, images) = (top.clone(), flat.clone(), images.clone());
        let wanted = digest(&images[1].manifest);
        let registry = Fake::start(move |seen| {
            let known =
                images.iter().find(|tiny| seen.is(&digest(&tiny.manifest)) || seen.is(&digest(&tiny.config)));
            match known {
                Some(tiny) => tiny.answer(seen),
                None if seen.is(&digest(flat.as_bytes())) => Reply::new(200, flat.clone()),
                None => Reply::new(200, top.clone()),
            }
        });
        let registry = registry.await;
        match client(RegistryConfig::default()).resolve(&registry.reference()).await {
            Ok(image) => assert!(found && image.manifest_digest == wanted),
            Err(error) => {
                assert!(!found && error.to_string().contains("it has no manifest for linux/"), "{error}")
            }
        }
    }
}
