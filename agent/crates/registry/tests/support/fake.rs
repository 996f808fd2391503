//! A registry that misbehaves as a test wants: every request is recorded, a function answers.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{ConnectInfo, Request};
use axum::response::Response;
use serde_json::json;
use sluice_registry::{Client, Reference};

use super::{digest, noise};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) authorization: Option<String>,
    /// The connection's other end.
    pub(crate) peer: SocketAddr,
    pub(crate) headers: axum::http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn is(&self, part: &str) -> bool {
        self.target.contains(part)
    }
}

/// What is answered.
pub(crate) struct Reply(Response);

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Body>) -> Self {
        Self(Response::builder().status(status).body(body.into()).expect("an answer"))
    }

    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.0.headers_mut().append(name, value.parse().expect("a value"));
        self
    }

    pub(crate) fn to(status: u16, location: &str) -> Self {
        Self::new(status, "").with("location", location)
    }
}

/// A server that stops with its test's runtime.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    pub(crate) async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (recorded, answer) = (Arc::clone(&seen), Arc::new(answer));
        let handler = move |ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request| {
            let (recorded, answer) = (Arc::clone(&recorded), Arc::clone(&answer));
            async move {
                let (head, body) = request.into_parts();
                let header = head.headers.get("authorization");
                let one = Seen {
                    method: head.method.to_string(),
                    target: head.uri.to_string(),
                    authorization: header.map(|value| value.to_str().expect("text").to_owned()),
                    peer,
                    headers: head.headers,
                    body: to_bytes(body, 64 << 20).await.expect("a body"),
                };
                recorded.lock().expect("a lock").push(one.clone());
                answer(&one).0
            }
        };
        let router = axum::Router::new().fallback(handler);
        let router = router.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, seen }
    }

    /// Requests whose path and query contain `part`.
    pub(crate) fn seen(&self, part: &str) -> Vec<Seen> {
        let seen = self.seen.lock().expect("a lock");
        seen.iter().filter(|one| one.is(part)).cloned().collect()
    }

    pub(crate) fn reference(&self) -> Reference {
        Client::parse(&format!("{}/a/b:1", self.address)).expect("a reference")
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// An image of one layer in memory.
#[derive(Debug, Clone)]
pub(crate) struct Tiny {
    pub(crate) layer: Bytes,
    pub(crate) config: Bytes,
    pub(crate) manifest: Bytes,
}

impl Tiny {
    pub(crate) fn new() -> Self {
        Self::of("amd64", "")
    }

    pub(crate) fn of(architecture: &str, variant: &str) -> Self {
        let layer = Bytes::from(noise(300_000));
        let config = json!({
            "architecture": architecture, "variant": variant, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        });
        let config = Bytes::from(config.to_string());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
            "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len() }],
        });
        Self { layer, config, manifest: Bytes::from(manifest.to_string()) }
    }

    pub(crate) fn layer_path(&self) -> String {
        format!("/v2/a/b/blobs/{}", digest(&self.layer))
    }

    /// What a registry that has it under every tag answers.
    pub(crate) fn answer(&self, seen: &Seen) -> Reply {
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        if seen.is("/referrers/") || seen.is("/manifests/sha256-") {
            return Reply::new(404, "");
        }
        if seen.is("/manifests/") {
            return Reply::new(200, self.manifest.clone()).with("content-type", manifest);
        }
        if seen.is(&digest(&self.config)) {
            return Reply::new(200, self.config.clone());
        }
        if seen.is(&digest(&self.layer)) { self.ranged(seen) } else { Reply::new(404, "") }
    }

    /// The layer, or the range of it that was asked for.
    pub(crate) fn ranged(&self, seen: &Seen) -> Reply {
        let header = seen.headers.get("range").map(|value| value.to_str().expect("text"));
        let Some((first, last)) = header.and_then(|header| header.strip_prefix("bytes=")?.split_once('-'))
        else {
            return Reply::new(200, self.layer.clone());
        };
        let (first, last) =
            (first.parse::<usize>().expect("a number"), last.parse::<usize>().expect("a number"));
        let range = format!("bytes {first}-{last}/{}", self.layer.len());
        Reply::new(206, self.layer.slice(first..=last)).with("content-range", &range)
    }
}

/// An address at which nobody listens.
pub(crate) async fn nobody() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address")
}
