//! Images: manifests, indexes, platforms, configurations.

use std::collections::HashMap;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use oci_spec::image::{Digest, ImageConfiguration, ImageIndex, ImageManifest};
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};

use crate::artifact::Kind;
use crate::client::{Ask, Client, Needs, Target};
use crate::platform::{Platform, candidates};
use crate::{Reference, RegistryError};

const MAX_MANIFEST: usize = 4 << 20;
const MAX_CONFIG: u64 = 8 << 20;
/// Indexes inside an index.
const MAX_DEPTH: u32 = 2;
const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                        application/vnd.docker.distribution.manifest.v2+json, \
                        application/vnd.docker.distribution.manifest.list.v2+json";

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// As the manifest says; often wrong about the compression.
    pub media_type: String,
    /// Of the uncompressed tar, from the configuration.
    pub diff_id: String,
    /// Of the layer, in the manifest.
    pub annotations: HashMap<String, String>,
}

/// An image that a reference names now.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// As asked.
    pub reference: Reference,
    /// Digest of the manifest of the chosen platform.
    pub manifest_digest: String,
    /// Media type of that manifest.
    pub media_type: String,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// The configuration's bytes.
    pub config: Bytes,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

impl ResolvedImage {
    /// From documents whose digests were checked.
    pub fn from_parts(
        reference: Reference,
        manifest_digest: String,
        manifest: Bytes,
        config: Bytes,
    ) -> Result<Self, RegistryError> {
        let bad = |reason: String| RegistryError::Image { reference: reference.to_string(), reason };
        let media_type = media_type_of(&manifest, &reference)?;
        let parsed: ImageManifest = parse(&manifest, &reference)?;
        let diff_ids = ImageConfiguration::from_reader(config.as_ref())
            .map_err(|error| bad(format!("its configuration is not valid: {error}")))?
            .rootfs()
            .diff_ids()
            .clone();
        if diff_ids.len() != parsed.layers().len() {
            return Err(
                bad("its manifest and its configuration have different numbers of layers".to_owned()),
            );
        }
        let layers = parsed.layers().iter().zip(diff_ids).map(|(layer, diff_id)| Layer {
            digest: layer.digest().to_string(),
            size: layer.size(),
            media_type: layer.media_type().to_string(),
            diff_id,
            annotations: layer.annotations().clone().unwrap_or_default(),
        });
        let layers = layers.collect();
        Ok(Self { reference, manifest_digest, media_type, manifest, config, layers })
    }
}

impl Client {
    /// Finds out what `reference` is now, for this machine's platform.
    pub async fn resolve(&self, reference: &Reference) -> Result<ResolvedImage, RegistryError> {
        self.resolve_with(reference, &[]).await
    }

    /// The same. What there is of these kinds of artifacts beside the image is asked for together with its configuration: who looks for
    /// them within some seconds has one round trip less to wait for.
    pub async fn resolve_with(
        &self,
        reference: &Reference,
        artifacts: &[Kind],
    ) -> Result<ResolvedImage, RegistryError> {
        let name = reference.digest().or(reference.tag()).unwrap_or("latest").to_owned();
        self.open_ahead(reference, artifacts.len());
        let (bytes, digest) = self.manifest(reference, &name).await?;
        if is_index(&media_type_of(&bytes, reference)?) {
            let found = self.choose(reference, bytes, artifacts, MAX_DEPTH).await?;
            return found.ok_or_else(|| RegistryError::Image {
                reference: reference.to_string(),
                reason: format!("it has no manifest for {}", Platform::own()),
            });
        }
        artifacts.iter().for_each(|kind| self.list_ahead(reference, &digest, *kind));
        let config = self.config(reference, &bytes).await?;
        ResolvedImage::from_parts(reference.clone(), digest, bytes, config)
    }

