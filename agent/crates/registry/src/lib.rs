//! Registry client: references, authentication, manifests, referrers, ranged blob reads.
//!
//! Metadata goes over the same ranged, mirrored, bounded requests as blobs, so this is built on reqwest and oci-spec's types;
//! oci-client keeps its tokens and its HTTP client to itself, and could not share them with ranged reads.

pub mod artifact;
mod auth;
mod blob;
mod client;
mod hosts;
mod image;

pub use blob::Blob;
pub use client::{Client, RegistryConfig, install_crypto};
pub use image::{Layer, ResolvedImage};
pub use oci_spec::distribution::Reference;

/// Why a registry gave no answer that can be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The reference is malformed.
    #[error("`{reference}` is not an image reference: {reason}")]
    Reference {
        /// As given.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// The registry cannot be reached, or broke off.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The registry refused.
    #[error("{host} answered {status} to {what}{hint}")]
    Status {
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
        /// What was asked.
        what: String,
        /// What to do, beginning with `; `, or empty.
        hint: &'static str,
    },
    /// The registry answered something else than what was asked for.
    #[error("{host} answered {what} wrongly: {reason}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What was asked.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// What came has another digest.
    #[error("{what}: the bytes that came are not it (digest mismatch)")]
    Digest {
        /// What was asked.
        what: String,
    },
    /// The image cannot be used.
    #[error("{reference}: {reason}")]
    Image {
        /// The image.
        reference: String,
        /// Why not.
        reason: String,
    },
    /// Configuration or credentials cannot be used.
    #[error("{0}")]
    Config(String),
    /// An object store failed.
    #[error("object store {url}: {reason}")]
    ObjectStore {
        /// Its address.
        url: String,
        /// Why.
        reason: String,
    },
}

impl RegistryError {
    /// Whether trying again may help. Refused credentials may: tokens expire and are fetched anew.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Protocol { .. } => true,
            Self::Status { status, .. } => matches!(status, 401 | 403 | 408 | 425 | 429 | 500..=599),
            Self::ObjectStore { .. } => true,
            _ => false,
        }
    }

    /// Whether the registry says that it has no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: 404, .. })
    }
}
