//! Requests: endpoints in order, authentication, redirects, retries, and how many may be under way per host.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::{self, Authorization, Challenge, Tokens};
use crate::hosts::{self, Endpoint};
use crate::{Reference, RegistryError};

const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A server may ask for a pause up to this long before the caller hears of it.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A transfer that stands still this long is given up (and tried again by the caller).
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
/// How long a resolved blob location is used again; signed addresses live five minutes and more.
const LOCATION_LIFE: Duration = Duration::from_secs(60);
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
    /// PEM files of certificates trusted besides the system's.
    pub extra_ca: Vec<PathBuf>,
    /// Requests under way per host; 0 means 8.
    pub connections_per_host: usize,
}

/// A client for all registries. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RegistryConfig,
    http: reqwest::Client,
    insecure: reqwest::Client,
    tokens: Mutex<Tokens>,
    gates: Mutex<HashMap<String, Gate>>,
    locations: Mutex<HashMap<String, (String, Instant)>>,
}

/// Slots of one host: all requests take one of the first, background ones one of the second too.
#[derive(Debug, Clone)]
struct Gate {
    all: Arc<Semaphore>,
    background: Arc<Semaphore>,
}

/// What to ask.
#[derive(Debug, Clone)]
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) reference: &'a Reference,
    /// After `/v2/REPOSITORY/`, or a whole URL for uploads.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    /// `resolve`, `pull` or `push`.
    pub(crate) needs: Needs,
    pub(crate) background: bool,
}

/// Which endpoints may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Resolve,
    Pull,
    Push,
}

