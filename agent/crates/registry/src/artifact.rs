//! Where stream indexes live: beside the image as an OCI referrer (`referrers`), or in an object store.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use serde_json::json;

use crate::blob::check_len;
use crate::image::sha256;
use crate::redact::without_secrets;
use crate::{Blob, Client, RegistryError, ResolvedImage};

/// When something was made; the newest referrer is the one that counts.
pub(crate) const CREATED: &str = "org.opencontainers.image.created";
/// The manifest's `layers`, as JSON. Lists of referrers repeat annotations: who has the list need not ask for the manifest.
pub(crate) const LAYERS: &str = "dev.sluice.artifact.layers";
/// Longer ones are not repeated: what the round trip costs, they would cost in every list.
const MAX_LAYERS: usize = 32 << 10;
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";
pub(crate) const MAX_DOCUMENT: usize = 4 << 20;

/// A blob of an artifact, to be published or found.
#[derive(Debug, Clone)]
pub struct ArtifactBlob {
    /// Annotations of its descriptor.
    pub annotations: HashMap<String, String>,
    /// Digest.
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// Blobs of an artifact, with what reads them.
pub type Blobs = Vec<(ArtifactBlob, ArtifactReader)>;

/// A kind of artifact.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// `artifactType` of its manifest.
    pub artifact_type: &'static str,
    /// Media type of its blobs.
    pub blob_type: &'static str,
    /// Its name in object stores.
    pub name: &'static str,
}

/// Where artifacts live.
#[derive(Clone)]
pub enum ArtifactStore {
    /// Beside the image.
    Referrers(Client),
    /// Under a URL.
    Objects {
        /// The store.
        store: Arc<dyn ObjectStore>,
        /// Prefix of all keys.
        prefix: ObjectPath,
        /// For messages.
        url: String,
    },
}

/// A found blob that can be read by range.
#[derive(Clone)]
pub enum ArtifactReader {
    /// In the image's repository.
    Registry(Blob),
    /// In an object store.
    Object {
        /// The store.
        store: Arc<dyn ObjectStore>,
        /// The key.
        path: ObjectPath,
        /// For messages.
        url: String,
        /// Bytes.
        size: u64,
    },
}

// Object stores' own Debug shows keys and tokens.
impl fmt::Debug for ArtifactStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Referrers(_) => formatter.write_str("Referrers"),
            Self::Objects { url, .. } => formatter.debug_tuple("Objects").field(url).finish(),
        }
    }
}

impl fmt::Debug for ArtifactReader {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(blob) => formatter.debug_tuple("Registry").field(blob).finish(),
            Self::Object { path, url, size, .. } => {
                formatter.debug_tuple("Object").field(url).field(path).field(size).finish()
            }
        }
    }
}

impl ArtifactReader {
    /// Bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Registry(blob) => blob.size(),
            Self::Object { size, .. } => *size,
        }
    }

    /// All of it, as it arrives. An error ends the stream.
    pub fn read(&self) -> BoxStream<'static, Result<Bytes, RegistryError>> {
        match self {
            Self::Registry(blob) => blob.read(0..blob.size(), false),
            Self::Object { store, path, url, .. } => {
                let (store, path, url) = (Arc::clone(store), path.clone(), url.clone());
                let failed = move |error: object_store::Error| failed(&url, &error);
                let opened = async move { store.get(&path).await.map(|found| found.into_stream()) };
                futures::stream::once(opened).try_flatten().map_err(failed).boxed()
            }
        }
    }

    /// A range, whole.
    pub async fn read_all(&self, range: std::ops::Range<u64>) -> Result<Bytes, RegistryError> {
        match self {
            Self::Registry(blob) => blob.read_all(range, false).await,
            Self::Object { store, path, url, .. } => {
                check_len(&range, &format!("object {path}"))?;
                store.get_range(path, range).await.map_err(|error| failed(url, &error))
            }
        }
    }
}

