//! Registry client: references, authentication, manifests, referrers, ranged blob reads.
//!
//! Metadata goes over the same ranged, mirrored, bounded requests as blobs, so this is built on reqwest and oci-spec's types;
//! oci-client keeps its tokens and its HTTP client to itself, and could not share them with ranged reads.

pub mod artifact;
mod auth;
mod blob;
mod challenge;
mod client;
mod error;
mod health;
mod hosts;
mod image;
mod observe;
#[doc(hidden)]
pub mod outside;
mod platform;
mod redact;
mod reference;
mod referrers;
mod transport;

pub use auth::{CredentialSource, Credentials};
pub use blob::Blob;
pub use client::{Client, Limits, RegistryConfig, install_crypto};
pub use error::RegistryError;
pub use image::{Layer, ResolvedImage};
pub use observe::{Observer, observed};
pub use oci_spec::distribution::Reference;
pub use redact::Secret;
