//! What the tests of the embedded registry share: a server over a fresh directory, an HTTP client, a small image.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use reqwest::{Method, Response};
use sluice_registry_server::{Faults, Link, Server, ServerConfig};

/// A registry over a directory that goes away with it.
pub(crate) struct Registry {
    pub(crate) server: Server,
    pub(crate) http: reqwest::Client,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) async fn registry(link: Link) -> Registry {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path(), link).await;
    Registry { server, http: http(), dir }
}

pub(crate) async fn start(root: &Path, link: Link) -> Server {
    let listen = "127.0.0.1:0".parse().expect("an address");
    let config = ServerConfig {
        root: root.to_path_buf(),
        listen,
        link,
        faults: Faults::default(),
        referrers_api: true,
    };
    Server::start(config).await.expect("a server")
}

pub(crate) fn http() -> reqwest::Client {
    // Another test of this process may have been first.
    drop(rustls::crypto::ring::default_provider().install_default());
    reqwest::Client::builder()
        .timeout(Duration::from_secs(60))
        .pool_max_idle_per_host(0)
        .no_proxy()
        .build()
        .expect("a client")
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes)))
}

/// `len` bytes that do not repeat soon.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

impl Registry {
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address())
    }

    pub(crate) async fn ask(&self, method: Method, path: &str) -> Response {
        self.http.request(method, self.url(path)).send().await.expect("an answer")
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path).await
    }

    /// Pushes a blob to the repository `a/b`; its path.
    pub(crate) async fn push_blob(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let url = self.url(&format!("/v2/a/b/blobs/uploads/?digest={digest}"));
        let answer = self.http.post(url).body(bytes.to_vec()).send().await.expect("an answer");
        assert_eq!(answer.status(), 201);
        format!("/v2/a/b/blobs/{digest}")
    }

    /// Pushes a manifest to the repository `a/b`; its digest, or the status of the refusal.
    pub(crate) async fn push_manifest(&self, name: &str, manifest: &str) -> Result<String, u16> {
        let url = self.url(&format!("/v2/a/b/manifests/{name}"));
        let put = self.http.put(url).header("content-type", "application/vnd.oci.image.manifest.v1+json");
        let answer = put.body(manifest.to_owned()).send().await.expect("an answer");
        if answer.status().is_success() {
            Ok(digest(manifest.as_bytes()))
        } else {
            Err(answer.status().as_u16())
        }
    }
}

/// A manifest that differs with `name`, and may have a subject.
pub(crate) fn manifest(name: &str, subject: Option<&str>) -> String {
    let subject = subject.map(|digest| {
        format!(r#","artifactType":"test/x","subject":{{"mediaType":"m","digest":"{digest}","size":1}}"#)
    });
    format!(
        r#"{{"schemaVersion":2,"annotations":{{"name":"{name}"}},"layers":[]{}}}"#,
        subject.unwrap_or_default()
    )
}

/// Runs a program and gives its output; panics with what it said if it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let out =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments:?}: {}\n{said}", out.status);
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// An OCI layout with the image `a` of two gzip layers, made by umoci.
pub(crate) fn image(dir: &Path) -> PathBuf {
    let (layout, content) = (dir.join("made"), dir.join("content"));
    std::fs::create_dir_all(&content).expect("a directory");
    std::fs::write(content.join("noise"), noise(700_000)).expect("a file");
    std::fs::write(content.join("text"), "some text\n".repeat(50_000)).expect("a file");
    let tagged = format!("{}:a", layout.display());
    run("umoci", &["init", "--layout", &layout.display().to_string()]);
    run("umoci", &["new", "--image", &tagged]);
    for target in ["/first", "/second"] {
        run("umoci", &["insert", "--image", &tagged, &content.display().to_string(), target]);
    }
    layout
}