    /// The best image in an index for this machine; indexes may stand in indexes.
    fn choose<'a>(
        &'a self,
        reference: &'a Reference,
        index: Bytes,
        artifacts: &'a [Kind],
        depth: u32,
    ) -> BoxFuture<'a, Result<Option<ResolvedImage>, RegistryError>> {
        let choose = async move {
            let index: ImageIndex = parse(&index, reference)?;
            let machine = Platform::own();
            for entry in candidates(index.manifests(), &machine) {
                let (bytes, digest) = self.manifest(reference, entry.digest().as_ref()).await?;
                let media_type = media_type_of(&bytes, reference)?;
                if is_index(&media_type) {
                    let inner = if depth == 0 {
                        None
                    } else {
                        self.choose(reference, bytes, artifacts, depth - 1).await?
                    };
                    if inner.is_some() {
                        return Ok(inner);
                    }
                    continue;
                }
                // An entry without a platform may be anything: what its configuration says counts.
                if entry.platform().is_none() && !is_image(&bytes) {
                    continue;
                }
                artifacts.iter().for_each(|kind| self.list_ahead(reference, &digest, *kind));
                let config = self.config(reference, &bytes).await?;
                if entry.platform().is_some() || runs_on(&config, &machine) {
                    return ResolvedImage::from_parts(reference.clone(), digest, bytes, config).map(Some);
                }
            }
            Ok(None)
        };
        choose.boxed()
    }

    /// The configuration that a manifest names.
    async fn config(&self, reference: &Reference, manifest: &[u8]) -> Result<Bytes, RegistryError> {
        let manifest: ImageManifest = parse(manifest, reference)?;
        let (digest, size) = (manifest.config().digest(), manifest.config().size());
        if size > MAX_CONFIG {
            return Err(RegistryError::Image {
                reference: reference.to_string(),
                reason: "its configuration is larger than 8 MiB".to_owned(),
            });
        }
        let config = self.blob(reference, digest.as_ref(), size).read_all(0..size, false).await?;
        verify(&config, digest, &format!("the configuration of {reference}"))?;
        Ok(config)
    }

    /// A manifest's bytes and digest, checked if it was asked for by digest.
    pub(crate) async fn manifest(
        &self,
        reference: &Reference,
        name: &str,
    ) -> Result<(Bytes, String), RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(ACCEPTED));
        let ask = Ask {
            method: Method::GET,
            reference,
            target: Target::Path(format!("manifests/{name}")),
            headers,
            body: None,
            needs: if name.contains(':') { Needs::Pull } else { Needs::Resolve },
            background: false,
        };
        let bytes = self.document(&ask, MAX_MANIFEST).await?.bytes;
        let digest = sha256(&bytes);
        if let Ok(wanted) = name.parse::<Digest>() {
            verify(&bytes, &wanted, &format!("manifest {name}"))?;
            return Ok((bytes, name.to_owned()));
        }
        Ok((bytes, digest))
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], reference: &Reference) -> Result<T, RegistryError> {
    serde_json::from_slice(bytes).map_err(|error| RegistryError::Image {
        reference: reference.to_string(),
        reason: format!("its manifest is not valid: {error}"),
    })
}

fn media_type_of(bytes: &[u8], reference: &Reference) -> Result<String, RegistryError> {
    let value: serde_json::Value = parse(bytes, reference)?;
    if value.get("schemaVersion").and_then(serde_json::Value::as_u64) == Some(1) {
        return Err(RegistryError::Image {
            reference: reference.to_string(),
            reason: "it has a Docker manifest of schema 1, which no current runtime takes; push it again with a newer tool".to_owned(),
        });
    }
    let stated = value.get("mediaType").and_then(serde_json::Value::as_str);
    let implied = if value.get("manifests").is_some() {
        "application/vnd.oci.image.index.v1+json"
    } else {
        "application/vnd.oci.image.manifest.v1+json"
    };
    Ok(stated.unwrap_or(implied).to_owned())
}

fn is_index(media_type: &str) -> bool {
    media_type.contains("image.index") || media_type.contains("manifest.list")
}

/// Whether a manifest is one of an image, not of an artifact.
fn is_image(manifest: &[u8]) -> bool {
    let Ok(manifest) = serde_json::from_slice::<ImageManifest>(manifest) else { return false };
    let kind = manifest.config().media_type().to_string();
    manifest.artifact_type().is_none() && (kind.contains("image.config") || kind.contains("container.image"))
}

/// Whether an image whose configuration this is runs on a machine.
fn runs_on(config: &[u8], machine: &Platform) -> bool {
    let Ok(config) = ImageConfiguration::from_reader(config) else { return false };
    let variant = config.variant().as_deref().unwrap_or("");
    let own = Platform::new(&config.os().to_string(), &config.architecture().to_string(), variant);
    machine.runs().contains(&own)
}

/// `sha256:…` of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    format!("sha256:{}", hex::encode(digest))
}

fn verify(bytes: &[u8], digest: &Digest, what: &str) -> Result<(), RegistryError> {
    let algorithm = match digest.algorithm().as_ref() {
        "sha256" => &ring::digest::SHA256,
        "sha384" => &ring::digest::SHA384,
        "sha512" => &ring::digest::SHA512,
        other => {
            return Err(RegistryError::Config(format!("{what}: digests of kind {other} are not supported")));
        }
    };
    if hex::encode(ring::digest::digest(algorithm, bytes)) == digest.digest() {
        return Ok(());
    }
    Err(RegistryError::Digest { what: what.to_owned() })
}
