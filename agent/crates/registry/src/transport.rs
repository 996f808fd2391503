//! One request to one endpoint: tokens, redirects, and what an answer that is no success means.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode};

use crate::auth::{self, Authorization, BASIC_LIFE, Credentials, TokenRequest};
use crate::challenge::Challenge;
use crate::client::{Answer, Ask, Client, Needs, Target, Try, lock};
use crate::health::retry_after;
use crate::hosts::Endpoint;
use crate::redact::{Secret, host_of, same_origin};
use crate::{Reference, RegistryError, observe};

const MAX_REDIRECTS: usize = 5;
/// How long connections that were opened ahead count as there; reqwest keeps idle ones for 90 s.
const OPEN_LIFE: Duration = Duration::from_secs(60);

impl Client {
    /// Opens connections for requests that will be made at once when the one that is made now is answered, so that they need not wait
    /// for theirs. Once per [`OPEN_LIFE`] and registry.
    pub(crate) fn open_ahead(&self, reference: &Reference, count: usize) {
        let mut opened = lock(&self.inner.opened);
        let before = opened.get(reference.registry());
        if before.is_some_and(|before| before.elapsed() < OPEN_LIFE) {
            return;
        }
        opened.insert(reference.registry().to_owned(), Instant::now());
        for _ in 0..count {
            let (client, reference) = (self.clone(), reference.clone());
            tokio::spawn(async move {
                if let Err(error) = client.open(&reference).await {
                    tracing::debug!(%error, "no connection is opened ahead");
                }
            });
        }
    }

    /// Asks the first endpoint for the API's version; what it answers is nobody's business.
    async fn open(&self, reference: &Reference) -> Result<(), RegistryError> {
        let (method, target, needs) = (Method::GET, Target::Path(String::new()), Needs::Resolve);
        let headers = HeaderMap::new();
        let ask = Ask { method, reference, target, headers, body: None, needs, background: false };
        let Some(Try { endpoint, .. }) = self.tries(&ask)?.into_iter().next() else { return Ok(()) };
        let host = host_of(&endpoint.base);
        let _slots = self.slots(&host, false).await;
        let answer = self.send(&ask, &endpoint, &endpoint.base, None).await?;
        answer.bytes().await.map(drop).map_err(|error| transport_error(&host, &error))
    }

    /// One attempt. A success, or an error.
    pub(crate) async fn ask_once(
        &self,
        ask: &Ask<'_>,
        endpoint: &Arc<Endpoint>,
    ) -> Result<Answer, RegistryError> {
        let url = match &ask.target {
            Target::Path(path) => format!("{}{}/{path}", endpoint.base, ask.reference.repository()),
            Target::Named(_, url) => url.0.clone(),
        };
        let slots = self.slots(&host_of(&url), ask.background).await;
        let response = match self.at_known_location(ask, endpoint, &url).await {
            Some(response) => response,
            None => self.resolved(ask, endpoint, &url).await?,
        };
        let host = host_of(response.url().as_str());
        if response.status().is_success() {
            return Ok(Answer { response, host, endpoint: Arc::clone(endpoint), slots });
        }
        if let Some(wait) = retry_after(response.headers(), SystemTime::now()) {
            self.inner.health.busy(&endpoint.base, wait);
        }
        Err(refusal(&response, host, same_origin(response.url().as_str(), &url), ask))
    }

    /// Asks where the registry sent the same request before. Whatever goes wrong there, the registry is asked anew.
    async fn at_known_location(&self, ask: &Ask<'_>, endpoint: &Endpoint, url: &str) -> Option<Response> {
        let location = self.inner.locations.get(url).filter(|_| ask.is_blob())?;
        match self.send(ask, endpoint, &location, None).await {
            Ok(response) if response.status().is_success() => return Some(response),
            Ok(response) => {
                let status = response.status().as_u16();
                tracing::debug!(host = host_of(&location), status, "a redirect's address expired");
            }
            Err(error) => tracing::debug!(%error, "a redirect's address cannot be reached"),
        }
        self.inner.locations.forget(url);
        None
    }

