//! Requests: endpoints in order, retries, and how many may be under way per host.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::{CredentialSource, Tokens};
use crate::health::{Health, jittered};
use crate::hosts::{Endpoint, Hosts};
use crate::redact::{Secret, host_of};
use crate::referrers::Listing;
use crate::transport::bounded;
use crate::{Reference, RegistryError};

const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Long enough for a second attempt of the kernel's after a lost packet, and one more.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a resolved blob location is used again; signed addresses live five minutes and more.
const LOCATION_LIFE: Duration = Duration::from_secs(60);
/// Requests under way per host if nothing else is configured: what browsers and container runtimes open, more or less.
const CONNECTIONS_PER_HOST: usize = 8;
/// Slots per host that background work leaves free.
const DEMAND_SLOTS: usize = 2;

/// How registries are reached. Resolved by the binary.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// containerd's tree of `hosts.toml` files.
    pub hosts_dir: Option<PathBuf>,
    /// Registries spoken to by http; `*` is all. Loopback addresses always are.
    pub plain_http: Vec<String>,
    /// Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Asked for credentials before Docker's `config.json`.
    pub credentials: Option<Arc<dyn CredentialSource>>,
    /// PEM files of certificates trusted besides the system's.
    pub extra_ca: Vec<PathBuf>,
    /// Requests under way per host; 0 means 8.
    pub connections_per_host: usize,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A server that asks for a longer pause (`Retry-After`) is left alone, and the caller hears of it at once.
    pub longest_retry_after: Duration,
    /// How long an endpoint that failed is asked last; twice as long after each further failure, up to a minute.
    pub backoff: Duration,
    /// A transfer that stands still this long is given up (and tried again by the caller).
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            longest_retry_after: Duration::from_secs(120),
            backoff: Duration::from_secs(2),
            stall: Duration::from_secs(30),
        }
    }
}

/// A client for all registries. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Inside are tokens and signed addresses.
        formatter.debug_struct("Client").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

pub(crate) struct Inner {
    pub(crate) config: RegistryConfig,
    pub(crate) limits: Limits,
    pub(crate) http: reqwest::Client,
    pub(crate) insecure: reqwest::Client,
    pub(crate) health: Health,
    pub(crate) tokens: Mutex<Tokens>,
    /// Held while a token for a host and scope is fetched.
    pub(crate) renewing: Mutex<Renewing>,
    pub(crate) locations: Locations,
    pub(crate) listing: Listing,
    /// When connections were opened before they were needed, by registry.
    pub(crate) opened: Mutex<HashMap<String, Instant>>,
    hosts: Hosts,
    gates: Mutex<HashMap<String, Gate>>,
}

/// By host and scope.
type Renewing = HashMap<(String, String), Arc<tokio::sync::Mutex<()>>>;

/// Where registries sent requests for blobs, by the address asked.
#[derive(Debug, Default)]
pub(crate) struct Locations {
    known: Mutex<HashMap<String, (Secret, Instant)>>,
}

impl Locations {
    pub(crate) fn get(&self, url: &str) -> Option<String> {
        let known = lock(&self.known);
        known.get(url).filter(|(_, since)| since.elapsed() < LOCATION_LIFE).map(|(to, _)| to.0.clone())
    }

    pub(crate) fn put(&self, url: &str, to: String) {
        let mut known = lock(&self.known);
        known.retain(|_, (_, since)| since.elapsed() < LOCATION_LIFE);
        known.insert(url.to_owned(), (Secret(to), Instant::now()));
    }

    pub(crate) fn forget(&self, url: &str) {
        lock(&self.known).remove(url);
    }
}

/// Slots of one host: all requests take one of the first, background ones one of the second too.
#[derive(Debug, Clone)]
struct Gate {
    all: Arc<Semaphore>,
    background: Arc<Semaphore>,
}

/// Slots that a request holds.
pub(crate) type Slots = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

/// Where a request goes.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// After `/v2/REPOSITORY/`, at any endpoint.
    Path(String),
    /// What an endpoint named: the rest of an upload, the next page of a list.
    Named(Arc<Endpoint>, Secret),
}

