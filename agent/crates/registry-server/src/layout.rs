//! OCI image layouts on disk: blobs by digest, manifests by the tags of `index.json`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Layouts under a root.
#[derive(Debug)]
pub(crate) struct Layouts {
    root: PathBuf,
    single: bool,
    /// `index.json` is read, changed and renamed under this.
    writing: Mutex<()>,
}

impl Layouts {
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        if !root.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a directory"));
        }
        Ok(Self {
            root: root.to_path_buf(),
            single: root.join("oci-layout").exists(),
            writing: Mutex::default(),
        })
    }

    /// The layout of a repository, whether it is there or not. `None` if the name is not allowed.
    fn dir(&self, repository: &str) -> Option<PathBuf> {
        let allowed = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte))
                && !part.starts_with('.')
        };
        if !repository.split('/').all(allowed) {
            return None;
        }
        Some(if self.single { self.root.clone() } else { self.root.join(repository) })
    }

    /// Path of a blob; `None` if repository or digest are not well formed.
    pub(crate) fn blob(&self, repository: &str, digest: &str) -> Option<PathBuf> {
        let (algorithm, hex) = digest.split_once(':')?;
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        (plain(algorithm) && plain(hex)).then_some(())?;
        Some(self.dir(repository)?.join("blobs").join(algorithm).join(hex))
    }

    /// The descriptor of a tag or digest in a repository's `index.json`.
    fn entries(&self, repository: &str) -> Vec<Value> {
        let text = self.dir(repository).and_then(|dir| fs::read(dir.join("index.json")).ok());
        let index: Option<Value> = text.and_then(|text| serde_json::from_slice(&text).ok());
        index.and_then(|index| index.get("manifests")?.as_array().cloned()).unwrap_or_default()
    }

    /// Digest and media type of a manifest by tag or digest.
    pub(crate) fn manifest(&self, repository: &str, name: &str) -> Option<(String, String)> {
        let entries = self.entries(repository);
        let field = |entry: &Value, name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        let tagged = |entry: &&Value| {
            entry.pointer(&format!("/annotations/{REF_NAME}")).and_then(Value::as_str) == Some(name)
        };
        let found = if name.contains(':') {
            entries.iter().find(|entry| field(entry, "digest").as_deref() == Some(name))
        } else {
            // A layout with one image and no tag serves it under every tag.
            entries.iter().rfind(tagged).or_else(|| match entries.as_slice() {
                [only] if only.get("annotations").is_none() => Some(only),
                _ => None,
            })
        };
        if let Some(entry) = found {
            let digest = field(entry, "digest")?;
            let media_type = field(entry, "mediaType").or_else(|| self.media_type(repository, &digest))?;
            return Some((digest, media_type));
        }
        // A manifest inside an image index, or a referrer.
        let digest = name.contains(':').then(|| name.to_owned())?;
        let media_type = self.media_type(repository, &digest)?;
        Some((digest, media_type))
    }

    fn media_type(&self, repository: &str, digest: &str) -> Option<String> {
        let path = self.blob(repository, digest)?;
        if fs::metadata(&path).ok()?.len() > 4 << 20 {
            return None;
        }
        let manifest: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        manifest.get("schemaVersion")?;
        let stated = manifest.get("mediaType").and_then(Value::as_str);
        Some(stated.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned())
    }

    pub(crate) fn tags(&self, repository: &str) -> Vec<String> {
        let tag = |entry: &Value| {
            entry.pointer(&format!("/annotations/{REF_NAME}")).and_then(Value::as_str).map(str::to_owned)
        };
        let mut tags: Vec<String> = self.entries(repository).iter().filter_map(tag).collect();
        tags.sort();
        tags.dedup();
        tags
    }

    /// Descriptors of the manifests whose subject is `digest`, oldest first.
    pub(crate) fn referrers(
        &self,
        repository: &str,
        digest: &str,
        artifact_type: Option<&str>,
    ) -> Vec<Value> {
        let mut found = Vec::new();
        for entry in self.entries(repository) {
            let Some(own) = entry.get("digest").and_then(Value::as_str) else { continue };
            let manifest = self.blob(repository, own).and_then(|path| fs::read(path).ok());
            let manifest: Option<Value> = manifest.and_then(|text| serde_json::from_slice(&text).ok());
            let Some(manifest) = manifest else { continue };
            if manifest.pointer("/subject/digest").and_then(Value::as_str) != Some(digest) {
                continue;
            }
            let kind = manifest
                .get("artifactType")
                .or_else(|| manifest.pointer("/config/mediaType"))
                .and_then(Value::as_str)
                .unwrap_or("");
            if artifact_type.is_none_or(|wanted| wanted == kind) {
                found.push(json!({
                    "mediaType": entry.get("mediaType"), "digest": own, "size": entry.get("size"),
                    "artifactType": kind, "annotations": manifest.get("annotations"),
                }));
            }
        }
        found
    }

    /// Stores a blob whose digest the caller has checked.
    pub(crate) fn put_blob(
        &self,
        repository: &str,
        digest: &str,
        from: tempfile::NamedTempFile,
    ) -> io::Result<()> {
        let path = self.blob(repository, digest).ok_or(io::ErrorKind::InvalidInput)?;
        self.prepare(repository)?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        from.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// A temporary file on the layout's disk.
    pub(crate) fn temporary(&self) -> io::Result<tempfile::NamedTempFile> {
        tempfile::Builder::new().prefix(".upload-").tempfile_in(&self.root)
    }

    /// The file of an upload session.
    pub(crate) fn session(&self, name: &str) -> Option<PathBuf> {
        let plain = name.strip_prefix(".upload-")?.bytes().all(|byte| byte.is_ascii_alphanumeric());
        plain.then(|| self.root.join(name))
    }

    /// Makes an upload session a blob; `false` if its bytes have another digest (they are removed then).
    pub(crate) fn take_session(&self, repository: &str, session: &str, digest: &str) -> io::Result<bool> {
        let path = self.session(session).ok_or(io::ErrorKind::NotFound)?;
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        let mut file = fs::File::open(&path)?;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let len = io::Read::read(&mut file, &mut buffer)?;
            let Some(bytes) = buffer.get(..len).filter(|bytes| !bytes.is_empty()) else { break };
            context.update(bytes);
        }
        if format!("sha256:{}", hex::encode(context.finish())) != digest {
            fs::remove_file(&path)?;
            return Ok(false);
        }
        let target = self.blob(repository, digest).ok_or(io::ErrorKind::InvalidInput)?;
        self.prepare(repository)?;
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(path, target)?;
        Ok(true)
    }

    /// Stores a manifest and names it; returns the digest of its subject.
    pub(crate) fn put_manifest(
        &self,
        repository: &str,
        name: &str,
        media_type: &str,
        bytes: &[u8],
        digest: &str,
    ) -> io::Result<Option<String>> {
        let mut file = self.temporary()?;
        file.write_all(bytes)?;
        self.put_blob(repository, digest, file)?;
        let manifest: Value = serde_json::from_slice(bytes)?;
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.entries(repository);
        let tag_of = |entry: &Value| {
            entry.pointer(&format!("/annotations/{REF_NAME}")).and_then(Value::as_str).map(str::to_owned)
        };
        let mut entry = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        if name.contains(':') {
            entries.retain(|old| {
                tag_of(old).is_some() || old.get("digest").and_then(Value::as_str) != Some(digest)
            });
        } else {
            entry["annotations"] = json!({ REF_NAME: name });
            entries.retain(|old| tag_of(old).as_deref() != Some(name));
        }
        entries.push(entry);
        self.write_index(repository, &entries)?;
        Ok(manifest.pointer("/subject/digest").and_then(Value::as_str).map(str::to_owned))
    }

    /// Takes a tag or a manifest out of the index; says whether it was there.
    pub(crate) fn delete_manifest(&self, repository: &str, name: &str) -> io::Result<bool> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.entries(repository);
        let before = entries.len();
        entries.retain(|entry| {
            let tag = entry.pointer(&format!("/annotations/{REF_NAME}")).and_then(Value::as_str);
            tag != Some(name) && entry.get("digest").and_then(Value::as_str) != Some(name)
        });
        if entries.len() == before {
            return Ok(false);
        }
        self.write_index(repository, &entries)?;
        Ok(true)
    }

    fn write_index(&self, repository: &str, entries: &[Value]) -> io::Result<()> {
        let dir = self.dir(repository).ok_or(io::ErrorKind::InvalidInput)?;
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries,
        });
        file.write_all(index.to_string().as_bytes())?;
        file.persist(dir.join("index.json")).map_err(|error| error.error)?;
        Ok(())
    }

    fn prepare(&self, repository: &str) -> io::Result<()> {
        let dir = self.dir(repository).ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(&dir)?;
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            fs::write(marker, "{\"imageLayoutVersion\":\"1.0.0\"}")?;
        }
        Ok(())
    }
}
