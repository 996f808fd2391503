//! containerd's `hosts.toml`: which endpoints stand for a registry, in which order.
//!
//! Format: containerd `docs/hosts.md`. Keys read: `server`, and per `[host."URL"]` `capabilities`, `skip_verify`,
//! `override_path`, `header`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::RegistryError;

/// Where requests for a registry go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// URL that paths like `REPOSITORY/blobs/DIGEST` are added to, ending in `/`.
    pub(crate) base: String,
    /// Names by tag may be resolved here.
    pub(crate) resolve: bool,
    /// Content may be fetched here.
    pub(crate) pull: bool,
    /// Content may be pushed here.
    pub(crate) push: bool,
    /// Certificates are not checked.
    pub(crate) skip_verify: bool,
    /// Headers to send.
    pub(crate) headers: Vec<(String, String)>,
}

#[derive(Debug, Default, Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::map::Map<String, toml::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Host {
    capabilities: Option<Vec<String>>,
    skip_verify: bool,
    override_path: bool,
    header: BTreeMap<String, toml::Value>,
}

/// Endpoints for `registry`, from `dir/REGISTRY/hosts.toml` or `dir/_default/hosts.toml` if there, the registry itself last.
pub(crate) fn endpoints(
    dir: Option<&Path>,
    registry: &str,
    plain_http: bool,
) -> Result<Vec<Endpoint>, RegistryError> {
    let text = dir.and_then(|dir| {
        // containerd also looks for `HOST_PORT_`, for file systems that have no colons in names.
        let underscored = registry.replace(':', "_") + "_";
        let names = [registry.to_owned(), underscored, "_default".to_owned()];
        names.iter().find_map(|name| std::fs::read_to_string(dir.join(name).join("hosts.toml")).ok())
    });
    let file: HostsFile = match text {
        Some(text) => toml::from_str(&text).map_err(|error| {
            RegistryError::Config(format!("hosts.toml of {registry} is not valid: {error}"))
        })?,
        None => HostsFile::default(),
    };
    let mut endpoints = Vec::new();
    for (url, table) in file.host {
        let host: Host = table.try_into().map_err(|error| {
            RegistryError::Config(format!("hosts.toml of {registry}, host {url}: {error}"))
        })?;
        let has = |capability: &str| {
            host.capabilities.as_ref().is_none_or(|list| list.iter().any(|one| one == capability))
        };
        endpoints.push(Endpoint {
            base: base(&url, host.override_path),
            resolve: has("resolve"),
            pull: has("pull"),
            push: has("push"),
            skip_verify: host.skip_verify,
            headers: host.header.iter().flat_map(|(name, value)| header_values(name, value)).collect(),
        });
    }
    let own = file.server.unwrap_or_else(|| {
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        format!("{}://{host}", if plain_http { "http" } else { "https" })
    });
    endpoints.push(Endpoint {
        base: base(&own, false),
        resolve: true,
        pull: true,
        push: true,
        skip_verify: false,
        headers: Vec::new(),
    });
    Ok(endpoints)
}

fn base(url: &str, override_path: bool) -> String {
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let url = url.trim_end_matches('/');
    if override_path || url.ends_with("/v2") { format!("{url}/") } else { format!("{url}/v2/") }
}

fn header_values(name: &str, value: &toml::Value) -> Vec<(String, String)> {
    let texts = match value {
        toml::Value::String(text) => vec![text.clone()],
        toml::Value::Array(list) => list.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    };
    texts.into_iter().map(|text| (name.to_owned(), text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_first_in_the_files_order() {
        let dir = tempfile::tempdir().expect("dir");
        let registry = dir.path().join("docker.io");
        std::fs::create_dir(&registry).expect("create");
        let text = "server = \"https://registry-1.docker.io\"\n[host.\"https://mirror.example\"]\ncapabilities = [\"pull\"]\n\
                    [host.\"http://second:5000/v2/x\"]\noverride_path = true\nskip_verify = true\n";
        std::fs::write(registry.join("hosts.toml"), text).expect("write");
        let found = endpoints(Some(dir.path()), "docker.io", false).expect("endpoints");
        let bases: Vec<&str> = found.iter().map(|endpoint| endpoint.base.as_str()).collect();
        assert_eq!(bases.last(), Some(&"https://registry-1.docker.io/v2/"));
        assert_eq!(bases[..2], ["https://mirror.example/v2/", "http://second:5000/v2/x/"]);
        assert!(found.iter().any(|endpoint| endpoint.pull && !endpoint.resolve));
        let plain = endpoints(None, "localhost:5000", true).expect("endpoints");
        assert_eq!(plain[0].base, "http://localhost:5000/v2/");
    }
}
