//! Who is let in, and what leaves this machine: tokens, passwords, redirects, and that no secret is shown.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use sluice_registry::{Blob, Client, RegistryConfig};
use support::fake::{Fake, Reply, Tiny, nobody};
use support::{client, digest};

/// A client with Docker's configuration.
fn with_docker(dir: &Path, text: &str) -> Client {
    let path = dir.join("config.json");
    std::fs::write(&path, text).expect("a file");
    client(RegistryConfig { docker_config: Some(path), ..RegistryConfig::default() })
}

/// A registry that wants the newest of its own tokens, which are called `token-1`, `token-2` and so on.
async fn with_tokens(tiny: Tiny, tokens: Arc<AtomicUsize>, life: u64, challenge: fn(&str) -> String) -> Fake {
    Fake::start(move |seen| {
        let host = seen.headers["host"].to_str().expect("text");
        if seen.is("/token") {
            if seen.authorization.as_deref() == Some("Basic dXNlcjp3cm9uZw==")
                || seen.body.ends_with(b"expired")
            {
                return Reply::new(401, "{\"details\":\"no\"}");
            }
            let number = tokens.fetch_add(1, Ordering::SeqCst) + 1;
            let answer = json!({ "token": format!("token-{number}"), "expires_in": life });
            return Reply::new(200, answer.to_string());
        }
        let wanted = format!("Bearer token-{}", tokens.load(Ordering::SeqCst));
        if seen.authorization.as_deref() == Some(wanted.as_str()) {
            return tiny.answer(seen);
        }
        Reply::new(401, "").with("www-authenticate", &challenge(&format!("http://{host}/token")))
    })
    .await
}

fn usual(realm: &str) -> String {
    format!("Bearer realm=\"{realm}\",service=\"the service\",scope=\"repository:a/b:pull\"")
}

fn auths(fake: &Fake, text: &str) -> String {
    format!("{{\"auths\":{{\"{}\":{{{text}}}}}}}", fake.address)
}

async fn read(client: &Client, fake: &Fake, tiny: &Tiny) -> Result<bool, String> {
    let blob = layer(client, fake, tiny);
    let bytes = blob.read_all(1000..2000, false).await.map_err(|error| error.to_string())?;
    Ok(bytes == tiny.layer[1000..2000])
}

fn layer(client: &Client, fake: &Fake, tiny: &Tiny) -> Blob {
    client.blob(&fake.reference(), &digest(&tiny.layer), tiny.layer.len() as u64)
}

#[tokio::test]
async fn tokens_are_fetched_kept_and_renewed() {
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    let fake = with_tokens(tiny.clone(), Arc::clone(&tokens), 300, usual).await;
    let dir = tempfile::tempdir().expect("a directory");
    let client = with_docker(dir.path(), &auths(&fake, "\"auth\":\"dXNlcjpwYXNz\""));
    client.resolve(&fake.reference()).await.expect("resolved");
    for _ in 0..5 {
        assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    }
    let asked = fake.seen("/token");
    assert_eq!(asked.len(), 1, "one token for all: {asked:?}");
    assert_eq!(asked[0].authorization.as_deref(), Some("Basic dXNlcjpwYXNz"));
    assert_eq!(asked[0].method, "GET");
    assert_eq!(asked[0].target, "/token?scope=repository%3Aa%2Fb%3Apull&service=the+service");
    // The registry does not take it any more: a read does not notice.
    tokens.fetch_add(1, Ordering::SeqCst);
    assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    assert_eq!(fake.seen("/token").len(), 2);
}

