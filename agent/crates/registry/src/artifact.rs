//! Where stream indexes live: beside the image as an OCI referrer, or in an object store.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use serde_json::json;

use crate::client::{Ask, Client, Needs};
use crate::image::sha256;
use crate::{Blob, RegistryError, ResolvedImage};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";
const MAX_DOCUMENT: usize = 4 << 20;

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
#[derive(Debug, Clone)]
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
#[derive(Debug, Clone)]
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
                let failed = move |error: object_store::Error| RegistryError::ObjectStore {
                    url: url.clone(),
                    reason: error.to_string(),
                };
                let opened = async move { store.get(&path).await.map(|found| found.into_stream()) };
                futures::stream::once(opened).try_flatten().map_err(failed).boxed()
            }
        }
    }

    /// A range, whole.
    pub async fn read_all(&self, range: std::ops::Range<u64>) -> Result<Bytes, RegistryError> {
        match self {
            Self::Registry(blob) => blob.read_all(range, false).await,
            Self::Object { store, path, url, .. } => store
                .get_range(path, range)
                .await
                .map_err(|error| RegistryError::ObjectStore { url: url.clone(), reason: error.to_string() }),
        }
    }
}

impl ArtifactStore {
    /// The object store at `url` (`file://`, `s3://`, `gs://`, `az://`); options as in `environment`, e.g. `AWS_REGION`.
    pub fn objects(
        url: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, RegistryError> {
        let failed = |reason: String| RegistryError::ObjectStore { url: url.to_owned(), reason };
        let parsed = url::Url::parse(url).map_err(|error| failed(error.to_string()))?;
        if let Some(dir) = url.strip_prefix("file://") {
            std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
        }
        let options = environment.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), value));
        let (store, prefix) =
            object_store::parse_url_opts(&parsed, options).map_err(|error| failed(error.to_string()))?;
        Ok(Self::Objects { store: store.into(), prefix, url: url.to_owned() })
    }

    /// The newest artifact of a kind for an image.
    pub async fn find(
        &self,
        image: &ResolvedImage,
        kind: Kind,
    ) -> Result<Option<Vec<(ArtifactBlob, ArtifactReader)>>, RegistryError> {
        match self {
            Self::Referrers(client) => client.find_artifact(image, kind).await,
            Self::Objects { store, prefix, url } => {
                let failed = |error: object_store::Error| RegistryError::ObjectStore {
                    url: url.clone(),
                    reason: error.to_string(),
                };
                let key = document_key(prefix, kind, &image.manifest_digest);
                let document = match store.get(&key).await {
                    Ok(found) => found.bytes().await.map_err(failed)?,
                    Err(object_store::Error::NotFound { .. }) => return Ok(None),
                    Err(error) => return Err(failed(error)),
                };
                let blobs = blobs_of(&document).ok_or_else(|| RegistryError::ObjectStore {
                    url: url.clone(),
                    reason: format!("{key} is not an artifact manifest"),
                })?;
                let with_reader = |blob: ArtifactBlob| {
                    let reader = ArtifactReader::Object {
                        store: Arc::clone(store),
                        path: blob_key(prefix, kind, &blob.digest),
                        url: url.clone(),
                        size: blob.size,
                    };
                    (blob, reader)
                };
                Ok(Some(blobs.into_iter().map(with_reader).collect()))
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
                let failed = |error: object_store::Error| RegistryError::ObjectStore {
                    url: url.clone(),
                    reason: error.to_string(),
                };
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

fn document_key(prefix: &ObjectPath, kind: Kind, manifest_digest: &str) -> ObjectPath {
    prefix.clone().join("sluice").join("v1").join(kind.name).join(manifest_digest.replace(':', "-"))
}

fn blob_key(prefix: &ObjectPath, kind: Kind, digest: &str) -> ObjectPath {
    prefix.clone().join("sluice").join("v1").join(kind.name).join("blobs").join(digest.replace(':', "-"))
}

fn blobs_of(manifest: &[u8]) -> Option<Vec<ArtifactBlob>> {
    let manifest: serde_json::Value = serde_json::from_slice(manifest).ok()?;
    let blobs = manifest.get("layers")?.as_array()?.iter().map(|layer| {
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

impl Client {
    async fn find_artifact(
        &self,
        image: &ResolvedImage,
        kind: Kind,
    ) -> Result<Option<Vec<(ArtifactBlob, ArtifactReader)>>, RegistryError> {
        let Some(index) = self.referrers(image, kind.artifact_type).await? else { return Ok(None) };
        let entries =
            index.get("manifests").and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
        let of_kind = |entry: &&serde_json::Value| {
            entry.get("artifactType").and_then(serde_json::Value::as_str) == Some(kind.artifact_type)
        };
        // The last one pushed stands last in both schemes.
        let Some(digest) = entries
            .iter()
            .rfind(of_kind)
            .and_then(|entry| entry.get("digest"))
            .and_then(serde_json::Value::as_str)
        else {
            return Ok(None);
        };
        let (manifest, _) = self.manifest(&image.reference, digest).await?;
        let blobs = blobs_of(&manifest).ok_or_else(|| RegistryError::Image {
            reference: image.reference.to_string(),
            reason: format!("its referrer {digest} is not an artifact manifest"),
        })?;
        let with_reader = |blob: ArtifactBlob| {
            let reader = ArtifactReader::Registry(self.blob(&image.reference, &blob.digest, blob.size));
            (blob, reader)
        };
        Ok(Some(blobs.into_iter().map(with_reader).collect()))
    }

    /// The referrers of an image: by the API, by the tag scheme where the registry has none.
    async fn referrers(
        &self,
        image: &ResolvedImage,
        artifact_type: &str,
    ) -> Result<Option<serde_json::Value>, RegistryError> {
        let filter: String = url::form_urlencoded::byte_serialize(artifact_type.as_bytes()).collect();
        let paths = [
            format!("referrers/{}?artifactType={filter}", image.manifest_digest),
            format!("manifests/{}", fallback_tag(&image.manifest_digest)),
        ];
        for path in paths {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(INDEX_TYPE));
            let ask = self.metadata(image, Method::GET, path, headers, None, Needs::Pull);
            match self.document(&ask, MAX_DOCUMENT).await {
                Ok((bytes, _)) => match serde_json::from_slice(&bytes) {
                    Ok(index) => return Ok(Some(index)),
                    Err(error) => tracing::debug!(%error, "the list of referrers is not JSON"),
                },
                Err(error) if error.is_not_found() => {}
                // Registries without the API answer all sorts of refusals to it.
                Err(RegistryError::Status { status, .. })
                    if (400..500).contains(&status) && status != 429 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn metadata<'a>(
        &self,
        image: &'a ResolvedImage,
        method: Method,
        path: String,
        headers: HeaderMap,
        body: Option<Bytes>,
        needs: Needs,
    ) -> Ask<'a> {
        Ask { method, reference: &image.reference, path, headers, body, needs, background: false }
    }

    async fn push_blob(&self, image: &ResolvedImage, bytes: Bytes) -> Result<(), RegistryError> {
        let digest = sha256(&bytes);
        let head = self.metadata(
            image,
            Method::HEAD,
            format!("blobs/{digest}"),
            HeaderMap::new(),
            None,
            Needs::Push,
        );
        if self.ask(&head).await.is_ok() {
            return Ok(());
        }
        let start = self.metadata(
            image,
            Method::POST,
            "blobs/uploads/".to_owned(),
            HeaderMap::new(),
            Some(Bytes::new()),
            Needs::Push,
        );
        let answer = self.ask(&start).await?;
        let wrong = |reason: &str| RegistryError::Protocol {
            host: answer.host.clone(),
            what: "the start of an upload".to_owned(),
            reason: reason.to_owned(),
        };
        let location = answer.response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| wrong("it gave no location"))?;
        let mut url =
            answer.response.url().join(location).map_err(|_| wrong("its location is no address"))?;
        url.query_pairs_mut().append_pair("digest", &digest);
        let url = url.to_string();
        drop(answer);
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        self.ask(&self.metadata(image, Method::PUT, url, headers, Some(bytes), Needs::Push)).await.map(|_| ())
    }

    async fn push_referrer(
        &self,
        image: &ResolvedImage,
        kind: Kind,
        manifest: Bytes,
    ) -> Result<(), RegistryError> {
        let digest = sha256(&manifest);
        let size = manifest.len();
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MANIFEST_TYPE));
        let put = self.metadata(
            image,
            Method::PUT,
            format!("manifests/{digest}"),
            headers,
            Some(manifest),
            Needs::Push,
        );
        let answer = self.ask(&put).await?;
        if answer.response.headers().contains_key("oci-subject") {
            return Ok(());
        }
        drop(answer);
        // The registry has no referrers API: the list is ours to keep, under a tag.
        let tag = fallback_tag(&image.manifest_digest);
        let mut list = match self.manifest(&image.reference, &tag).await {
            Ok((bytes, _)) => serde_json::from_slice(&bytes).unwrap_or_else(|_| empty_list()),
            Err(error) if error.is_not_found() => empty_list(),
            Err(error) => return Err(error),
        };
        if let Some(entries) = list.get_mut("manifests").and_then(serde_json::Value::as_array_mut) {
            entries.retain(|entry| entry.get("digest").and_then(serde_json::Value::as_str) != Some(&digest));
            entries.push(json!({
                "mediaType": MANIFEST_TYPE, "digest": digest, "size": size, "artifactType": kind.artifact_type,
            }));
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(INDEX_TYPE));
        let body = Some(Bytes::from(list.to_string()));
        let put = self.metadata(image, Method::PUT, format!("manifests/{tag}"), headers, body, Needs::Push);
        self.ask(&put).await.map(|_| ())
    }
}

fn empty_list() -> serde_json::Value {
    json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] })
}

/// The distribution specification's tag of an image's referrers.
fn fallback_tag(manifest_digest: &str) -> String {
    manifest_digest.replace(':', "-")
}