/// What to ask.
#[derive(Debug, Clone)]
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) reference: &'a Reference,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    pub(crate) needs: Needs,
    pub(crate) background: bool,
}

impl Ask<'_> {
    /// For messages.
    pub(crate) fn what(&self) -> String {
        let what = match &self.target {
            Target::Path(path) => path.split('?').next().unwrap_or(""),
            Target::Named(..) if self.method == Method::GET => "the next page",
            Target::Named(..) => "an upload",
        };
        format!("{what} of {}", self.reference.repository())
    }

    pub(crate) fn is_blob(&self) -> bool {
        self.method == Method::GET && matches!(&self.target, Target::Path(path) if path.starts_with("blobs/"))
    }
}

/// Which endpoints may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Resolve,
    Pull,
    Push,
}

/// An answer whose slot is held until it is dropped.
pub(crate) struct Answer {
    pub(crate) response: reqwest::Response,
    /// Who answered.
    pub(crate) host: String,
    /// Who was asked.
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) slots: Slots,
}

/// An endpoint that is asked, with what came of it.
pub(crate) struct Try {
    pub(crate) endpoint: Arc<Endpoint>,
    error: Option<RegistryError>,
}

impl Client {
    /// Reads certificates; reaches nothing yet.
    pub fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        Self::with_limits(config, Limits::default())
    }

    /// As `new`, with other limits than the usual ones.
    pub fn with_limits(config: RegistryConfig, limits: Limits) -> Result<Self, RegistryError> {
        install_crypto();
        let build = |insecure: bool, system_roots: bool| -> Result<reqwest::Client, RegistryError> {
            let mut builder = reqwest::Client::builder()
                .user_agent(concat!("sluice/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(limits.stall)
                .tcp_nodelay(true)
                .tls_danger_accept_invalid_certs(insecure);
            for path in &config.extra_ca {
                let bad = |reason: String| {
                    RegistryError::Config(format!("certificate {}: {reason}", path.display()))
                };
                let pem = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
                let certificates =
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| bad(error.to_string()))?;
                if certificates.is_empty() {
                    return Err(bad("there is none in it".to_owned()));
                }
                for certificate in certificates {
                    builder = builder.add_root_certificate(certificate);
                }
            }
            if !system_roots {
                builder = builder.tls_certs_only([]);
            }
            builder
                .build()
                .map_err(|error| RegistryError::Config(format!("cannot make an HTTP client: {error:?}")))
        };
        // A machine without CA certificates can still reach registries by plain HTTP.
        let http = build(false, true).or_else(|error| match config.extra_ca.is_empty() {
            true => {
                tracing::warn!(%error, "no registry can be reached by HTTPS; install the package ca-certificates");
                build(false, false)
            }
            false => Err(error),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                insecure: build(true, false)?,
                hosts: Hosts::new(config.hosts_dir.clone()),
                health: Health::new(limits.backoff),
                config,
                limits,
                tokens: Mutex::default(),
                renewing: Mutex::default(),
                gates: Mutex::default(),
                locations: Locations::default(),
                listing: Listing::default(),
                opened: Mutex::default(),
            }),
        })
    }

    /// A reference in the usual notation.
    pub fn parse(reference: &str) -> Result<Reference, RegistryError> {
        crate::reference::parse(reference).ok_or_else(|| RegistryError::Reference {
            reference: reference.to_owned(),
            reason: why_not(reference).unwrap_or("it is not [HOST[:PORT]/]PATH[:TAG][@DIGEST]").to_owned(),
        })
    }

    /// Asks, trying again what may pass. Any answer that is no success is an error.
    pub(crate) async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, RegistryError> {
        self.ask_checked(ask, |_| Ok(())).await.map(|(answer, ())| answer)
    }

    /// Asks until an answer stands `check`: in rounds over the endpoints, those that failed lately last.
    pub(crate) async fn ask_checked<T>(
        &self,
        ask: &Ask<'_>,
        check: impl Fn(&Answer) -> Result<T, RegistryError>,
    ) -> Result<(Answer, T), RegistryError> {
        let mut tries = self.tries(ask)?;
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            if let Some(answer) = self.round(ask, &mut tries, &check).await {
                return Ok(answer);
            }
            let wait = self.wait(&tries, &mut pause);
            let gone =
                tries.last().is_some_and(|last| last.error.as_ref().is_some_and(RegistryError::is_not_found));
            match wait {
                Some(wait) if attempt < ATTEMPTS && !gone => tokio::time::sleep(wait).await,
                _ => break,
            }
        }
        // What the registry itself said counts more than what its mirrors did.
        let error = tries.into_iter().filter_map(|one| one.error).next_back();
        Err(error.unwrap_or_else(|| {
            RegistryError::Config(format!(
                "no endpoint of {} may be asked for this",
                ask.reference.registry()
            ))
        }))
    }

    /// The endpoints that may be asked, in their order.
    pub(crate) fn tries(&self, ask: &Ask<'_>) -> Result<Vec<Try>, RegistryError> {
        if let Target::Named(endpoint, _) = &ask.target {
            return Ok(vec![Try { endpoint: Arc::clone(endpoint), error: None }]);
        }
        let registry = ask.reference.registry();
        let endpoints = self.inner.hosts.endpoints(registry, self.is_plain(registry))?;
        let allowed = endpoints.into_iter().filter(|endpoint| match ask.needs {
            Needs::Resolve => endpoint.resolve,
            Needs::Pull => endpoint.pull,
            Needs::Push => endpoint.push,
        });
        Ok(allowed.map(|endpoint| Try { endpoint, error: None }).collect())
    }

    /// Asks each endpoint that may still answer, once.
    async fn round<T>(
        &self,
        ask: &Ask<'_>,
        tries: &mut [Try],
        check: &impl Fn(&Answer) -> Result<T, RegistryError>,
    ) -> Option<(Answer, T)> {
        let health = &self.inner.health;
        let mut order: Vec<&mut Try> = tries.iter_mut().collect();
        order.sort_by_cached_key(|one| health.avoid(&one.endpoint.base));
        for one in order {
            let base = &one.endpoint.base;
            if one.error.as_ref().is_some_and(|error| !error.is_transient()) {
                continue;
            }
            if let Some(left) = health.busy_for(base) {
                one.error = Some(too_busy(base, left, &ask.what()));
                continue;
            }
            let asked = self.ask_once(ask, &one.endpoint).await;
            let checked = asked.and_then(|answer| check(&answer).map(|value| (answer, value)));
            match checked {
                Ok(answer) => {
                    health.worked(base);
                    return Some(answer);
                }
                Err(error) => {
                    tracing::debug!(host = host_of(base), %error, "endpoint failed");
                    if error.may_pass() {
                        health.failed(base);
                    } else {
                        health.worked(base);
                    }
                    one.error = Some(error);
                }
            }
        }
        None
    }

    /// How long to wait before the next round; `None` if there is no use in one.
    fn wait(&self, tries: &[Try], pause: &mut Duration) -> Option<Duration> {
        let again = tries.iter().filter(|one| one.error.as_ref().is_some_and(RegistryError::is_transient));
        let asked = again.map(|one| self.inner.health.busy_for(&one.endpoint.base).unwrap_or_default());
        let asked = asked.min()?;
        if asked > self.inner.limits.longest_retry_after {
            return None;
        }
        let wait = asked + jittered(*pause);
        *pause *= 2;
        Some(wait)
    }

    /// Waits for a slot of `host`.
    pub(crate) async fn slots(&self, host: &str, background: bool) -> Slots {
        let gate = {
            let configured = self.inner.config.connections_per_host;
            let total = if configured == 0 { CONNECTIONS_PER_HOST } else { configured };
            let mut gates = lock(&self.inner.gates);
            gates
                .entry(host.to_owned())
                .or_insert_with(|| Gate {
                    all: Arc::new(Semaphore::new(total)),
                    background: Arc::new(Semaphore::new(total.saturating_sub(DEMAND_SLOTS).max(1))),
                })
                .clone()
        };
        let behind = if background { acquire(gate.background).await.into() } else { None };
        (acquire(gate.all).await, behind)
    }

    fn is_plain(&self, registry: &str) -> bool {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        matches!(host, "localhost" | "[::1]")
            || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || self.inner.config.plain_http.iter().any(|one| one == "*" || one == registry)
    }

    /// A small document, whole: at most `limit` bytes.
    pub(crate) async fn document(&self, ask: &Ask<'_>, limit: usize) -> Result<Document, RegistryError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let Answer { response, host, endpoint, slots } = self.ask(ask).await?;
            let (headers, url) = (response.headers().clone(), response.url().clone());
            match bounded(response, &host, &ask.what(), limit).await {
                Ok(bytes) => return Ok(Document { bytes, headers, host, endpoint, url }),
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    self.inner.health.failed(&endpoint.base);
                    drop(slots);
                    tokio::time::sleep(jittered(pause)).await;
                    pause *= 2;
                }
                Err(error) => return Err(error),
            }
        }
        Err(RegistryError::Config("no attempt was made".to_owned()))
    }
}