#[tokio::test]
async fn one_token_is_fetched_for_all_that_need_it() {
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    let fake = with_tokens(tiny.clone(), Arc::clone(&tokens), 300, usual).await;
    let client = client(RegistryConfig::default());
    for round in 1..=2 {
        let reads = (0..20).map(|_| read(&client, &fake, &tiny));
        assert!(futures::future::join_all(reads).await.into_iter().all(|read| read == Ok(true)));
        assert_eq!(fake.seen("/token").len(), round);
        // The next round's token; the one at hand is not taken any more.
        tokens.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_busy_token_server_is_left_alone_as_long_as_it_asks() {
    let (tiny, asked) = (Tiny::new(), AtomicUsize::new(0));
    let content = tiny.clone();
    let fake = Fake::start(move |seen| {
        let host = seen.headers["host"].to_str().expect("text");
        if seen.is("/token") && asked.fetch_add(1, Ordering::SeqCst) == 0 {
            return Reply::new(429, "").with("retry-after", "1");
        }
        if seen.is("/token") {
            return Reply::new(200, "{\"access_token\":\"t\"}");
        }
        match seen.authorization.as_deref() {
            Some("Bearer t") => content.answer(seen),
            _ => Reply::new(401, "").with("www-authenticate", &usual(&format!("http://{host}/token"))),
        }
    });
    let fake = fake.await;
    let begun = Instant::now();
    assert_eq!(read(&client(RegistryConfig::default()), &fake, &tiny).await, Ok(true));
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn tokens_that_end_are_not_used_again() {
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    // Shorter than the margin: over when it comes.
    let fake = with_tokens(tiny.clone(), tokens, 1, usual).await;
    let client = client(RegistryConfig::default());
    for count in 1..=3 {
        assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
        assert_eq!(fake.seen("/token").len(), count);
    }
}

#[tokio::test]
async fn challenges_of_other_shapes() {
    let shapes: [fn(&str) -> String; 3] = [
        |realm| format!("Bearer realm={realm},service=reg,scope=repository:a/b:pull"),
        |realm| format!("Negotiate, Basic realm=\"x\", Bearer realm=\"{realm}\""),
        |realm| format!("bearer scope=\"repository:a/b:pull repository:c/d:pull\" , realm=\"{realm}\""),
    ];
    for shape in shapes {
        let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
        let fake = with_tokens(tiny.clone(), tokens, 60, shape).await;
        assert_eq!(read(&client(RegistryConfig::default()), &fake, &tiny).await, Ok(true), "{}", shape("r"));
    }
}

#[tokio::test]
async fn identity_tokens_are_refresh_tokens() {
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    let fake = with_tokens(tiny.clone(), tokens, 60, usual).await;
    let dir = tempfile::tempdir().expect("a directory");
    let client = with_docker(dir.path(), &auths(&fake, "\"auth\":\"\",\"identitytoken\":\"re+fresh\""));
    assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    let asked = fake.seen("/token");
    assert_eq!((asked.len(), asked[0].method.as_str()), (1, "POST"));
    assert_eq!(asked[0].headers["content-type"], "application/x-www-form-urlencoded");
    let form = "grant_type=refresh_token&client_id=sluice&service=the+service&scope=repository%3Aa%2Fb%3Apull&refresh_token=re%2Bfresh";
    assert_eq!(asked[0].body, form);
    assert!(fake.seen("").iter().all(|one| !one.authorization.as_deref().unwrap_or("").starts_with("Basic")));
}

#[tokio::test]
async fn refused_logins_say_what_to_do() {
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    let fake = with_tokens(tiny.clone(), tokens, 60, usual).await;
    let dir = tempfile::tempdir().expect("a directory");
    let asked = format!("{} answered 401 to the request for a token for repository:a/b:pull", fake.address);
    let table = [
        ("\"auth\":\"dXNlcjp3cm9uZw==\"", "; check the credentials"),
        (
            "\"auth\":\"\",\"identitytoken\":\"expired\"",
            "; the login expired or was taken back: log in again",
        ),
    ];
    for (login, hint) in table {
        let client = with_docker(dir.path(), &auths(&fake, login));
        let error = client.resolve(&fake.reference()).await.expect_err("refused");
        assert_eq!(error.to_string(), format!("{asked}{hint}"));
        assert!(!error.is_transient() && error.may_pass());
    }
    // A broken file is no "no credentials".
    let client = with_docker(dir.path(), "{ \"auths\": {");
    let error = client.resolve(&fake.reference()).await.expect_err("refused").to_string();
    let wanted =
        format!("Docker's configuration {}: it is not valid JSON", dir.path().join("config.json").display());
    assert!(error.starts_with(&wanted), "{error}");
}

#[tokio::test]
async fn passwords_do_not_go_to_other_schemes_and_hosts() {
    let tiny = Tiny::new();
    let fake = Fake::start(|_| {
        Reply::new(401, "").with("www-authenticate", "Bearer realm=\"ftp://elsewhere/token\"")
    });
    let fake = fake.await;
    let error = read(&client(RegistryConfig::default()), &fake, &tiny).await.expect_err("refused");
    assert!(error.contains("its token server is not reached by https"), "{error}");
}

#[tokio::test]
async fn endless_answers_are_bounded() {
    let endless = || {
        let piece = axum::body::Bytes::from(vec![b'{'; 1 << 16]);
        axum::body::Body::from_stream(futures::stream::iter(
            (0..4096).map(move |_| Ok::<_, std::io::Error>(piece.clone())),
        ))
    };
    let token = Fake::start(move |seen| {
        if seen.is("/token") {
            return Reply::new(200, endless());
        }
        let host = seen.headers["host"].to_str().expect("text");
        Reply::new(401, "").with("www-authenticate", &format!("Bearer realm=\"http://{host}/token\""))
    });
    let (token, manifest) = (token.await, Fake::start(move |_| Reply::new(200, endless())).await);
    let client = client(RegistryConfig::default());
    for (fake, limit) in [(token, "1048576"), (manifest, "4194304")] {
        let error = client.resolve(&fake.reference()).await.expect_err("refused").to_string();
        assert!(error.contains(&format!("it is larger than {limit} bytes")), "{error}");
    }
    let reference = Client::parse("r.invalid/a/b").expect("a reference");
    let huge = client.blob(&reference, "sha256:00", u64::MAX).read_all(0..1 << 40, false).await;
    assert!(huge.expect_err("refused").to_string().contains("read into memory"));
}

const INSIDE: &str = "SLUICE_TEST_HELPER_IN_PATH";

/// Run again by itself with a PATH in which credential helpers stand.
#[tokio::test]
async fn credential_helpers() {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return with_helpers(Path::new(&dir)).await;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let helpers = [
        ("found", "printf '{\"Username\":\"user\",\"Secret\":\"pass\"}'"),
        ("identity", "printf '{\"Username\":\"<token>\",\"Secret\":\"re+fresh\"}'"),
        ("none", "echo credentials not found in native keychain; exit 1"),
        ("broken", "echo the secret is hidden; exit 1"),
    ];
    for (name, script) in helpers {
        let path = dir.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\n{script}\n")).expect("a file");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).expect("a mode");
    }
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").expect("a path"));
    let mut again = std::process::Command::new(std::env::current_exe().expect("this program"));
    again.args(["--exact", "credential_helpers"]).env("PATH", path).env(INSIDE, dir.path());
    let out = again.output().expect("a process");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

async fn with_helpers(dir: &Path) {
    for (helper, method, login) in
        [("found", "GET", Some("Basic dXNlcjpwYXNz")), ("identity", "POST", None), ("none", "GET", None)]
    {
        let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
        let fake = with_tokens(tiny.clone(), tokens, 300, usual).await;
        let text = format!("{{\"credHelpers\":{{\"{}\":\"{helper}\"}}}}", fake.address);
        assert_eq!(read(&with_docker(dir, &text), &fake, &tiny).await, Ok(true), "{helper}");
        let asked = &fake.seen("/token")[0];
        assert_eq!((asked.method.as_str(), asked.authorization.as_deref()), (method, login), "{helper}");
    }
    let (tiny, tokens) = (Tiny::new(), Arc::new(AtomicUsize::new(0)));
    let fake = with_tokens(tiny.clone(), tokens, 300, usual).await;
    let text = format!("{{\"credHelpers\":{{\"{}\":\"broken\"}}}}", fake.address);
    let error = read(&with_docker(dir, &text), &fake, &tiny).await.expect_err("broken");
    assert!(error.contains("docker-credential-broken failed") && !error.contains("hidden"), "{error}");
}

/// A registry that sends reads of the layer to `storage`, signed with a number that grows.
async fn redirecting(tiny: Tiny, storage: impl Fn(usize) -> String + Send + Sync + 'static) -> Fake {
    let number = AtomicUsize::new(0);
    let path = tiny.layer_path();
    Fake::start(move |seen| {
        if seen.authorization.as_deref() != Some("Basic dXNlcjpwYXNz") {
            return Reply::new(401, "").with("www-authenticate", "Basic realm=\"x\"");
        }
        if seen.target == path {
            let number = number.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::to(307, &format!("{}?sig=hidden-{number}", storage(number)));
        }
        if seen.is("/moved") { tiny.ranged(seen) } else { tiny.answer(seen) }
    })
    .await
}

fn logged_in(dir: &Path, fake: &Fake) -> Client {
    with_docker(dir, &auths(fake, "\"auth\":\"dXNlcjpwYXNz\""))
}

#[tokio::test]
async fn redirects_take_the_login_along_to_the_same_host_only() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let content = tiny.clone();
    let storage = Fake::start(move |seen| content.ranged(seen)).await;
    let away = storage.url("/bucket");
    let fake = redirecting(tiny.clone(), move |_| away.clone()).await;
    let client = logged_in(dir.path(), &fake);
    for _ in 0..3 {
        assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    }
    let there = storage.seen("");
    assert_eq!(there.len(), 3);
    assert!(there.iter().all(|one| one.authorization.is_none()), "{there:?}");
    // Asked once without and once with the password; after that the address is known.
    assert_eq!(fake.seen(&tiny.layer_path()).len(), 2);

    let same = redirecting(tiny.clone(), |_| "/moved".to_owned()).await;
    let client = logged_in(dir.path(), &same);
    assert_eq!(read(&client, &same, &tiny).await, Ok(true));
    let moved = same.seen("/moved");
    assert_eq!(moved.len(), 1);
    assert_eq!(moved[0].authorization.as_deref(), Some("Basic dXNlcjpwYXNz"));
}

#[tokio::test]
async fn a_known_address_that_is_dead_is_dropped_at_once() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let content = tiny.clone();
    let storage = Fake::start(move |seen| content.ranged(seen)).await;
    // A first storage that answers one request and is gone.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (first, second) =
        (format!("http://{}/x", listener.local_addr().expect("an address")), storage.url("/x"));
    let body = tiny.layer.slice(1000..2000);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut socket, _) = listener.accept().await.expect("a connection");
        drop(listener);
        let mut request = [0; 4096];
        assert!(socket.read(&mut request).await.expect("a request") > 0);
        let head = "HTTP/1.1 206 Partial Content\r\ncontent-length: 1000\r\ncontent-range: bytes 1000-1999/300000\r\nconnection: close\r\n\r\n";
        socket.write_all(&[head.as_bytes(), &body].concat()).await.expect("sent");
    });
    let fake =
        redirecting(tiny.clone(), move |number| if number == 1 { first.clone() } else { second.clone() })
            .await;
    let client = logged_in(dir.path(), &fake);
    assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    let begun = Instant::now();
    for _ in 0..3 {
        assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    }
    assert_eq!(storage.seen("").len(), 3);
    assert_eq!(fake.seen(&tiny.layer_path()).len(), 3, "without a password, with it, and anew");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_expired_address_is_asked_for_again_once() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let content = tiny.clone();
    let storage =
        Fake::start(
            move |seen| {
                if seen.is("hidden-1") { Reply::new(403, "expired") } else { content.ranged(seen) }
            },
        );
    let storage = storage.await;
    let away = storage.url("/bucket");
    let fake = redirecting(tiny.clone(), move |_| away.clone()).await;
    let client = logged_in(dir.path(), &fake);
    assert_eq!(read(&client, &fake, &tiny).await, Ok(true));
    assert_eq!(storage.seen("").len(), 2);

    // Always expired: it ends, and says so without the signature.
    let closed = Fake::start(|_| Reply::new(403, "expired")).await;
    let away = closed.url("/bucket");
    let fake = redirecting(tiny.clone(), move |_| away.clone()).await;
    let client = logged_in(dir.path(), &fake);
    let error = layer(&client, &fake, &tiny).read_all(0..10, false).await.expect_err("refused");
    assert_eq!(closed.seen("").len(), 2);
    let text = error.to_string();
    let wanted = format!(
        "{} answered 403 to blobs/{} of a/b; the registry's redirect led there",
        closed.address,
        digest(&tiny.layer)
    );
    assert!(text.starts_with(&wanted), "{text}");
    assert!(!error.is_transient() && error.may_pass());
}