    /// Asks the endpoint and follows where it points to; once more if that was refused: addresses are signed for a time.
    async fn resolved(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        url: &str,
    ) -> Result<Response, RegistryError> {
        let (response, authorization) = self.authorized(ask, endpoint, url).await?;
        let response = self.follow(ask, endpoint, url, response, authorization.as_ref()).await?;
        let elsewhere = !same_origin(response.url().as_str(), url);
        let expired = matches!(response.status().as_u16(), 400 | 401 | 403 | 404 | 410);
        if !elsewhere || !expired {
            return Ok(response);
        }
        let (response, authorization) = self.authorized(ask, endpoint, url).await?;
        self.follow(ask, endpoint, url, response, authorization.as_ref()).await
    }

    /// Asks with the token at hand, and once more with a new one.
    async fn authorized(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        url: &str,
    ) -> Result<(Response, Option<Authorization>), RegistryError> {
        let host = host_of(url);
        let actions = if ask.needs == Needs::Push { "pull,push" } else { "pull" };
        let scope = format!("repository:{}:{actions}", ask.reference.repository());
        let known = lock(&self.inner.tokens).get(&host, &scope);
        let response = self.send(ask, endpoint, url, known.as_ref()).await?;
        if let (StatusCode::FORBIDDEN, Some(known)) = (response.status(), &known) {
            // Somebody may bring other credentials before the token ends.
            lock(&self.inner.tokens).forget(&host, &scope, known);
        }
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok((response, known));
        }
        let Some(challenge) = Challenge::of(response.headers()) else { return Ok((response, known)) };
        // One request fetches the new token for all that wait for it.
        let renewing = lock(&self.inner.renewing).entry((host.clone(), scope.clone())).or_default().clone();
        let _renewing = renewing.lock().await;
        let newer = lock(&self.inner.tokens).get(&host, &scope).filter(|token| Some(token) != known.as_ref());
        if let Some(newer) = newer {
            return self.send_with(ask, endpoint, url, &scope, newer).await;
        }
        let mut last = Ok((response, None));
        for credentials in self.credentials(&host, ask.reference.repository()).await? {
            let fresh = self.authorize(endpoint, url, &scope, &challenge, credentials.as_ref()).await;
            let answered = match fresh {
                Ok(Some(fresh)) => self.send_with(ask, endpoint, url, &scope, fresh).await,
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            let refused = match &answered {
                Ok((response, _)) => matches!(response.status().as_u16(), 401 | 403),
                Err(error) => matches!(error, RegistryError::Status { status: 400..=403, .. }),
            };
            last = answered;
            if !refused {
                break;
            }
        }
        last
    }