/// An answer whose slot is held until it is dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: reqwest::Response,
    pub(crate) host: String,
    pub(crate) slots: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Client {
    /// Reads certificates; reaches nothing yet.
    pub fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        install_crypto();
        let build = |insecure: bool| -> Result<reqwest::Client, RegistryError> {
            let mut builder = reqwest::Client::builder()
                .user_agent(concat!("sluice/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT)
                .tcp_nodelay(true)
                .tls_danger_accept_invalid_certs(insecure);
            for path in &config.extra_ca {
                let bad = |reason: String| {
                    RegistryError::Config(format!("certificate {}: {reason}", path.display()))
                };
                let pem = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
                for certificate in
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| bad(error.to_string()))?
                {
                    builder = builder.add_root_certificate(certificate);
                }
            }
            builder
                .build()
                .map_err(|error| RegistryError::Config(format!("cannot make an HTTP client: {error}")))
        };
        Ok(Self {
            inner: Arc::new(Inner {
                http: build(false)?,
                insecure: build(true)?,
                config,
                tokens: Mutex::default(),
                gates: Mutex::default(),
                locations: Mutex::default(),
            }),
        })
    }

    /// A reference in the usual notation.
    pub fn parse(reference: &str) -> Result<Reference, RegistryError> {
        reference.parse().map_err(|error: oci_spec::distribution::ParseError| RegistryError::Reference {
            reference: reference.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Asks, trying again what may pass. Any status but 404 that is no success is an error; so is 404.
    pub(crate) async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, RegistryError> {
        let registry = ask.reference.registry();
        let plain = self.is_plain(registry);
        let endpoints = hosts::endpoints(self.inner.config.hosts_dir.as_deref(), registry, plain)?;
        let mut last = None;
        for endpoint in endpoints.iter().filter(|endpoint| match ask.needs {
            Needs::Resolve => endpoint.resolve,
            Needs::Pull => endpoint.pull,
            Needs::Push => endpoint.push,
        }) {
            match self.ask_endpoint(ask, endpoint).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    tracing::debug!(base = endpoint.base, %error, "endpoint failed");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| RegistryError::Config(format!("no endpoint of {registry} may be asked"))))
    }

    async fn ask_endpoint(&self, ask: &Ask<'_>, endpoint: &Endpoint) -> Result<Answer, RegistryError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let (error, wait) = match self.ask_once(ask, endpoint).await {
                Ok(answer) if answer.response.status().is_success() => return Ok(answer),
                Ok(answer) => (refusal(&answer, ask), retry_after(answer.response.headers())),
                Err(error) => (error, None),
            };
            let again = matches!(&error, RegistryError::Unreachable { .. })
                || matches!(&error, RegistryError::Status { status, .. } if matches!(status, 408 | 425 | 429 | 500..=599));
            if !again || attempt >= ATTEMPTS {
                return Err(error);
            }
            let jitter = 0.5
                + f64::from(std::time::SystemTime::now().elapsed().unwrap_or_default().subsec_nanos() % 1000)
                    / 1000.0;
            tokio::time::sleep(wait.unwrap_or(pause.mul_f64(jitter)).min(LONGEST_RETRY_AFTER)).await;
            pause *= 2;
        }
        Err(RegistryError::Config("no attempt was made".to_owned()))
    }

    /// One attempt, with one renewal of the token.
    async fn ask_once(&self, ask: &Ask<'_>, endpoint: &Endpoint) -> Result<Answer, RegistryError> {
        let url = if ask.path.contains("://") {
            ask.path.clone()
        } else {
            format!("{}{}/{}", endpoint.base, ask.reference.repository(), ask.path)
        };
        let host = host_of(&url);
        let slots = self.slots(&host, ask.background).await;
        let actions = if ask.needs == Needs::Push { "pull,push" } else { "pull" };
        let scope = format!("repository:{}:{actions}", ask.reference.repository());
        let is_blob = ask.method == Method::GET && ask.path.starts_with("blobs/");
        if let Some(location) = self.known_location(&url).filter(|_| is_blob) {
            let response = self.send(ask, endpoint, &location, None).await?;
            if response.status().is_success() {
                return Ok(Answer { response, host, slots });
            }
            // It expired: resolve it again.
            self.lock(&self.inner.locations).remove(&url);
        }
        let mut authorization = self.lock(&self.inner.tokens).get(&host, &scope);
        for renewed in [false, true] {
            let response = self.send(ask, endpoint, &url, authorization.as_ref()).await?;
            if response.status() == StatusCode::UNAUTHORIZED && !renewed {
                let challenge =
                    response.headers().get(WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
                let Some(challenge) = challenge.and_then(Challenge::parse) else {
                    return Ok(Answer { response, host, slots });
                };
                self.lock(&self.inner.tokens).forget(&host, &scope);
                match self.authorize(&host, &scope, challenge).await? {
                    Some(fresh) => authorization = Some(fresh),
                    None => return Ok(Answer { response, host, slots }),
                }
                continue;
            }
            if response.status().is_redirection() && response.status() != StatusCode::NOT_MODIFIED {
                let response = self.follow(ask, endpoint, &url, response).await?;
                return Ok(Answer { response, host, slots });
            }
            return Ok(Answer { response, host, slots });
        }
        Err(RegistryError::Config("the token was renewed without an answer".to_owned()))
    }

    /// Follows redirects; `Authorization` never goes to another host.
    async fn follow(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        first: &str,
        mut response: reqwest::Response,
    ) -> Result<reqwest::Response, RegistryError> {
        let wrong = |reason: &str| RegistryError::Protocol {
            host: host_of(first),
            what: ask.path.clone(),
            reason: reason.to_owned(),
        };
        let mut from = first.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| wrong("a redirect without a location"))?;
            let next = url::Url::parse(&from)
                .and_then(|base| base.join(location))
                .map_err(|_| wrong("a redirect to something that is no address"))?
                .to_string();
            response = self.send(ask, endpoint, &next, None).await?;
            if !response.status().is_redirection() {
                if response.status().is_success() && ask.method == Method::GET {
                    self.lock(&self.inner.locations).insert(first.to_owned(), (next, Instant::now()));
                }
                return Ok(response);
            }
            from = next;
        }
        Err(wrong("too many redirects"))
    }

    async fn send(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        url: &str,
        authorization: Option<&Authorization>,
    ) -> Result<reqwest::Response, RegistryError> {
        let http = if endpoint.skip_verify { &self.inner.insecure } else { &self.inner.http };
        let mut request = http.request(ask.method.clone(), url).headers(ask.headers.clone());
        // Configured headers may hold credentials: they go to the endpoint alone, not where it redirects to.
        let own = host_of(url) == host_of(&endpoint.base);
        for (name, value) in endpoint.headers.iter().filter(|_| own) {
            request = request.header(name, value);
        }
        if let Some(Authorization(value)) = authorization {
            let mut value = HeaderValue::from_str(value).map_err(|_| {
                RegistryError::Config("the credentials hold characters no header may have".to_owned())
            })?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(body) = &ask.body {
            request = request.body(body.clone());
        }
        request
            .send()
            .await
            .map_err(|error| RegistryError::Unreachable { host: host_of(url), reason: reason(&error) })
    }

    async fn authorize(
        &self,
        host: &str,
        scope: &str,
        challenge: Challenge,
    ) -> Result<Option<Authorization>, RegistryError> {
        // Of the host that asks, never of the registry it stands for: a mirror must not get another's password.
        let name = if host == "registry-1.docker.io" { "docker.io" } else { host };
        let (config, name) = (self.inner.config.docker_config.clone(), name.to_owned());
        let credentials = tokio::task::spawn_blocking(move || auth::credentials(config.as_deref(), &name))
            .await
            .map_err(|error| RegistryError::Config(error.to_string()))??;
        let (token, life) = match challenge {
            Challenge::Basic => match credentials {
                Some(credentials) => (auth::basic(&credentials), Duration::from_secs(3600)),
                None => return Ok(None),
            },
            Challenge::Bearer { realm, service, scope: asked } => {
                let asked = asked.as_deref().unwrap_or(scope);
                auth::fetch_token(&self.inner.http, &realm, service.as_deref(), asked, credentials.as_ref())
                    .await?
            }
        };
        self.lock(&self.inner.tokens).put(host, scope, token.clone(), life);
        Ok(Some(token))
    }

    async fn slots(
        &self,
        host: &str,
        background: bool,
    ) -> (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>) {
        let gate = {
            let total = if self.inner.config.connections_per_host == 0 {
                8
            } else {
                self.inner.config.connections_per_host
            };
            let mut gates = self.lock(&self.inner.gates);
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

    fn known_location(&self, url: &str) -> Option<String> {
        let locations = self.lock(&self.inner.locations);
        locations
            .get(url)
            .filter(|(_, since)| since.elapsed() < LOCATION_LIFE)
            .map(|(location, _)| location.clone())
    }

    fn is_plain(&self, registry: &str) -> bool {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        matches!(host, "localhost" | "[::1]")
            || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || self.inner.config.plain_http.iter().any(|one| one == "*" || one == registry)
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A small document, whole: at most `limit` bytes.
    pub(crate) async fn document(
        &self,
        ask: &Ask<'_>,
        limit: usize,
    ) -> Result<(Bytes, HeaderMap), RegistryError> {
        let answer = self.ask(ask).await?;
        let headers = answer.response.headers().clone();
        let host = answer.host.clone();
        let mut body = answer.response.bytes_stream();
        let mut out = Vec::new();
        while let Some(piece) = body.next().await {
            let piece = piece
                .map_err(|error| RegistryError::Unreachable { host: host.clone(), reason: reason(&error) })?;
            out.extend_from_slice(&piece);
            if out.len() > limit {
                return Err(RegistryError::Protocol {
                    host,
                    what: ask.path.clone(),
                    reason: format!("it is larger than {limit} bytes"),
                });
            }
        }
        Ok((out.into(), headers))
    }
}

/// Chooses ring for TLS in this process; a choice made before stands.
pub fn install_crypto() {
    drop(rustls::crypto::ring::default_provider().install_default());
}

async fn acquire(semaphore: Arc<Semaphore>) -> OwnedSemaphorePermit {
    loop {
        // A gate's semaphore is never closed.
        if let Ok(permit) = Arc::clone(&semaphore).acquire_owned().await {
            return permit;
        }
    }
}

fn host_of(url: &str) -> String {
    url.split('/').nth(2).unwrap_or(url).to_owned()
}

/// An error's innermost causes: reqwest's own text repeats the address, which may be signed.
pub(crate) fn reason(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if error.is_timeout() { "it did not answer in time".to_owned() } else { cause.to_string() }
}

fn refusal(answer: &Answer, ask: &Ask<'_>) -> RegistryError {
    let status = answer.response.status().as_u16();
    RegistryError::Status {
        host: answer.host.clone(),
        status,
        what: format!("{} of {}", ask.path.split('?').next().unwrap_or(""), ask.reference.repository()),
        hint: match status {
            401 | 403 => "; check the credentials in Docker's config.json",
            404 => "; there is no such image, or it may not be seen with these credentials",
            429 => "; too many requests, wait or use a mirror",
            _ => "",
        },
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}
