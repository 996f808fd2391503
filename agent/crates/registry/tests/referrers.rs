//! Lists of referrers that are long, refused, or not what they should be.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use sluice_registry::artifact::ArtifactStore;
use sluice_registry::{RegistryConfig, RegistryError};
use support::fake::{Fake, Reply, Tiny};
use support::{KIND, client, digest};

const CREATED: &str = "org.opencontainers.image.created";

/// An artifact manifest with one blob of this name.
fn artifact(name: &str) -> String {
    let layer = json!({ "mediaType": KIND.blob_type, "digest": digest(name.as_bytes()), "size": name.len(), "annotations": { "name": name } });
    json!({ "schemaVersion": 2, "layers": [layer] }).to_string()
}

fn entry(name: &str, created: &str) -> Value {
    let manifest = artifact(name);
    json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest.as_bytes()),
        "size": manifest.len(), "artifactType": KIND.artifact_type, "annotations": { CREATED: created },
    })
}

fn list(entries: &[Value]) -> String {
    json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries }).to_string()
}

/// The name of the artifact that is found for the image of a registry.
async fn found(registry: &Fake) -> Result<Option<String>, RegistryError> {
    let client = client(RegistryConfig::default());
    let image = client.resolve(&registry.reference()).await.expect("resolved");
    let blobs = ArtifactStore::Referrers(client).find(&image, KIND).await?;
    Ok(blobs.map(|blobs| blobs[0].0.annotations["name"].clone()))
}

/// A registry with an image and artifacts `a` to `d`; lists of referrers are answered by the test.
async fn registry(lists: impl Fn(&support::fake::Seen) -> Reply + Send + Sync + 'static) -> Fake {
    let tiny = Tiny::new();
    let artifacts: HashMap<String, String> =
        ["a", "b", "c", "d"].map(|name| (digest(artifact(name).as_bytes()), artifact(name))).into();
    Fake::start(move |seen| {
        if seen.is("/referrers/") || seen.is("/manifests/sha256-") {
            return lists(seen);
        }
        let known = artifacts.iter().find(|(digest, _)| seen.is(digest));
        known.map_or_else(|| tiny.answer(seen), |(_, text)| Reply::new(200, text.clone()))
    })
    .await
}

#[tokio::test]
async fn all_pages_are_read_and_the_newest_wins() {
    let fake = registry(|seen| {
        let path = seen.target.split('?').next().unwrap_or("");
        let (entries, next) = if seen.is("page=3") {
            (vec![entry("d", "2023-01-01T00:00:00Z")], None)
        } else if seen.is("page=2") {
            (vec![entry("c", "2025-01-01T00:00:00Z"), entry("b", "2024-01-01T00:00:00Z")], Some(3))
        } else {
            (vec![entry("a", "2022-01-01T00:00:00Z")], Some(2))
        };
        let reply = Reply::new(200, list(&entries));
        match next {
            Some(3) => {
                reply.with("link", &format!("<{path}?page=1>; rel=\"prev\", <{path}?page=3>; rel=\"next\""))
            }
            Some(page) => reply.with("link", &format!("<?page={page}>; rel=next")),
            None => reply,
        }
    });
    let fake = fake.await;
    assert_eq!(found(&fake).await.expect("found").as_deref(), Some("c"));
    assert_eq!(fake.seen("/referrers/").len(), 3);
    assert!(fake.seen("/referrers/")[0].is("artifactType=application%2Fvnd.test.v1"));
}

#[tokio::test]
async fn a_list_that_is_asked_for_with_the_image_is_used_once() {
    let fake = registry(|_| Reply::new(200, list(&[entry("a", "2022-01-01T00:00:00Z")]))).await;
    let client = client(RegistryConfig::default());
    let artifacts = ArtifactStore::Referrers(client.clone());
    let image = client.resolve_with(&fake.reference(), &[KIND]).await.expect("resolved");
    for asked in [1, 2] {
        assert!(artifacts.find(&image, KIND).await.expect("found").is_some());
        assert_eq!(fake.seen("/referrers/").len(), asked);
    }
}