    /// Asks with a token, and forgets it if it is refused.
    async fn send_with(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        url: &str,
        scope: &str,
        token: Authorization,
    ) -> Result<(Response, Option<Authorization>), RegistryError> {
        let response = self.send(ask, endpoint, url, Some(&token)).await?;
        if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            lock(&self.inner.tokens).forget(&host_of(url), scope, &token);
        }
        Ok((response, Some(token)))
    }

    /// What may be tried at a host, in order; at least `None`, which is nobody.
    async fn credentials(
        &self,
        host: &str,
        repository: &str,
    ) -> Result<Vec<Option<Credentials>>, RegistryError> {
        // Of the host that asks, never of the registry it stands for: a mirror must not get another's password.
        let name = if host == "registry-1.docker.io" { "docker.io".to_owned() } else { host.to_owned() };
        let (config, source) =
            (self.inner.config.docker_config.clone(), self.inner.config.credentials.clone());
        let repository = repository.to_owned();
        let found = tokio::task::spawn_blocking(move || {
            let mut all = source.map(|source| source.credentials(&name, &repository)).unwrap_or_default();
            match auth::credentials(config.as_deref(), &name) {
                Ok(own) => all.extend(own),
                Err(error) if all.is_empty() => return Err(error),
                Err(error) => tracing::warn!(%error, "Docker's credentials are not used"),
            }
            Ok(all)
        });
        let found = found.await.map_err(|error| RegistryError::Config(error.to_string()))??;
        Ok(if found.is_empty() { vec![None] } else { found.into_iter().map(Some).collect() })
    }

    /// Follows redirects. `Authorization` goes along to the same host only.
    async fn follow(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        first: &str,
        mut response: Response,
        authorization: Option<&Authorization>,
    ) -> Result<Response, RegistryError> {
        let wrong = |reason: &str| RegistryError::Protocol {
            host: host_of(first),
            what: ask.what(),
            reason: reason.to_owned(),
        };
        let mut from = first.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let status = response.status();
            if !status.is_redirection() || status == StatusCode::NOT_MODIFIED {
                let found = status.is_success() && ask.is_blob() && !same_origin(&from, first);
                if found {
                    self.inner.locations.put(first, from);
                }
                return Ok(response);
            }
            let keeps_method = matches!(status.as_u16(), 307 | 308);
            if !keeps_method && !matches!(ask.method, Method::GET | Method::HEAD) {
                return Err(wrong("a redirect of a request that must not be repeated elsewhere"));
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| wrong("a redirect without a location"))?;
            let next = url::Url::parse(&from)
                .and_then(|base| base.join(location))
                .map_err(|error| wrong(&format!("a redirect to something that is no address: {error}")))?;
            from = next.to_string();
            let own = authorization.filter(|_| same_origin(&from, first));
            response = self.send(ask, endpoint, &from, own).await?;
        }
        Err(wrong("too many redirects"))
    }

    async fn send(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        url: &str,
        authorization: Option<&Authorization>,
    ) -> Result<Response, RegistryError> {
        // Configured headers may hold credentials, and certificates go unchecked for the endpoint alone: neither goes
        // where it redirects to.
        let own = same_origin(url, &endpoint.base);
        let http = if endpoint.skip_verify && own { &self.inner.insecure } else { &self.inner.http };
        let mut request = http.request(ask.method.clone(), url).headers(ask.headers.clone());
        for (name, value) in endpoint.headers.iter().filter(|_| own) {
            request = request.header(name, sensitive(value, "hosts.toml")?);
        }
        if let Some(Authorization(value)) = authorization {
            request = request.header(AUTHORIZATION, sensitive(value, "the credentials")?);
        }
        if let Some(body) = &ask.body {
            request = request.body(body.clone());
        }
        let began = Instant::now();
        let answer = request.send().await;
        observe::answered(began);
        answer.map_err(|error| transport_error(&host_of(url), &error))
    }

    async fn authorize(
        &self,
        endpoint: &Endpoint,
        url: &str,
        scope: &str,
        challenge: &Challenge,
        credentials: Option<&Credentials>,
    ) -> Result<Option<Authorization>, RegistryError> {
        let host = host_of(url);
        let (token, life) = match challenge {
            Challenge::Basic => match credentials {
                Some(Credentials::Password(user, password)) => (auth::basic(user, password), BASIC_LIFE),
                _ => return Ok(None),
            },
            Challenge::Bearer { realm, service, scope: asked } => {
                check_realm(realm, url)?;
                let unchecked = endpoint.skip_verify && same_origin(realm, &endpoint.base);
                let http = if unchecked { &self.inner.insecure } else { &self.inner.http };
                let scope = asked.as_deref().unwrap_or(scope);
                let request = TokenRequest { realm, service: service.as_deref(), scope };
                let busy = |wait| self.inner.health.busy(&endpoint.base, wait);
                let began = Instant::now();
                let fetched = request.fetch(http, credentials, busy).await;
                observe::answered(began);
                fetched?
            }
        };
        lock(&self.inner.tokens).put(&host, scope, token.clone(), life);
        Ok(Some(token))
    }
}

