//! The parsers of what registries and files of others say, one call each: for the fuzz targets, which have no network.

use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};

use crate::challenge::Challenge;
use crate::{Credentials, RegistryError, auth, health, hosts, referrers};

/// What a `WWW-Authenticate` header is taken for: the realm of a token server, empty for a password; `None` if it is nothing known.
pub fn challenge(header: &[u8]) -> Option<String> {
    match Challenge::of(&headers(WWW_AUTHENTICATE, header)?)? {
        Challenge::Basic => Some(String::new()),
        Challenge::Bearer { realm, .. } => Some(realm),
    }
}

/// The pause that a `Retry-After` header asks for.
pub fn retry_after(header: &[u8]) -> Option<Duration> {
    health::retry_after(&headers(RETRY_AFTER, header)?, SystemTime::UNIX_EPOCH)
}

fn headers(name: reqwest::header::HeaderName, value: &[u8]) -> Option<HeaderMap> {
    // What no HTTP client hands on is no header.
    let value = HeaderValue::from_bytes(value).ok()?;
    Some(HeaderMap::from_iter([(name, value)]))
}

/// Addresses of the endpoints that a `hosts.toml` gives for a registry.
pub fn hosts(file: &Path, registry: &str) -> Result<Vec<String>, RegistryError> {
    Ok(hosts::read(Some(file), registry, false)?.into_iter().map(|endpoint| endpoint.base).collect())
}

/// Credentials from Docker's configuration.
pub fn docker_login(file: &Path, registry: &str) -> Result<Option<Credentials>, RegistryError> {
    auth::credentials(Some(file), registry)
}

/// Digests of the referrers of a kind in a list, the newest first.
pub fn referrers(list: &[u8], artifact_type: &str) -> Vec<String> {
    let Some((_, entries)) = referrers::list(list) else { return Vec::new() };
    referrers::newest_first(&entries, artifact_type).map(|listed| listed.digest).collect()
}