/// What is asked for with the configuration finds connections that were made while the manifest was under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn lists_need_not_wait_for_connections() {
    let tiny = Tiny::new();
    let fake = Fake::start(move |seen| {
        if seen.is("/manifests/1") {
            std::thread::sleep(Duration::from_millis(300));
        }
        tiny.answer(seen)
    });
    let fake = fake.await;
    let client = client(RegistryConfig::default());
    for _ in 0..2 {
        client.resolve_with(&fake.reference(), &[KIND]).await.expect("resolved");
        let opened = fake.seen("").iter().filter(|seen| seen.target == "/v2/").count();
        assert_eq!(opened, 1, "once is enough for a while");
    }
    let peers = |part: &str| fake.seen(part).into_iter().map(|seen| seen.peer).collect::<HashSet<_>>();
    let before = &peers("/manifests/1") | &peers("/v2/");
    assert!(
        peers("/referrers/").is_subset(&before) && peers("/blobs/").is_subset(&before),
        "another connection"
    );
}

/// A list that repeats an artifact's layers saves the question for its manifest; what makes no sense there is asked for as ever.
#[tokio::test]
async fn what_a_list_tells_of_an_artifact_is_not_asked_for() {
    let layers = serde_json::from_str::<Value>(&artifact("a")).expect("JSON")["layers"].to_string();
    for (told, asked) in [(layers.as_str(), 0), ("[{}]", 1), ("{", 1), ("", 1)] {
        let mut entry = entry("a", "2022-01-01T00:00:00Z");
        entry["annotations"]["dev.sluice.artifact.layers"] = json!(told);
        let fake = registry(move |_| Reply::new(200, list(std::slice::from_ref(&entry)))).await;
        assert_eq!(found(&fake).await.expect("found").as_deref(), Some("a"), "{told}");
        assert_eq!(fake.seen("/manifests/sha256:").len(), asked, "{told}");
    }
}

#[tokio::test]
async fn a_list_that_was_asked_for_with_an_image_is_of_its_repository_alone() {
    let right = registry(|_| Reply::new(200, list(&[entry("a", "2022-01-01T00:00:00Z")]))).await;
    let wrong = registry(|_| Reply::new(200, "<html>")).await;
    let client = client(RegistryConfig::default());
    let artifacts = ArtifactStore::Referrers(client.clone());
    // The same image.
    let image = client.resolve(&right.reference()).await.expect("resolved");
    let same = client.resolve_with(&wrong.reference(), &[KIND]).await.expect("resolved");
    assert_eq!(image.manifest_digest, same.manifest_digest);
    assert!(artifacts.find(&image, KIND).await.expect("found").is_some());
    // And what failed is told, and not asked for once more.
    artifacts.find(&same, KIND).await.expect_err("refused");
    assert_eq!((right.seen("/referrers/").len(), wrong.seen("/referrers/").len()), (1, 1));
}

