//! The client against registries that run: docker-registry and the embedded one, filled by skopeo.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::json;
use sluice_registry::artifact::ArtifactStore;
use sluice_registry::{Client, RegistryConfig, RegistryError};
use sluice_registry_server::{Faults, Link, Server, ServerConfig};
use support::fake::{Fake, Reply};
use support::real::{DockerRegistry, FORMS, Options, push};
use support::{KIND, client, digest, image, run};

async fn embedded(root: &Path, referrers_api: bool) -> Server {
    std::fs::create_dir_all(root).expect("a directory");
    let listen = "127.0.0.1:0".parse().expect("an address");
    let (link, faults) = (Link::default(), Faults::default());
    let config = ServerConfig { root: root.to_path_buf(), listen, link, faults, referrers_api };
    Server::start(config).await.expect("a server")
}

/// Everything the agent does with a registry.
async fn use_it(address: &str, fallback: bool) {
    for form in FORMS {
        let client = client(RegistryConfig::default());
        let reference = Client::parse(&format!("{address}/team/{form}:1")).expect("a reference");
        let image = client.resolve(&reference).await.expect("resolved");
        assert_eq!(digest(&image.manifest), image.manifest_digest);
        let seen =
            run("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{address}/team/{form}:1")]);
        let seen: serde_json::Value = serde_json::from_str(&seen).expect("JSON");
        assert_eq!(seen["Digest"].as_str(), Some(image.manifest_digest.as_str()), "{form}");
        assert_eq!(image.layers.len(), 2);
        for layer in &image.layers {
            let magic: &[u8] = if form == "zstd" { &[0x28, 0xb5, 0x2f, 0xfd] } else { &[0x1f, 0x8b] };
            let blob = client.blob(&reference, &layer.digest, layer.size);
            let whole = blob.read_all(0..layer.size, false).await.expect("read");
            assert_eq!(digest(&whole), layer.digest);
            assert!(whole.starts_with(magic), "{form}");
            let size = layer.size;
            for range in [0..1, 1..2, size - 1..size, size / 3..size / 2, 100_000..400_000, 5..5] {
                let part = blob.read_all(range.clone(), true).await.expect("read");
                assert!(part == whole[range.start as usize..range.end as usize], "{range:?}");
            }
        }
        // By digest too.
        let by_digest = reference.clone_with_digest(image.manifest_digest.clone());
        assert_eq!(client.resolve(&by_digest).await.expect("resolved").layers, image.layers);

        let store = ArtifactStore::Referrers(client.clone());
        assert!(store.find(&image, KIND).await.expect("an answer").is_none());
        let mut published = Vec::new();
        for text in ["first", "second"] {
            let annotations = HashMap::from([("name".to_owned(), text.to_owned())]);
            let digest = store.publish(&image, KIND, vec![(annotations, Bytes::from(text))]).await;
            published.push(digest.expect("published"));
        }
        let found = store.find(&image, KIND).await.expect("an answer").expect("an artifact");
        let (blob, reader) = &found[0];
        assert_eq!(blob.annotations["name"], "second");
        assert_eq!(reader.read_all(0..reader.size()).await.expect("read"), "second");
        if fallback {
            let tag = image.manifest_digest.replace(':', "-");
            let raw = format!("docker://{address}/team/{form}:{tag}");
            let list = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &raw]);
            assert!(published.iter().all(|digest| list.contains(digest)), "{list}");
        }

        let missing = Client::parse(&format!("{address}/team/none:1")).expect("a reference");
        let error = client.resolve(&missing).await.expect_err("there is none");
        assert!(error.is_not_found() && !error.is_transient(), "{error:?}");
        let wanted = format!(
            "{address} answered 404 to manifests/1 of team/none; there is no such image, or it may not be seen"
        );
        assert!(error.to_string().starts_with(&wanted), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry() {
    let work = tempfile::tempdir().expect("a directory");
    let layout = image(work.path());
    let registry = DockerRegistry::start(&Options::default());
    for form in FORMS {
        push(&layout, form, &registry.address);
    }
    // Version 2.8 has no referrers API.
    use_it(&registry.address, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_registry() {
    let work = tempfile::tempdir().expect("a directory");
    let layout = image(work.path());
    for referrers_api in [true, false] {
        let server = embedded(&work.path().join(format!("root-{referrers_api}")), referrers_api).await;
        let address = server.address().to_string();
        for form in FORMS {
            push(&layout, form, &address);
        }
        use_it(&address, !referrers_api).await;
    }
}

/// A CA that no system trusts, a certificate of it for 127.0.0.1, and that one's key.
fn certificates(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let path = |name: &str| dir.join(name).display().to_string();
    let (ca, ca_key, request) = (path("ca.pem"), path("ca.key"), path("request.pem"));
    let (certificate, key, extensions) = (path("cert.pem"), path("cert.key"), path("extensions"));
    std::fs::write(&extensions, "subjectAltName=IP:127.0.0.1\n").expect("a file");
    let new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"];
    let ca_options = ["/CN=test CA", "-x509", "-days", "2", "-keyout", &ca_key, "-out", &ca];
    run("openssl", &[&new[..], &ca_options].concat());
    run("openssl", &[&new[..], &["/CN=test", "-keyout", &key, "-out", &request]].concat());
    let sign =
        ["x509", "-req", "-days", "2", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial"];
    run("openssl", &[&sign[..], &["-extfile", &extensions, "-out", &certificate]].concat());
    (ca.into(), certificate.into(), key.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_and_more_can_be_trusted() {
    let work = tempfile::tempdir().expect("a directory");
    let layout = image(work.path());
    let (ca, certificate, key) = certificates(work.path());
    let registry = DockerRegistry::start(&Options { tls: Some((&certificate, &key)), ..Options::default() });
    push(&layout, "gzip", &registry.address);
    // Loopback addresses are spoken to by http, unless hosts.toml says otherwise.
    let hosts = work.path().join("hosts");
    let server = format!("server = \"https://{}\"\n", registry.address);
    std::fs::create_dir_all(hosts.join(&registry.address)).expect("a directory");
    let file = hosts.join(&registry.address).join("hosts.toml");
    std::fs::write(&file, &server).expect("a file");
    let config = RegistryConfig { hosts_dir: Some(hosts), ..RegistryConfig::default() };
    let reference = Client::parse(&format!("{}/team/gzip:1", registry.address)).expect("a reference");

    let begun = std::time::Instant::now();
    let error = client(config.clone()).resolve(&reference).await.expect_err("not trusted");
    assert!(matches!(error, RegistryError::Tls { .. }) && !error.is_transient(), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("certificate") && text.contains("extra_ca"), "{text}");
    eprintln!("{text}; after {:?}", begun.elapsed());

    let trusting = RegistryConfig { extra_ca: vec![ca], ..config.clone() };
    let image = client(trusting.clone()).resolve(&reference).await.expect("trusted");
    let layer = &image.layers[0];
    let blob = client(trusting).blob(&reference, &layer.digest, layer.size);
    assert_eq!(digest(&blob.read_all(0..layer.size, false).await.expect("read")), layer.digest);

    let text = format!("[host.\"https://{}\"]\nskip_verify = true\n", registry.address);
    std::fs::write(&file, server.clone() + &text).expect("a file");
    client(config.clone()).resolve(&reference).await.expect("not checked");

    // Spoken to by https, it speaks http.
    let plain = DockerRegistry::start(&Options::default());
    std::fs::write(&file, format!("server = \"https://{}\"\n", plain.address)).expect("a file");
    let error = client(config).resolve(&reference).await.expect_err("not TLS");
    assert!(
        matches!(error, RegistryError::Tls { .. }) && error.to_string().contains("plain_http"),
        "{error:?}"
    );

    let empty = work.path().join("empty.pem");
    std::fs::write(&empty, "nothing\n").expect("a file");
    let config = RegistryConfig { extra_ca: vec![empty], ..RegistryConfig::default() };
    let error = Client::new(config).expect_err("refused").to_string();
    assert!(error.contains("empty.pem") && error.contains("none in it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_asks_for_a_password() {
    // `user` with the password `correct horse`.
    let htpasswd = "user:$2b$04$lkLSu7m1IiTjYMakteheeetuE8RXzvTkVVHQWYsZfXaapK02eGOr.\n";
    let work = tempfile::tempdir().expect("a directory");
    let layout = image(work.path());
    let registry = DockerRegistry::start(&Options { htpasswd: Some(htpasswd), ..Options::default() });
    let remote = format!("docker://{}/team/gzip:1", registry.address);
    let source = format!("oci:{}:a", layout.display());
    let login = ["--dest-tls-verify=false", "--dest-creds", "user:correct horse"];
    run("skopeo", &[&["copy", "--insecure-policy"], &login[..], &[&source, &remote]].concat());

    let reference = Client::parse(&format!("{}/team/gzip:1", registry.address)).expect("a reference");
    let docker = work.path().join("config.json");
    let config = RegistryConfig { docker_config: Some(docker.clone()), ..RegistryConfig::default() };
    // (user, password), base64
    let wrong = "dXNlcjp3cm9uZyBob3JzZQ==";
    let right = "dXNlcjpjb3JyZWN0IGhvcnNl";
    for encoded in ["", wrong] {
        let auth = if encoded.is_empty() { String::new() } else { format!("\"auth\":\"{encoded}\"") };
        std::fs::write(&docker, format!("{{\"auths\":{{\"{}\":{{{auth}}}}}}}", registry.address))
            .expect("a file");
        let error = client(config.clone()).resolve(&reference).await.expect_err("refused");
        let text = error.to_string();
        assert!(text.contains("answered 401 to manifests/1 of team/gzip; check the credentials"), "{text}");
        assert!(!error.is_transient() && !format!("{error:?}").contains(wrong), "{error:?}");
    }
    std::fs::write(&docker, format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{right}\"}}}}}}", registry.address))
        .expect("a file");
    let client = client(config);
    let image = client.resolve(&reference).await.expect("let in");
    let store = ArtifactStore::Referrers(client.clone());
    store.publish(&image, KIND, vec![(HashMap::new(), Bytes::from("x"))]).await.expect("published");
    assert!(store.find(&image, KIND).await.expect("an answer").is_some());
    assert!(!format!("{client:?}").contains(right));
}

/// Signs tokens as docker-registry wants them: JSON web tokens, ES256, with their certificate.
struct Signer {
    key: EcdsaKeyPair,
    certificate: String,
    issued: AtomicUsize,
}

impl Signer {
    fn new(certificate: &Path, key: &Path) -> Self {
        let der = |path: &Path| {
            let text = std::fs::read_to_string(path).expect("a PEM file");
            let inner: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
            (STANDARD.decode(&inner).expect("base64"), inner)
        };
        let random = ring::rand::SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der(key).0, &random);
        Self { key: key.expect("a key"), certificate: der(certificate).1, issued: AtomicUsize::new(0) }
    }

    /// For what the scopes of a query ask, good until so many seconds from now.
    fn token(&self, target: &str, life: i64) -> String {
        let url = url::Url::parse(&format!("http://x{target}")).expect("an address");
        let scopes: Vec<String> = url
            .query_pairs()
            .filter(|(key, _)| key == "scope")
            .map(|(_, scope)| scope.into_owned())
            .collect();
        let access = scopes.iter().filter_map(|scope| {
            let (kind, rest) = scope.split_once(':')?;
            let (name, actions) = rest.rsplit_once(':')?;
            Some(json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }))
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs() as i64;
        let number = self.issued.fetch_add(1, Ordering::SeqCst);
        let head = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": "test", "aud": "the registry", "sub": "user", "jti": number.to_string(), "iat": now - 300,
            "nbf": now - 300, "exp": now + life, "access": access.collect::<Vec<_>>(),
        });
        let [head, claims] = [head, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let signed = format!("{head}.{claims}");
        let signature = self.key.sign(&ring::rand::SystemRandom::new(), signed.as_bytes()).expect("signed");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_wants_tokens_that_end() {
    let work = tempfile::tempdir().expect("a directory");
    let layout = image(work.path());
    let (_, certificate, key) = certificates(work.path());
    let signer = Signer::new(&certificate, &key);
    // Seconds; the registry allows for clocks that differ by a minute.
    let life = Arc::new(AtomicI64::new(300));
    let (lives, right) = (Arc::clone(&life), "Basic dXNlcjpjb3JyZWN0IGhvcnNl");
    let server = Fake::start(move |seen| {
        if seen.authorization.as_deref() != Some(right) {
            return Reply::new(401, "");
        }
        let token = signer.token(&seen.target, lives.load(Ordering::SeqCst));
        Reply::new(200, json!({ "token": token, "expires_in": 300 }).to_string())
    });
    let server = server.await;
    let realm = server.url("/token");
    let registry =
        DockerRegistry::start(&Options { tokens: Some((&realm, &certificate)), ..Options::default() });
    let (remote, source) =
        (format!("docker://{}/team/gzip:1", registry.address), format!("oci:{}:a", layout.display()));
    let login = ["--dest-tls-verify=false", "--dest-creds", "user:correct horse"];
    run("skopeo", &[&["copy", "--insecure-policy"], &login[..], &[&source, &remote]].concat());
    let pushed = server.seen("/token").len();
    assert!(pushed > 0, "skopeo asked for tokens");

    let reference = Client::parse(&format!("{}/team/gzip:1", registry.address)).expect("a reference");
    let docker = work.path().join("config.json");
    let right = right.trim_start_matches("Basic ");
    std::fs::write(&docker, format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{right}\"}}}}}}", registry.address))
        .expect("a file");
    let client = client(RegistryConfig { docker_config: Some(docker), ..RegistryConfig::default() });
    // Good for two seconds more, whatever is said of it.
    life.store(-58, Ordering::SeqCst);
    let image = client.resolve(&reference).await.expect("resolved");
    let layer = &image.layers[0];
    let blob = client.blob(&reference, &layer.digest, layer.size);
    let whole = blob.read_all(0..layer.size, false).await.expect("read");
    assert_eq!(digest(&whole), layer.digest);
    let before = server.seen("/token").len();
    tokio::time::sleep(Duration::from_secs(4)).await;
    life.store(300, Ordering::SeqCst);
    assert!(blob.read_all(5..900, false).await.expect("a read does not notice") == whole[5..900]);
    assert_eq!(server.seen("/token").len(), before + 1);
    for _ in 0..3 {
        blob.read_all(5..900, false).await.expect("read");
    }
    assert_eq!(server.seen("/token").len(), before + 1);
    // Pushing takes another token than pulling.
    let store = ArtifactStore::Referrers(client.clone());
    store.publish(&image, KIND, vec![(HashMap::new(), Bytes::from("x"))]).await.expect("published");
    assert!(server.seen("/token").iter().any(|asked| asked.is("pull%2Cpush")));
    // A server that gives out only what has ended already.
    life.store(-600, Ordering::SeqCst);
    let client = Client::new(RegistryConfig {
        docker_config: Some(work.path().join("config.json")),
        ..RegistryConfig::default()
    });
    let error = client.expect("a client").resolve(&reference).await.expect_err("refused");
    assert!(
        error.to_string().contains("answered 401 to manifests/1 of team/gzip; check the credentials"),
        "{error}"
    );
}

#[test]
fn references() {
    // (given, registry, repository, tag, digest)
    let hash = format!("sha256:{}", "ab".repeat(32));
    let table = [
        ("ubuntu".to_owned(), "docker.io", "library/ubuntu", Some("latest"), None),
        ("ubuntu:24.04".to_owned(), "docker.io", "library/ubuntu", Some("24.04"), None),
        ("team/app".to_owned(), "docker.io", "team/app", Some("latest"), None),
        ("docker.io/ubuntu".to_owned(), "docker.io", "library/ubuntu", Some("latest"), None),
        ("docker.io/library/ubuntu".to_owned(), "docker.io", "library/ubuntu", Some("latest"), None),
        ("index.docker.io/team/app:1".to_owned(), "docker.io", "team/app", Some("1"), None),
        ("localhost/app".to_owned(), "localhost", "app", Some("latest"), None),
        ("localhost:5000/app:v1".to_owned(), "localhost:5000", "app", Some("v1"), None),
        ("127.0.0.1:5000/a/b/c".to_owned(), "127.0.0.1:5000", "a/b/c", Some("latest"), None),
        ("ghcr.io/a/b-c_d.e:V1.2-x".to_owned(), "ghcr.io", "a/b-c_d.e", Some("V1.2-x"), None),
        (format!("ubuntu@{hash}"), "docker.io", "library/ubuntu", None, Some(hash.as_str())),
        (format!("r.io/a:1@{hash}"), "r.io", "a", Some("1"), Some(hash.as_str())),
    ];
    for (given, registry, repository, tag, digest) in &table {
        let parsed = Client::parse(given).expect("a reference");
        let got = (parsed.registry(), parsed.repository(), parsed.tag(), parsed.digest());
        assert_eq!(got, (*registry, *repository, *tag, *digest), "{given}");
    }
}

#[test]
fn wrong_references_say_what_is_wrong() {
    let table = [
        ("", "it is empty"),
        ("Ubuntu", "names of repositories are lower-case"),
        ("r.io/Team/app:1", "names of repositories are lower-case"),
        ("https://r.io/app", "it begins with a scheme; leave that out"),
        ("r.io/a b", "there is a space in it"),
        ("r.io/app:", "it is not [HOST[:PORT]/]PATH[:TAG][@DIGEST]"),
        ("r.io/app@sha256:12", "its digest is not `sha256:` and 64 hexadecimal digits"),
        (
            "r.io/app@sha256:abababababababababababababababab",
            "its digest is not `sha256:` and 64 hexadecimal digits",
        ),
        ("/app", "it is not [HOST[:PORT]/]PATH[:TAG][@DIGEST]"),
    ];
    for (given, wanted) in table {
        let error = Client::parse(given).expect_err("refused");
        assert_eq!(error.to_string(), format!("`{given}` is not an image reference: {wanted}"));
        assert!(!error.is_transient());
    }
}
