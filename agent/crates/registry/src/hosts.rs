//! containerd's `hosts.toml`: which endpoints stand for a registry, in which order.
//!
//! Format: containerd `docs/hosts.md`. Keys read: `server`, and per `[host."URL"]` `capabilities`, `skip_verify`,
//! `override_path`, `header`. A file is read when it is new or changed, not with each request.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::Deserialize;

use crate::RegistryError;
use crate::redact::{Secret, without_secrets};

/// Where requests for a registry go.
#[derive(Clone, PartialEq, Eq)]
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
    pub(crate) headers: Vec<(String, Secret)>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Endpoint").field("base", &without_secrets(&self.base)).finish_non_exhaustive()
    }
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

/// What tells whether a file changed: time of change and length; `None` if it is not there.
type Stamp = Option<(SystemTime, u64)>;

/// The tree of `hosts.toml` files, as far as it was asked for.
#[derive(Debug)]
pub(crate) struct Hosts {
    dir: Option<PathBuf>,
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Debug)]
struct Known {
    stamps: Vec<(PathBuf, Stamp)>,
    endpoints: Vec<Arc<Endpoint>>,
}

impl Hosts {
    pub(crate) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, known: Mutex::default() }
    }

    /// Endpoints for `registry`, from `DIR/REGISTRY/hosts.toml` or `DIR/_default/hosts.toml` if there, the registry itself
    /// last. A file that cannot be read or understood is an error that names it.
    pub(crate) fn endpoints(
        &self,
        registry: &str,
        plain_http: bool,
    ) -> Result<Vec<Arc<Endpoint>>, RegistryError> {
        // containerd also looks for `HOST_PORT_`, for file systems that have no colons in names.
        let underscored = registry.replace(':', "_") + "_";
        let names = [registry, &underscored, "_default"];
        let mut stamps = Vec::new();
        for dir in self.dir.iter() {
            for path in names.map(|name| dir.join(name).join("hosts.toml")) {
                let stamp = stamp(&path)?;
                stamps.push((path, stamp));
                if stamp.is_some() {
                    break;
                }
            }
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(registry).filter(|known| known.stamps == stamps) {
            return Ok(known.endpoints.clone());
        }
        let file = match stamps.last() {
            Some((path, Some(_))) => Some(path.as_path()),
            _ => None,
        };
        let endpoints: Vec<Arc<Endpoint>> =
            read(file, registry, plain_http)?.into_iter().map(Arc::new).collect();
        known.insert(registry.to_owned(), Known { stamps, endpoints: endpoints.clone() });
        Ok(endpoints)
    }
}

fn stamp(path: &Path) -> Result<Stamp, RegistryError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match std::fs::metadata(path).and_then(|meta| Ok((meta.modified()?, meta.len()))) {
        Ok(stamp) => Ok(Some(stamp)),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Ok(None),
        Err(error) => Err(RegistryError::Config(format!("{} cannot be read: {error}", path.display()))),
    }
}

pub(crate) fn read(
    file: Option<&Path>,
    registry: &str,
    plain_http: bool,
) -> Result<Vec<Endpoint>, RegistryError> {
    let bad = |why: String| {
        let path = file.map(Path::display).map(|path| path.to_string()).unwrap_or_default();
        RegistryError::Config(format!("{path}: {why}"))
    };
    let parsed = match file {
        Some(path) => {
            let text =
                std::fs::read_to_string(path).map_err(|error| bad(format!("cannot be read: {error}")))?;
            toml::from_str(&text).map_err(|error| bad(position(&text, &error)))?
        }
        None => HostsFile::default(),
    };
    let mut endpoints = Vec::new();
    for (url, table) in parsed.host {
        // Not the value, which may be a credential.
        let wrong = |error: toml::de::Error| {
            let first = error.message().split(':').next().unwrap_or("").to_owned();
            bad(format!("host {}: {first}", without_secrets(&url)))
        };
        for key in table.as_table().into_iter().flatten().map(|(key, _)| key) {
            if !["capabilities", "skip_verify", "override_path", "header"].contains(&key.as_str()) {
                let host = without_secrets(&url);
                tracing::warn!(registry, host, key, "hosts.toml: this key is not used");
            }
        }
        let host: Host = table.try_into().map_err(wrong)?;
        endpoints.push(endpoint(&url, &host).map_err(bad)?);
    }
    let own = parsed.server.unwrap_or_else(|| {
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        format!("{}://{host}", if plain_http { "http" } else { "https" })
    });
    let own = endpoint(&own, &Host::default()).map_err(bad)?;
    // A server that is listed as a host too is asked as the file says, once.
    if !endpoints.iter().any(|listed| listed.base == own.base && listed.resolve && listed.pull && listed.push)
    {
        endpoints.push(own);
    }
    Ok(endpoints)
}

/// Where a file is not TOML, without quoting it.
fn position(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
    format!("it is not a valid hosts.toml, line {}", before.matches('\n').count() + 1)
}