/// Passwords given to a registry over a secure connection do not travel over another.
fn check_realm(realm: &str, url: &str) -> Result<(), RegistryError> {
    let wrong = |reason: &str| RegistryError::Protocol {
        host: host_of(url),
        what: "what it wants for authentication".to_owned(),
        reason: reason.to_owned(),
    };
    let parsed =
        url::Url::parse(realm).map_err(|error| wrong(&format!("its token server's address: {error}")))?;
    match parsed.scheme() {
        "https" => Ok(()),
        "http" if !url.starts_with("https:") => Ok(()),
        _ => Err(wrong("its token server is not reached by https")),
    }
}

fn sensitive(value: &Secret, whose: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(&value.0)
        .map_err(|error| RegistryError::Config(format!("{whose} cannot be sent: {error}")))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A body, whole, of at most `limit` bytes.
pub(crate) async fn bounded(
    mut response: Response,
    host: &str,
    what: &str,
    limit: usize,
) -> Result<Bytes, RegistryError> {
    let mut out = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| transport_error(host, &error))? {
        if out.len() + piece.len() > limit {
            return Err(RegistryError::Protocol {
                host: host.to_owned(),
                what: what.to_owned(),
                reason: format!("it is larger than {limit} bytes"),
            });
        }
        out.extend_from_slice(&piece);
    }
    Ok(out.into())
}

/// What a failed exchange means. The innermost cause only: reqwest's own text repeats the address, which may be signed.
pub(crate) fn transport_error(host: &str, error: &reqwest::Error) -> RegistryError {
    let host = host.to_owned();
    let mut cause: &dyn std::error::Error = error;
    loop {
        // An I/O error gives the source of what it wraps, not that itself.
        let wrapped = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = wrapped.and_then(|inner| inner.downcast_ref()).or_else(|| cause.downcast_ref());
        if let Some(reason) = tls.and_then(untrusted) {
            return RegistryError::Tls { host, reason };
        }
        match wrapped.map(|inner| inner as &dyn std::error::Error).or_else(|| cause.source()) {
            Some(next) => cause = next,
            None => break,
        }
    }
    let reason = if error.is_timeout() { "it did not answer in time".to_owned() } else { cause.to_string() };
    RegistryError::Unreachable { host, reason }
}

/// Why no connection will be trusted however often it is tried; `None` for what may pass.
fn untrusted(error: &rustls::Error) -> Option<String> {
    use rustls::{AlertDescription, Error};
    let hint = match error {
        Error::InvalidCertificate(_) => "; if it is the right one, name its CA in extra_ca",
        Error::InvalidMessage(_) => "; if it speaks plain http, say so in plain_http",
        Error::NoCertificatesPresented | Error::PeerIncompatible(_) | Error::UnsupportedNameType => "",
        Error::AlertReceived(
            AlertDescription::InternalError | AlertDescription::CloseNotify | AlertDescription::UserCanceled,
        ) => return None,
        Error::AlertReceived(_) => "",
        _ => return None,
    };
    Some(format!("{error}{hint}"))
}

fn refusal(response: &Response, host: String, own: bool, ask: &Ask<'_>) -> RegistryError {
    let status = response.status().as_u16();
    let wait = retry_after(response.headers(), SystemTime::now());
    let hint = match (status, wait) {
        (_, Some(wait)) if !wait.is_zero() => {
            format!("; it asks to be left alone for {} s, wait or use a mirror", wait.as_secs())
        }
        (400 | 401 | 403 | 404 | 410, _) if !own => {
            "; the registry's redirect led there, and the address it gave is refused".to_owned()
        }
        (401 | 403, _) => "; check the credentials".to_owned(),
        (404, _) => "; there is no such image, or it may not be seen with these credentials".to_owned(),
        (429, _) => "; too many requests, wait or use a mirror".to_owned(),
        _ => String::new(),
    };
    RegistryError::Status { host, status, what: ask.what(), hint }
}
