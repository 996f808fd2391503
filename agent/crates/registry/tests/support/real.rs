//! Registries that nobody here wrote: Debian's docker-registry, pushed to by skopeo.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::run;

/// A `docker-registry` process over a directory that goes away with it.
pub(crate) struct DockerRegistry {
    pub(crate) address: String,
    process: Child,
    _dir: tempfile::TempDir,
}

/// What is not usual about one.
#[derive(Default)]
pub(crate) struct Options<'a> {
    /// Contents of an htpasswd file.
    pub(crate) htpasswd: Option<&'a str>,
    /// Address of a token server, and the PEM file of the certificate its tokens are signed with.
    pub(crate) tokens: Option<(&'a str, &'a Path)>,
    /// Certificate and key, PEM files.
    pub(crate) tls: Option<(&'a Path, &'a Path)>,
}

impl DockerRegistry {
    pub(crate) fn start(options: &Options<'_>) -> Self {
        // Another process may take the port in between: then the next one.
        (0..5).find_map(|_| Self::try_start(options)).expect("a docker-registry that listens")
    }

    fn try_start(options: &Options<'_>) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        drop(listener);
        let mut config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  delete:\n    enabled: true\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {address}\n",
            dir.path().join("data").display()
        );
        if let Some((certificate, key)) = options.tls {
            let (certificate, key) = (certificate.display(), key.display());
            config += &format!("  tls:\n    certificate: {certificate}\n    key: {key}\n");
        }
        if let Some(text) = options.htpasswd {
            let path = dir.path().join("htpasswd");
            std::fs::write(&path, text).expect("a file");
            config += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display());
        }
        if let Some((realm, certificate)) = options.tokens {
            let certificate = certificate.display();
            config += &format!(
                "auth:\n  token:\n    realm: {realm}\n    service: the registry\n    issuer: test\n    rootcertbundle: {certificate}\n"
            );
        }
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).expect("a file");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry, a Debian package");
        let mut registry = Self { address, process, _dir: dir };
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(30) {
            if registry.process.try_wait().expect("its state").is_some() {
                return None;
            }
            if std::net::TcpStream::connect(&registry.address).is_ok() {
                return Some(registry);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait().map(|_| ())) {
            eprintln!("docker-registry does not end: {error}");
        }
    }
}

/// The forms in which skopeo pushes the image of a layout.
pub(crate) const FORMS: [&str; 3] = ["gzip", "zstd", "docker"];

/// Pushes a layout's image `a` in one of the forms to `ADDRESS/team/FORM:1`.
pub(crate) fn push(layout: &Path, form: &str, address: &str) {
    let remote = format!("docker://{address}/team/{form}:1");
    let source = format!("oci:{}:a", layout.display());
    let copy = ["copy", "--insecure-policy", "--dest-tls-verify=false"];
    match form {
        "docker" => run("skopeo", &[&copy[..], &["--format", "v2s2", &source, &remote]].concat()),
        "zstd" => {
            // In three steps: skopeo pushes gzip layers again as they are.
            let dir = tempfile::tempdir_in(layout.parent().expect("a directory")).expect("a directory");
            let plain = format!("dir:{}", dir.path().join("plain").display());
            let packed = format!("dir:{}", dir.path().join("zstd").display());
            run("skopeo", &["copy", "--insecure-policy", "--dest-decompress", &source, &plain]);
            let pack =
                ["--format", "oci", "--dest-compress", "--dest-compress-format", "zstd", &plain, &packed];
            run("skopeo", &[&["copy", "--insecure-policy"], &pack[..]].concat());
            run("skopeo", &[&copy[..], &["--preserve-digests", &packed, &remote]].concat())
        }
        _ => run("skopeo", &[&copy[..], &["--preserve-digests", &source, &remote]].concat()),
    };
}
