//! Images for the tests, written as OCI layouts: the node's own tools, and files that show what layers can do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

/// Tools of every image: a shell, and what lists files in the same words everywhere.
const TOOLS: [&str; 8] = ["sh", "cat", "find", "sha256sum", "sleep", "ls", "mv", "touch"];

/// One layer in the making.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn file(mut self, path: &str, bytes: &[u8], mode: u32, owner: u64) -> Self {
        let mut header = header(tar::EntryType::Regular, mode, owner);
        header.set_size(bytes.len() as u64);
        self.0.append_data(&mut header, path, bytes).unwrap();
        self
    }

    pub(crate) fn text(self, path: &str, text: &str) -> Self {
        self.file(path, text.as_bytes(), 0o644, 0)
    }

    pub(crate) fn dir(mut self, path: &str, mode: u32) -> Self {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        self.0.append_data(&mut header, path, std::io::empty()).unwrap();
        self
    }

    /// A link; a hard link's header repeats mode and owner of its target, as tar writes it.
    pub(crate) fn link(
        mut self,
        kind: tar::EntryType,
        path: &str,
        target: &str,
        mode: u32,
        owner: u64,
    ) -> Self {
        let mut header = header(kind, mode, owner);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub(crate) fn whiteout(self, path: &str) -> Self {
        let path = Path::new(path);
        let name = format!(".wh.{}", path.file_name().unwrap().to_str().unwrap());
        self.text(path.with_file_name(name).to_str().unwrap(), "")
    }

    /// The shell and its friends, with their libraries.
    pub(crate) fn tools(mut self) -> Self {
        for dir in ["bin/", "lib/", "lib64/", "etc/", "tmp/", "proc/", "dev/", "sys/"] {
            self = self.dir(dir, 0o755);
        }
        let mut copied: Vec<PathBuf> = Vec::new();
        for tool in TOOLS {
            let path = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool));
            let path = path.iter().find(|path| path.exists()).expect(tool).canonicalize().unwrap();
            self = self.file(&format!("bin/{tool}"), &std::fs::read(&path).unwrap(), 0o755, 0);
            for library in libraries(&path) {
                if !copied.contains(&library) {
                    let target = library.to_str().unwrap().trim_start_matches('/').to_owned();
                    self = self.file(&target, &std::fs::read(&library).unwrap(), 0o755, 0);
                    copied.push(library);
                }
            }
        }
        self
    }
}

fn header(kind: tar::EntryType, mode: u32, owner: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_mtime(1_700_000_000);
    header.set_size(0);
    header
}

/// Shared libraries of a program, by the paths that its loader uses.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// A directory of OCI layouts.
pub(crate) struct Layouts {
    pub(crate) dir: PathBuf,
}

impl Layouts {
    /// Writes an image as `name:latest`; bytes of its layer blobs.
    pub(crate) fn add(&self, name: &str, layers: Vec<Layer>, command: &[&str]) -> u64 {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let (mut diff_ids, mut descriptors, mut total) = (Vec::new(), Vec::new(), 0);
        for layer in layers {
            let tar = layer.0.into_inner().unwrap();
            diff_ids.push(json!(digest(&tar)));
            let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
            gzip.write_all(&tar).unwrap();
            let blob = gzip.finish().unwrap();
            total += blob.len() as u64;
            descriptors.push(put(&dir, &blob, "application/vnd.oci.image.layer.v1.tar+gzip"));
        }
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Env": ["PATH=/bin"], "Cmd": command },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put(&dir, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": descriptors,
        });
        let mut entry =
            put(&dir, manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
        total
    }
}

fn put(dir: &Path, bytes: &[u8], media_type: &str) -> Value {
    let digest = digest(bytes);
    std::fs::write(dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:")), bytes).unwrap();
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes)))
}

/// Layers with whiteouts, an opaque directory, links over layers, owners and modes.
pub(crate) fn varied(seed: u64) -> Vec<Layer> {
    let (hard, soft) = (tar::EntryType::Link, tar::EntryType::Symlink);
    let base = Layer::new()
        .tools()
        .text("etc/passwd", "root:x:0:0:root:/:/bin/sh\n")
        .dir("data/", 0o750)
        .file("data/kept", &noise(seed, 300_000), 0o640, 7)
        // Within one layer: containerd's own unpacking cannot link to a lower one.
        .link(hard, "data/linked", "data/kept", 0o640, 7)
        .text("data/removed", "gone")
        .dir("opaque/", 0o755)
        .text("opaque/below", "hidden");
    let middle = Layer::new()
        .whiteout("data/removed")
        .dir("opaque/", 0o711)
        .text("opaque/.wh..wh..opq", "")
        .text("opaque/above", "seen")
        .link(soft, "data/pointing", "kept", 0o777, 0)
        .file("suid", b"#!/bin/sh\n", 0o4755, 0);
    let top = Layer::new().file("big", &noise(seed + 1, 8 << 20), 0o600, 0).text("data/top", "the top\n");
    vec![base, middle, top]
}
