//! OCI image layouts on disk: blobs by digest, manifests by the tags of `index.json`.
//!
//! Files appear by rename, whole or not at all. What cannot be read is an error, never taken for empty: it would be overwritten.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Larger files are no manifests.
pub(crate) const MAX_MANIFEST: usize = 4 << 20;

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
        let single = root.join("oci-layout").exists();
        let layouts = Self { root: root.to_path_buf(), single, writing: Mutex::default() };
        layouts.remove_stale_sessions()?;
        Ok(layouts)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
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

    pub(crate) fn has_repository(&self, repository: &str) -> bool {
        self.dir(repository).is_some_and(|dir| dir.join("oci-layout").exists())
    }

    /// Path of a blob; `None` if repository or digest are not well formed.
    pub(crate) fn blob(&self, repository: &str, digest: &str) -> Option<PathBuf> {
        let (algorithm, hex) = digest.split_once(':')?;
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        (plain(algorithm) && plain(hex)).then_some(())?;
        Some(self.dir(repository)?.join("blobs").join(algorithm).join(hex))
    }

    /// A repository's `index.json`; empty if there is none yet.
    fn index(&self, repository: &str) -> io::Result<Index> {
        let none = || json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] });
        let Some(dir) = self.dir(repository) else { return Index::of(none()) };
        let text = match fs::read(dir.join("index.json")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Index::of(none()),
            Err(error) => return Err(error),
        };
        let damaged = |why: String| {
            let text = format!("index.json of {repository} is damaged ({why}): repair or remove it");
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let document = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        Index::of(document).map_err(|error| damaged(error.to_string()))
    }

    /// Digest and media type of a manifest by tag or digest.
    pub(crate) fn manifest(&self, repository: &str, name: &str) -> io::Result<Option<(String, String)>> {
        let entries = self.index(repository)?.entries;
        let found = if name.contains(':') {
            entries.iter().find(|entry| digest_of(entry) == Some(name))
        } else {
            // A layout with one image and no tag serves it under every tag.
            entries.iter().rfind(|entry| tag_of(entry) == Some(name)).or(match entries.as_slice() {
                [only] if only.get("annotations").is_none() => Some(only),
                _ => None,
            })
        };
        let stated = found.and_then(|entry| entry.get("mediaType")).and_then(Value::as_str);
        // By digest also what the index does not list: manifests inside an image index.
        let Some(digest) = found.map_or(name.contains(':').then_some(name), digest_of) else {
            return Ok(None);
        };
        let Some(manifest) = self.stored(repository, digest)? else { return Ok(None) };
        let own = manifest.get("mediaType").and_then(Value::as_str);
        Ok(Some((digest.to_owned(), stated.or(own).unwrap_or(MANIFEST_TYPE).to_owned())))
    }

    /// A stored manifest; `None` if there is no such blob, or it is none.
    fn stored(&self, repository: &str, digest: &str) -> io::Result<Option<Value>> {
        let Some(path) = self.blob(repository, digest) else { return Ok(None) };
        let text = match fs::metadata(&path) {
            Ok(meta) if meta.len() > MAX_MANIFEST as u64 => return Ok(None),
            Ok(_) => fs::read(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let manifest: Option<Value> = serde_json::from_slice(&text).ok(); // Blobs of other kinds are not JSON.
        Ok(manifest.filter(|manifest| manifest.get("schemaVersion").is_some()))
    }

    /// Sorted.
    pub(crate) fn tags(&self, repository: &str) -> io::Result<Vec<String>> {
        let entries = self.index(repository)?.entries;
        let mut tags: Vec<String> = entries.iter().filter_map(tag_of).map(str::to_owned).collect();
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    /// Descriptors of the manifests whose subject is `digest`, oldest first.
    pub(crate) fn referrers(
        &self,
        repository: &str,
        digest: &str,
        artifact_type: Option<&str>,
    ) -> io::Result<Vec<Value>> {
        let mut found: Vec<Value> = Vec::new();
        for entry in self.index(repository)?.entries {
            let Some(own) = digest_of(&entry) else { continue };
            let Some(manifest) = self.stored(repository, own)? else { continue };
            let listed = found.iter().any(|one| digest_of(one) == Some(own));
            if listed || subject_of(&manifest) != Some(digest) {
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
        Ok(found)
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
        persist(from, &path)
    }

    /// A temporary file on the layout's disk.
    pub(crate) fn temporary(&self) -> io::Result<tempfile::NamedTempFile> {
        tempfile::Builder::new().prefix(".upload-").tempfile_in(&self.root)
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
        let manifest: Value = serde_json::from_slice(bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("no manifest: {error}")))?;
        let mut file = self.temporary()?;
        file.write_all(bytes)?;
        self.put_blob(repository, digest, file)?;
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut index = self.index(repository)?;
        let mut entry = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        index.entries.retain(|old| digest_of(old) != Some(digest) || tag_of(old).is_some());
        if name.contains(':') {
            if !index.entries.iter().any(|old| digest_of(old) == Some(digest)) {
                // Not without annotations: a lone entry without any is served under every tag.
                entry["annotations"] = json!({});
                index.entries.push(entry);
            }
        } else {
            self.untag(repository, &mut index, name)?;
            entry["annotations"] = json!({ REF_NAME: name });
            index.entries.push(entry);
        }
        self.write_index(repository, index)?;
        Ok(subject_of(&manifest).map(str::to_owned))
    }

    /// Takes a tag out of the index, or a manifest out of the repository; says whether it was there.
    pub(crate) fn delete_manifest(&self, repository: &str, name: &str) -> io::Result<bool> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut index = self.index(repository)?;
        if !name.contains(':') {
            let found = self.untag(repository, &mut index, name)?;
            return if found { self.write_index(repository, index).map(|()| true) } else { Ok(false) };
        }
        let before = index.entries.len();
        index.entries.retain(|entry| digest_of(entry) != Some(name));
        if index.entries.len() < before {
            self.write_index(repository, index)?;
        } else if self.stored(repository, name)?.is_none() {
            return Ok(false);
        }
        let path = self.blob(repository, name).ok_or(io::ErrorKind::InvalidInput)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(true),
        }
    }

    /// Takes a tag away. Its manifest stays listed, without it, if only the list makes it a referrer.
    fn untag(&self, repository: &str, index: &mut Index, tag: &str) -> io::Result<bool> {
        let Some(at) = index.entries.iter().position(|entry| tag_of(entry) == Some(tag)) else {
            return Ok(false);
        };
        let mut entry = index.entries.remove(at);
        let Some(digest) = digest_of(&entry) else { return Ok(true) };
        let listed = index.entries.iter().any(|other| digest_of(other) == Some(digest));
        let refers = self.stored(repository, digest)?.is_some_and(|manifest| subject_of(&manifest).is_some());
        if refers && !listed {
            if let Some(entry) = entry.as_object_mut() {
                entry.insert("annotations".to_owned(), json!({}));
            }
            index.entries.insert(at, entry);
        }
        Ok(true)
    }

    fn write_index(&self, repository: &str, index: Index) -> io::Result<()> {
        let dir = self.dir(repository).ok_or(io::ErrorKind::InvalidInput)?;
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        file.write_all(index.into_document().to_string().as_bytes())?;
        persist(file, &dir.join("index.json"))
    }

    fn prepare(&self, repository: &str) -> io::Result<()> {
        let dir = self.dir(repository).ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(&dir)?;
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            let mut file = tempfile::NamedTempFile::new_in(&dir)?;
            file.write_all(b"{\"imageLayoutVersion\":\"1.0.0\"}")?;
            persist(file, &marker)?;
        }
        Ok(())
    }
}

/// Gives a finished file its name, readable for all, durable before it is seen.
fn persist(file: tempfile::NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// `index.json`, its entries apart from what else it says.
#[derive(Debug)]
struct Index {
    document: serde_json::Map<String, Value>,
    entries: Vec<Value>,
}

impl Index {
    fn of(document: Value) -> io::Result<Self> {
        let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        let Value::Object(mut document) = document else { return Err(wrong("it is no object")) };
        match document.remove("manifests") {
            Some(Value::Array(entries)) => Ok(Self { document, entries }),
            _ => Err(wrong("it has no list of manifests")),
        }
    }

    fn into_document(self) -> Value {
        let mut document = self.document;
        document.insert("manifests".to_owned(), Value::Array(self.entries));
        Value::Object(document)
    }
}

fn digest_of(entry: &Value) -> Option<&str> {
    entry.get("digest")?.as_str()
}

fn tag_of(entry: &Value) -> Option<&str> {
    entry.get("annotations")?.get(REF_NAME)?.as_str()
}

fn subject_of(manifest: &Value) -> Option<&str> {
    manifest.pointer("/subject/digest")?.as_str()
}