#[tokio::test]
async fn lists_that_lead_elsewhere_or_nowhere() {
    let elsewhere =
        registry(|_| Reply::new(200, list(&[])).with("link", "<http://127.0.0.2:1/x>; rel=\"next\"")).await;
    let error = found(&elsewhere).await.expect_err("refused").to_string();
    assert!(error.contains("its next page is at another host"), "{error}");
    let endless = registry(|_| Reply::new(200, list(&[])).with("link", "<?again>; rel=\"next\"")).await;
    let error = found(&endless).await.expect_err("refused").to_string();
    assert!(error.contains("more than 64 pages"), "{error}");
    let nonsense = registry(|_| Reply::new(200, "<html>")).await;
    let error = found(&nonsense).await.expect_err("refused");
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn who_may_not_ask_hears_of_it() {
    for status in [401, 403] {
        for part in ["/referrers/", "/manifests/sha256-"] {
            let fake = registry(move |seen| Reply::new(if seen.is(part) { status } else { 404 }, "")).await;
            let error = found(&fake).await.expect_err("refused");
            let text = error.to_string();
            assert!(text.contains(&format!("answered {status} to")), "{text}");
            assert!(text.contains("check the credentials") && !error.is_not_found(), "{text}");
        }
    }
    for status in [400, 404, 405, 406] {
        let fake = registry(move |seen| {
            if seen.is("/referrers/") {
                Reply::new(status, "")
            } else {
                Reply::new(200, list(&[entry("b", "x")]))
            }
        });
        assert_eq!(found(&fake.await).await.expect("by the tag").as_deref(), Some("b"), "{status}");
    }
    let fake = registry(|_| Reply::new(404, "")).await;
    assert_eq!(found(&fake).await.expect("none"), None);
}

#[tokio::test]
async fn a_list_that_cannot_be_read_is_never_overwritten() {
    let kept = list(&[entry("a", "2022-01-01T00:00:00Z")])
        .replace("\"schemaVersion\":2", "\"schemaVersion\":2,\"kept\":1");
    let other = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "manifests": [] });
    let table = [
        ("<html>".to_owned(), false),
        ("{\"manifests\":3}".to_owned(), false),
        ("{}".to_owned(), false),
        (other.to_string(), false),
        (kept, true),
    ];
    for (content, readable) in table {
        let answer = content.clone();
        let tiny = Tiny::new();
        let fake = Fake::start(move |seen| match seen.method.as_str() {
            "HEAD" => Reply::new(200, ""),
            "PUT" => Reply::new(201, ""),
            _ if seen.is("/manifests/sha256-") => Reply::new(200, answer.clone()),
            _ => tiny.answer(seen),
        });
        let fake = fake.await;
        let client = client(RegistryConfig::default());
        let image = client.resolve(&fake.reference()).await.expect("resolved");
        let store = ArtifactStore::Referrers(client);
        let published = store.publish(&image, KIND, vec![(HashMap::new(), Bytes::from("x"))]).await;
        let puts: Vec<_> =
            fake.seen("/manifests/sha256-").into_iter().filter(|one| one.method == "PUT").collect();
        if !readable {
            let error = published.expect_err("refused").to_string();
            assert!(error.contains("it is left as it is"), "{error}");
            assert_eq!(puts.len(), 0, "{content}");
            continue;
        }
        let digest = published.expect("published");
        let new: Value = serde_json::from_slice(&puts[0].body).expect("JSON");
        let entries = new["manifests"].as_array().expect("entries");
        assert_eq!((entries.len(), &new["kept"]), (2, &json!(1)));
        assert_eq!(entries[1]["digest"], digest);
        let date = entries[1]["annotations"][CREATED].as_str().expect("a date");
        assert!(date.starts_with("20") && date.ends_with('Z'), "{date}");
    }
}

#[tokio::test]
async fn an_object_store_holds_artifacts_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let url = format!("file://{}", dir.path().display());
    let tiny = Tiny::new();
    let fake = Fake::start(move |seen| tiny.answer(seen)).await;
    let image = client(RegistryConfig::default()).resolve(&fake.reference()).await.expect("resolved");
    let store = ArtifactStore::objects(&url, []).expect("a store");
    assert!(store.find(&image, KIND).await.expect("an answer").is_none());
    store.publish(&image, KIND, vec![(HashMap::new(), Bytes::from("content"))]).await.expect("published");
    let found = store.find(&image, KIND).await.expect("an answer").expect("an artifact");
    assert_eq!(found[0].1.read_all(0..7).await.expect("read"), "content");
    let error = found[0].1.read_all(0..1 << 40).await.expect_err("refused").to_string();
    assert!(error.contains("read into memory"), "{error}");

    // A document that is damaged, or too large to be one.
    let key = format!("sluice/v1/{}/{}", KIND.name, image.manifest_digest.replace(':', "-"));
    for (content, wanted) in
        [(b"{}".to_vec(), "is not an artifact manifest"), (vec![b' '; 5 << 20], "is larger than")]
    {
        std::fs::write(dir.path().join(&key), content).expect("a file");
        let error = store.find(&image, KIND).await.expect_err("refused");
        assert!(error.to_string().contains(wanted) && !error.is_transient(), "{error}");
    }
    let secrets = [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_TOKEN", "secret")];
    let azure = ArtifactStore::objects(
        "az://container/x",
        secrets.map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    let shown = format!("{:?}", azure.expect("a store"));
    assert!(shown.contains("az://container/x") && !shown.contains("secret"), "{shown}");
    let error = ArtifactStore::objects("s3://key:secret@bucket?sig=secret", []).map(|_| ());
    assert!(!format!("{error:?}").contains("secret"), "{error:?}");
}
