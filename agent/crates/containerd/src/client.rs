//! A pull through containerd's own API, for clients whose pull does not say what a remote snapshotter must know.
//!
//! It does what containerd's client does, with the labels that its CRI plugin would give: manifest and configuration go into the
//! content store, each layer is offered to the snapshotter first, and only what the snapshotter does not serve is
//! downloaded and unpacked. A lease keeps all of it from garbage collection until the image has its name.

mod pull;

use std::collections::HashMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::stream::BoxStream;
use thiserror::Error;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::proto::leases::leases_client::LeasesClient;
use crate::proto::leases::{CreateRequest, DeleteRequest};

use pull::Pull;

/// A lease that its owner could not delete ends by itself after this.
const LEASE_SECONDS: u64 = 24 * 3600;

/// Why an image could not be brought into containerd.
#[derive(Debug, Error)]
pub enum ClientError {
    /// containerd does not answer.
    #[error("cannot reach containerd at {socket}")]
    Connect {
        /// Its socket.
        socket: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// A name cannot stand in a request.
    #[error("`{name}` cannot be a namespace")]
    Namespace {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: tonic::metadata::errors::InvalidMetadataValue,
    },
    /// containerd refused.
    #[error("containerd cannot {action}: {}", source.message())]
    Refused {
        /// What it was asked to do.
        action: String,
        /// Its answer.
        source: Box<Status>,
    },
    /// A layer could not be downloaded.
    #[error("layer {digest}: {reason}")]
    Layer {
        /// Its digest.
        digest: String,
        /// Why.
        reason: String,
    },
}

fn refused(action: impl Into<String>) -> impl FnOnce(Status) -> ClientError {
    let action = action.into();
    move |status| ClientError::Refused { action, source: Box::new(status) }
}

/// A layer of the image that is pulled.
#[derive(Debug, Clone)]
pub struct PlannedLayer {
    /// Digest of its blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// As in the manifest.
    pub media_type: String,
    /// Digest of its tar.
    pub diff_id: String,
}

/// The image that is pulled, as the registry has it.
#[derive(Debug, Clone)]
pub struct PullPlan {
    /// Name that the image gets.
    pub reference: String,
    /// Host of the registry, for containerd's note of the source.
    pub registry: String,
    /// Repository, likewise.
    pub repository: String,
    /// Digest of the manifest of this platform.
    pub manifest_digest: String,
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub manifest: Bytes,
    /// Digest of the configuration.
    pub config_digest: String,
    /// Its bytes.
    pub config: Bytes,
    /// Lowest first.
    pub layers: Vec<PlannedLayer>,
    /// containerd's name of the snapshotter.
    pub snapshotter: String,
}

/// What a pull did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullReport {
    /// Layers that containerd had unpacked already.
    pub present: usize,
    /// Layers that the snapshotter serves.
    pub served: usize,
    /// Layers that were downloaded and unpacked.
    pub unpacked: usize,
}

/// Where layers come from that must be downloaded.
pub trait LayerSource: Send + Sync {
    /// The blob, whole.
    fn read(&self, layer: &PlannedLayer) -> BoxStream<'static, Result<Bytes, String>>;
}

/// Chain ids of layers with these diffIDs, lowest first (OCI image specification, "Layer ChainID").
pub fn chain_ids<'a>(diff_ids: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.to_owned(),
            Some(below) => {
                let text = format!("{below} {diff_id}");
                let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
                format!("sha256:{}", hex::encode(digest))
            }
        };
        chain.push(next);
    }
    chain
}

/// A containerd and a namespace of it.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

type Service = InterceptedService<Channel, Headers>;

#[derive(Debug, Clone)]
struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

impl Containerd {
    /// Connects to containerd's socket.
    pub async fn connect(socket: &Path, namespace: &str) -> Result<Self, ClientError> {
        let address = format!("unix://{}", socket.display());
        let failed = |source| ClientError::Connect { socket: socket.display().to_string(), source };
        let endpoint = tonic::transport::Endpoint::from_shared(address).map_err(failed)?;
        let channel = endpoint.connect().await.map_err(failed)?;
        let parsed = namespace.parse();
        let namespace =
            parsed.map_err(|source| ClientError::Namespace { name: namespace.to_owned(), source })?;
        Ok(Self { channel, namespace })
    }

    /// Brings the image in and gives it its name.
    pub async fn pull(
        &self,
        plan: &PullPlan,
        source: &dyn LayerSource,
        note: &mut (dyn FnMut(String) + Send),
    ) -> Result<PullReport, ClientError> {
        let mut leases = LeasesClient::new(self.service(None));
        let id = unique("pull");
        let expires = rfc3339(seconds_since_1970() + LEASE_SECONDS);
        let lease_labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let created = leases.create(CreateRequest { id: id.clone(), labels: lease_labels }).await;
        created.map_err(refused("make a lease"))?;
        let lease = id.parse().ok();
        let result = Pull { service: self.service(lease), plan, source }.run(note).await;
        // Synchronous: what a failed pull left is collected before the answer.
        let deleted = leases.delete(DeleteRequest { id, sync: result.is_err() }).await;
        let report = result?;
        deleted.map_err(refused("end its lease"))?;
        Ok(report)
    }

    fn service(&self, lease: Option<MetadataValue<Ascii>>) -> Service {
        let headers = Headers { namespace: self.namespace.clone(), lease };
        InterceptedService::new(self.channel.clone(), headers)
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A name that no other request has.
fn unique(what: &str) -> String {
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("sluice-{}-{nanoseconds:x} {what}", std::process::id()).replace(' ', "-")
}

/// A time in the form of RFC 3339, UTC.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970, counted in 400-year eras that begin in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339_says() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

    #[test]
    fn the_chain_begins_with_the_first_diff_id() {
        let ids = chain_ids(["sha256:a", "sha256:b"]);
        assert_eq!(ids[0], "sha256:a");
        let joined = ring::digest::digest(&ring::digest::SHA256, b"sha256:a sha256:b");
        assert_eq!(ids[1], format!("sha256:{}", hex::encode(joined)));
    }
}
