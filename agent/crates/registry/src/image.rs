//! Images: manifests, indexes, platforms, configurations.

use std::collections::HashMap;

use bytes::Bytes;
use oci_spec::image::{Arch, Digest, ImageConfiguration, ImageIndex, ImageManifest, Os};
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};

use crate::client::{Ask, Client, Needs};
use crate::{Reference, RegistryError};

const MAX_MANIFEST: usize = 4 << 20;
const MAX_CONFIG: u64 = 8 << 20;
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
        let name = reference.digest().or(reference.tag()).unwrap_or("latest").to_owned();
        let (mut bytes, mut digest) = self.manifest(reference, &name).await?;
        let media_type = media_type_of(&bytes, reference)?;
        if media_type.contains("image.index") || media_type.contains("manifest.list") {
            let index: ImageIndex = parse(&bytes, reference)?;
            let chosen = choose(&index, reference)?;
            (bytes, digest) = self.manifest(reference, &chosen).await?;
        }
        let manifest: ImageManifest = parse(&bytes, reference)?;
        let bad = |reason: String| RegistryError::Image { reference: reference.to_string(), reason };
        if manifest.config().size() > MAX_CONFIG {
            return Err(bad("its configuration is larger than 8 MiB".to_owned()));
        }
        let config_blob =
            self.blob(reference, &manifest.config().digest().to_string(), manifest.config().size());
        let config = config_blob.read_all(0..manifest.config().size(), false).await?;
        verify(&config, manifest.config().digest(), &format!("the configuration of {reference}"))?;
        ResolvedImage::from_parts(reference.clone(), digest, bytes, config)
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
            path: format!("manifests/{name}"),
            headers,
            body: None,
            needs: if name.contains(':') { Needs::Pull } else { Needs::Resolve },
            background: false,
        };
        let (bytes, _) = self.document(&ask, MAX_MANIFEST).await?;
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

fn choose(index: &ImageIndex, reference: &Reference) -> Result<String, RegistryError> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => Arch::Amd64,
        "aarch64" => Arch::ARM64,
        other => Arch::Other(other.to_owned()),
    };
    let fits = |entry: &&oci_spec::image::Descriptor| {
        entry
            .platform()
            .as_ref()
            .is_none_or(|platform| *platform.architecture() == arch && *platform.os() == Os::Linux)
    };
    let chosen = index.manifests().iter().find(fits);
    chosen.map(|entry| entry.digest().to_string()).ok_or_else(|| RegistryError::Image {
        reference: reference.to_string(),
        reason: format!("it has no manifest for linux/{arch}"),
    })
}

/// `sha256:…` of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    format!("sha256:{}", hex::encode(digest))
}

fn verify(bytes: &[u8], digest: &Digest, what: &str) -> Result<(), RegistryError> {
    let algorithm = match digest.algorithm().as_ref() {
        "sha256" => &ring::digest::SHA256,
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