/// A document with where it came from. Not for logs: its address may be signed.
pub(crate) struct Document {
    pub(crate) bytes: Bytes,
    pub(crate) headers: HeaderMap,
    pub(crate) host: String,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) url: url::Url,
}

/// Chooses ring for TLS in this process; a choice made before stands.
pub fn install_crypto() {
    drop(rustls::crypto::ring::default_provider().install_default());
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn acquire(semaphore: Arc<Semaphore>) -> OwnedSemaphorePermit {
    loop {
        // A gate's semaphore is never closed.
        if let Ok(permit) = Arc::clone(&semaphore).acquire_owned().await {
            return permit;
        }
    }
}

fn too_busy(base: &str, left: Duration, what: &str) -> RegistryError {
    RegistryError::Status {
        host: host_of(base),
        status: 429,
        what: what.to_owned(),
        hint: format!("; it asked to be left alone for {} s more, wait or use a mirror", left.as_secs() + 1),
    }
}

/// What is wrong with a reference, where the parser's own words would not help.
fn why_not(reference: &str) -> Option<&'static str> {
    let name = reference.split('@').next().unwrap_or("");
    let repository = name.split_once('/').map_or(name, |(_, rest)| rest);
    let repository = repository.rsplit_once(':').map_or(repository, |(repository, _)| repository);
    if reference.is_empty() {
        Some("it is empty")
    } else if reference.contains("://") {
        Some("it begins with a scheme; leave that out")
    } else if reference.contains(char::is_whitespace) {
        Some("there is a space in it")
    } else if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Some("names of repositories are lower-case")
    } else if reference.split_once('@').is_some_and(|(_, digest)| !crate::reference::is_digest(digest)) {
        Some("its digest is not `sha256:` and 64 hexadecimal digits")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_as_long_as_asked_within_the_limit() {
        let client = Client::new(RegistryConfig::default()).expect("a client");
        let endpoints = ["http://a/v2/", "http://b/v2/"].map(|base| {
            let (resolve, pull, push) = (true, true, true);
            Endpoint { base: base.to_owned(), resolve, pull, push, skip_verify: false, headers: Vec::new() }
        });
        let tries = || {
            let of = |endpoint: &Endpoint| {
                let error = Some(too_busy(&endpoint.base, Duration::ZERO, "it"));
                Try { endpoint: Arc::new(endpoint.clone()), error }
            };
            endpoints.iter().map(of).collect::<Vec<_>>()
        };
        let wait = || client.wait(&tries(), &mut FIRST_PAUSE.clone());
        assert!(wait().expect("a pause") < Duration::from_secs(1), "nobody asked for a wait");
        client.inner.health.busy("http://a/v2/", Duration::from_secs(100));
        assert!(wait().expect("a pause") < Duration::from_secs(1), "the other one did not ask for a wait");
        client.inner.health.busy("http://b/v2/", Duration::from_secs(90));
        let asked = wait().expect("a pause");
        assert!(asked > Duration::from_secs(89) && asked < Duration::from_secs(91), "{asked:?}");
        client.inner.health.busy("http://a/v2/", Duration::from_secs(500));
        client.inner.health.busy("http://b/v2/", Duration::from_secs(400));
        assert_eq!(wait(), None);
    }
}