fn endpoint(url: &str, host: &Host) -> Result<Endpoint, String> {
    let has = |capability: &str| {
        host.capabilities.as_ref().is_none_or(|list| list.iter().any(|one| one == capability))
    };
    let base = base(url, host.override_path);
    url::Url::parse(&base).map_err(|error| format!("`{}` is no address: {error}", without_secrets(url)))?;
    let mut headers = Vec::new();
    for (name, value) in &host.header {
        headers.extend(header_values(name, value)?);
    }
    Ok(Endpoint {
        base,
        resolve: has("resolve"),
        pull: has("pull"),
        push: has("push"),
        skip_verify: host.skip_verify,
        headers,
    })
}

fn base(url: &str, override_path: bool) -> String {
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let url = url.trim_end_matches('/');
    if override_path || url.ends_with("/v2") { format!("{url}/") } else { format!("{url}/v2/") }
}

fn header_values(name: &str, value: &toml::Value) -> Result<Vec<(String, Secret)>, String> {
    let text = |value: &toml::Value| match value {
        toml::Value::String(text) => Ok((name.to_owned(), Secret(text.clone()))),
        _ => Err(format!("the header {name} is neither a text nor a list of texts")),
    };
    match value {
        toml::Value::Array(list) => list.iter().map(text).collect(),
        one => Ok(vec![text(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, registry: &str, text: &str) -> PathBuf {
        let path = dir.join(registry).join("hosts.toml");
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("create");
        std::fs::write(&path, text).expect("write");
        path
    }

    fn bases(hosts: &Hosts, registry: &str) -> Vec<String> {
        let found = hosts.endpoints(registry, false).expect("endpoints");
        found.iter().map(|endpoint| endpoint.base.clone()).collect()
    }

    #[test]
    fn mirrors_come_first_in_the_files_order() {
        let dir = tempfile::tempdir().expect("dir");
        let text = "server = \"https://registry-1.docker.io\"\n[host.\"https://mirror.example\"]\ncapabilities = [\"pull\"]\n\
                    [host.\"http://second:5000/v2/x\"]\noverride_path = true\nskip_verify = true\n";
        write(dir.path(), "docker.io", text);
        let hosts = Hosts::new(Some(dir.path().to_path_buf()));
        let found = hosts.endpoints("docker.io", false).expect("endpoints");
        let wanted =
            ["https://mirror.example/v2/", "http://second:5000/v2/x/", "https://registry-1.docker.io/v2/"];
        assert_eq!(bases(&hosts, "docker.io"), wanted);
        assert!(found[0].pull && !found[0].resolve && !found[0].push);
        let plain = Hosts::new(None).endpoints("localhost:5000", true).expect("endpoints");
        assert_eq!(plain[0].base, "http://localhost:5000/v2/");
    }

    #[test]
    fn a_file_is_read_again_when_it_changed() {
        let dir = tempfile::tempdir().expect("dir");
        let hosts = Hosts::new(Some(dir.path().to_path_buf()));
        assert_eq!(bases(&hosts, "r:1"), ["https://r:1/v2/"]);
        write(dir.path(), "_default", "server = \"https://a\"\n");
        assert_eq!(bases(&hosts, "r:1"), ["https://a/v2/"]);
        let path = write(dir.path(), "r_1_", "server = \"https://b\"\n");
        assert_eq!(bases(&hosts, "r:1"), ["https://b/v2/"]);
        // Same length and time: it is not read.
        let time = std::fs::metadata(&path).expect("metadata").modified().expect("a time");
        std::fs::write(&path, "server = \"https://c\"\n").expect("write");
        let file = std::fs::File::options().write(true).open(&path).expect("open");
        file.set_modified(time).expect("a time");
        assert_eq!(bases(&hosts, "r:1"), ["https://b/v2/"]);
        file.set_modified(time + std::time::Duration::from_secs(1)).expect("a time");
        assert_eq!(bases(&hosts, "r:1"), ["https://c/v2/"]);
        std::fs::remove_file(path).expect("removed");
        assert_eq!(bases(&hosts, "r:1"), ["https://a/v2/"]);
    }

    #[test]
    fn a_broken_file_is_named_and_not_quoted() {
        let dir = tempfile::tempdir().expect("dir");
        let hosts = Hosts::new(Some(dir.path().to_path_buf()));
        let table = [
            "\n[host.\"https://m\"]\n  header = secret",
            "[host.\"https://m\".header]\nAuthorization = 7 # secret",
            "[host.\"https://m\"]\ncapabilities = \"secret\"",
            "[host.\"https://user:secret@m:x\"]\n",
            "server = \"https://user:secret@m:x\"\n",
        ];
        for text in table {
            let path = write(dir.path(), "r", text);
            let error = hosts.endpoints("r", false).expect_err("refused").to_string();
            assert!(error.contains(&path.display().to_string()) && !error.contains("secret"), "{error}");
        }
        let path = dir.path().join("r/hosts.toml");
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("a directory");
        let error = hosts.endpoints("r", false).expect_err("refused").to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn header_values_are_not_shown() {
        let dir = tempfile::tempdir().expect("dir");
        write(dir.path(), "r", "[host.\"https://u:secret@m\".header]\nAuthorization = [\"Basic secret\"]\n");
        let hosts = Hosts::new(Some(dir.path().to_path_buf()));
        let found = hosts.endpoints("r", false).expect("endpoints");
        assert_eq!(found[0].headers.len(), 1);
        assert!(!format!("{found:?} {hosts:?}").contains("secret"));
    }
}
