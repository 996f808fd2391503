//! What the tests of the registry client share: images, and registries to read them from.

pub(crate) mod fake;
pub(crate) mod real;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sluice_registry::artifact::Kind;
use sluice_registry::{Client, Limits, RegistryConfig};

pub(crate) const KIND: Kind =
    Kind { artifact_type: "application/vnd.test.v1", blob_type: "application/vnd.test.blob", name: "test" };

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

pub(crate) fn client(config: RegistryConfig) -> Client {
    let limits = Limits { backoff: Duration::from_millis(500), ..Limits::default() };
    Client::with_limits(config, limits).expect("a client")
}

/// Runs a program and gives its output; panics with what it said if it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).output();
    let out = out.unwrap_or_else(|error| panic!("{program}: {error}"));
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