impl ArtifactStore {
    /// The object store at `url` (`file://`, `s3://`, `gs://`, `az://`); options as in `environment`, e.g. `AWS_REGION`.
    pub fn objects(
        url: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, RegistryError> {
        let shown = without_secrets(url);
        let bad =
            |reason: String| RegistryError::ObjectStore { url: shown.clone(), reason, transient: false };
        let parsed = url::Url::parse(url).map_err(|error| bad(error.to_string()))?;
        if let Some(dir) = url.strip_prefix("file://") {
            std::fs::create_dir_all(dir).map_err(|error| bad(error.to_string()))?;
        }
        let options = environment.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), value));
        let (store, prefix) =
            object_store::parse_url_opts(&parsed, options).map_err(|error| failed(&shown, &error))?;
        Ok(Self::Objects { store: store.into(), prefix, url: shown })
    }

    /// The newest artifact of a kind for an image.
    pub async fn find(&self, image: &ResolvedImage, kind: Kind) -> Result<Option<Blobs>, RegistryError> {
        Ok(self.find_some(image, kind, 1).await?.into_iter().next())
    }

    /// The newest artifacts of a kind for an image, at most `limit`, newest first. An object store has one at most. One that cannot
    /// be read hides no older one, but is an error if there is no other.
    pub async fn find_some(
        &self,
        image: &ResolvedImage,
        kind: Kind,
        limit: usize,
    ) -> Result<Vec<Blobs>, RegistryError> {
        match self {
            Self::Referrers(client) => {
                let mut found = Vec::new();
                let mut failed = None;
                for listed in client.artifacts(image, kind).await?.iter().take(limit) {
                    match client.artifact(image, listed).await {
                        Ok(blobs) => found.push(blobs),
                        Err(error) => {
                            tracing::debug!(digest = listed.digest, %error, "an artifact cannot be read");
                            failed.get_or_insert(error);
                        }
                    }
                }
                match failed {
                    Some(error) if found.is_empty() => Err(error),
                    _ => Ok(found),
                }
            }
            Self::Objects { store, prefix, url } => {
                Ok(find_object(store, prefix, url, image, kind).await?.into_iter().collect())
            }
        }
    }

    /// Publishes an artifact for an image. Returns the digest of its manifest.
    pub async fn publish(
        &self,
        image: &ResolvedImage,
        kind: Kind,
        blobs: Vec<(HashMap<String, String>, Bytes)>,
    ) -> Result<String, RegistryError> {
        let layers: Vec<serde_json::Value> = blobs
            .iter()
            .map(|(annotations, bytes)| {
                json!({ "mediaType": kind.blob_type, "digest": sha256(bytes), "size": bytes.len(), "annotations": annotations })
            })
            .collect();
        let mut annotations = HashMap::from([(CREATED, now())]);
        let repeated = json!(layers).to_string();
        if repeated.len() <= MAX_LAYERS {
            annotations.insert(LAYERS, repeated);
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": kind.artifact_type,
            "config": { "mediaType": EMPTY_TYPE, "digest": sha256(EMPTY), "size": EMPTY.len() },
            "layers": layers,
            "subject": {
                "mediaType": image.media_type,
                "digest": image.manifest_digest,
                "size": image.manifest.len(),
            },
            "annotations": annotations,
        });
        let manifest = Bytes::from(manifest.to_string());
        let digest = sha256(&manifest);
        match self {
            Self::Referrers(client) => {
                client.push_blob(image, Bytes::from_static(EMPTY)).await?;
                for (_, bytes) in blobs {
                    client.push_blob(image, bytes).await?;
                }
                client.push_referrer(image, kind, manifest).await?;
            }
            Self::Objects { store, prefix, url } => {
                let failed = |error: object_store::Error| failed(url, &error);
                for (_, bytes) in blobs {
                    let key = blob_key(prefix, kind, &sha256(&bytes));
                    store.put(&key, bytes.into()).await.map_err(failed)?;
                }
                let key = document_key(prefix, kind, &image.manifest_digest);
                store.put(&key, manifest.into()).await.map_err(failed)?;
            }
        }
        Ok(digest)
    }
}

async fn find_object(
    store: &Arc<dyn ObjectStore>,
    prefix: &ObjectPath,
    url: &str,
    image: &ResolvedImage,
    kind: Kind,
) -> Result<Option<Blobs>, RegistryError> {
    let failed = |error: object_store::Error| failed(url, &error);
    let key = document_key(prefix, kind, &image.manifest_digest);
    let wrong = |reason: String| RegistryError::ObjectStore {
        url: url.to_owned(),
        reason: format!("{key} {reason}"),
        transient: false,
    };
    let document = match store.get(&key).await {
        Ok(found) if found.meta.size > MAX_DOCUMENT as u64 => {
            return Err(wrong(format!("is larger than {MAX_DOCUMENT} bytes")));
        }
        Ok(found) => found.bytes().await.map_err(failed)?,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let blobs = blobs_of(&document).ok_or_else(|| wrong("is not an artifact manifest".to_owned()))?;
    let with_reader = |blob: ArtifactBlob| {
        let reader = ArtifactReader::Object {
            store: Arc::clone(store),
            path: blob_key(prefix, kind, &blob.digest),
            url: url.to_owned(),
            size: blob.size,
        };
        (blob, reader)
    };
    Ok(Some(blobs.into_iter().map(with_reader).collect()))
}

/// An object store's error, without the addresses that were asked, which may be signed.
fn failed(url: &str, error: &object_store::Error) -> RegistryError {
    let transient =
        matches!(error, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. });
    RegistryError::ObjectStore { url: url.to_owned(), reason: without_secrets(&error.to_string()), transient }
}

/// `sha256:…` of a blob.
pub fn digest(bytes: &[u8]) -> String {
    sha256(bytes)
}

/// RFC 3339, as annotations want it.
fn now() -> String {
    chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now())
        .to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

fn document_key(prefix: &ObjectPath, kind: Kind, manifest_digest: &str) -> ObjectPath {
    prefix.clone().join("sluice").join("v1").join(kind.name).join(manifest_digest.replace(':', "-"))
}

fn blob_key(prefix: &ObjectPath, kind: Kind, digest: &str) -> ObjectPath {
    prefix.clone().join("sluice").join("v1").join(kind.name).join("blobs").join(digest.replace(':', "-"))
}

/// The blobs of an artifact's manifest.
pub(crate) fn blobs_of(manifest: &[u8]) -> Option<Vec<ArtifactBlob>> {
    let manifest: serde_json::Value = serde_json::from_slice(manifest).ok()?;
    blobs_among(manifest.get("layers")?)
}

/// The blobs of a manifest's `layers`.
pub(crate) fn blobs_among(layers: &serde_json::Value) -> Option<Vec<ArtifactBlob>> {
    let blobs = layers.as_array()?.iter().map(|layer| {
        let annotations = layer.get("annotations").and_then(serde_json::Value::as_object);
        Some(ArtifactBlob {
            digest: layer.get("digest")?.as_str()?.to_owned(),
            size: layer.get("size")?.as_u64()?,
            annotations: annotations
                .into_iter()
                .flatten()
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect(),
        })
    });
    blobs.collect()
}