#[tokio::test]
async fn no_secret_is_shown() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let content = tiny.clone();
    let storage = Fake::start(move |seen| content.ranged(seen)).await;
    let (up, gone) = (storage.url("/x"), format!("http://user:secret@{}/x", nobody().await));
    let fake =
        redirecting(tiny.clone(), move |number| if number == 1 { up.clone() } else { gone.clone() }).await;
    let client = logged_in(dir.path(), &fake);
    let blob = layer(&client, &fake, &tiny);
    blob.read_all(0..10, false).await.expect("read");
    let shown = format!("{client:?} {client:#?} {blob:?}");
    for secret in ["hidden", "secret", "dXNlcjpwYXNz", "pass"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    // The second address leads to nobody.
    let again = logged_in(dir.path(), &fake);
    let error = layer(&again, &fake, &tiny).read_all(0..10, false).await.expect_err("nobody");
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("hidden") && !shown.contains("secret"), "{shown}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn configured_headers_go_to_their_host_only() {
    let (tiny, dir) = (Tiny::new(), tempfile::tempdir().expect("a directory"));
    let content = tiny.clone();
    let storage = Fake::start(move |seen| content.ranged(seen)).await;
    let (away, content) = (storage.url("/x"), tiny.clone());
    let mirror = Fake::start(
        move |seen| {
            if seen.is("/blobs/") { Reply::to(307, &away) } else { content.answer(seen) }
        },
    );
    let mirror = mirror.await;
    let hosts = hosts(
        dir.path(),
        "127.0.0.1:1",
        &format!(
            "[host.\"{}\"]\n[host.\"{}\".header]\nAuthorization = \"Basic configured\"\nX-Own = [\"a\", \"b\"]\n",
            mirror.url(""),
            mirror.url("")
        ),
    );
    let client = client(RegistryConfig { hosts_dir: Some(hosts), ..RegistryConfig::default() });
    let reference = Client::parse("127.0.0.1:1/a/b:1").expect("a reference");
    let blob = client.blob(&reference, &digest(&tiny.layer), tiny.layer.len() as u64);
    blob.read_all(0..10, false).await.expect("read");
    let asked = mirror.seen("/blobs/");
    assert_eq!(asked[0].authorization.as_deref(), Some("Basic configured"));
    assert_eq!(asked[0].headers.get_all("x-own").iter().count(), 2);
    let there = storage.seen("");
    assert!(there[0].authorization.is_none() && !there[0].headers.contains_key("x-own"), "{there:?}");
}

fn hosts(dir: &Path, registry: &str, text: &str) -> PathBuf {
    let hosts = dir.join("hosts");
    std::fs::create_dir_all(hosts.join(registry)).expect("a directory");
    std::fs::write(hosts.join(registry).join("hosts.toml"), text).expect("a file");
    hosts
}
