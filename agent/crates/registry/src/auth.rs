//! Credentials and tokens: Docker's `config.json` with its helpers, bearer tokens (distribution's token specification), basic.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use reqwest::header::CONTENT_TYPE;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::RegistryError;
use crate::health::retry_after;
use crate::redact::{Secret, host_of};
use crate::transport::{bounded, transport_error};

/// Tokens without a stated life live this long (the specification's default is 60 s).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used in the last seconds of its life.
const MARGIN: Duration = Duration::from_secs(5);
/// Answers of token servers are a few KiB.
const MAX_ANSWER: usize = 1 << 20;
/// How long a login by name and password is used before the configuration is read again.
pub(crate) const BASIC_LIFE: Duration = Duration::from_secs(3600);

/// The value of an `Authorization` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Authorization(pub(crate) Secret);

/// Tokens by host and scope, with their end.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    known: HashMap<(String, String), (Authorization, Instant)>,
}

impl Tokens {
    pub(crate) fn get(&self, host: &str, scope: &str) -> Option<Authorization> {
        let (token, end) = self.known.get(&(host.to_owned(), scope.to_owned()))?;
        (Instant::now() < *end).then(|| token.clone())
    }

    pub(crate) fn put(&mut self, host: &str, scope: &str, token: Authorization, life: Duration) {
        let now = Instant::now();
        self.known.retain(|_, (_, end)| *end > now);
        // A life no clock can hold is as good as a day.
        let end = now.checked_add(life.saturating_sub(MARGIN)).unwrap_or(now + Duration::from_secs(86_400));
        self.known.insert((host.to_owned(), scope.to_owned()), (token, end));
    }

    /// Forgets a token that was refused, unless somebody put a newer one there.
    pub(crate) fn forget(&mut self, host: &str, scope: &str, refused: &Authorization) {
        let key = (host.to_owned(), scope.to_owned());
        if self.known.get(&key).is_some_and(|(token, _)| token == refused) {
            self.known.remove(&key);
        }
    }
}

/// How somebody is known to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User and password.
    Password(String, Secret),
    /// Docker's `identitytoken`: a refresh token of OAuth 2.
    Identity(Secret),
}

/// Where credentials come from besides Docker's configuration.
pub trait CredentialSource: std::fmt::Debug + Send + Sync {
    /// Credentials for a repository at the host that asks for them, those that are likeliest to be right first. Blocks the
    /// thread; what cannot be had is left out, and logged.
    fn credentials(&self, host: &str, repository: &str) -> Vec<Credentials>;
}

/// Credentials for `registry` from Docker's configuration, helpers included. Blocks on a helper. A file that is not there
/// holds none; one that cannot be read or understood is an error.
pub(crate) fn credentials(
    config: Option<&Path>,
    registry: &str,
) -> Result<Option<Credentials>, RegistryError> {
    let Some(path) = config else { return Ok(None) };
    let bad =
        |why: String| RegistryError::Config(format!("Docker's configuration {}: {why}", path.display()));
    let text = match std::fs::read(path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(format!("it cannot be read: {error}"))),
    };
    // The position alone: the rest of a parser's message may quote what is there.
    let syntax = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text);
    syntax.map_err(|error| {
        bad(format!("it is not valid JSON, line {} column {}", error.line(), error.column()))
    })?;
    let name = if registry == "docker.io" { "https://index.docker.io/v1/" } else { registry };
    match docker_credential::get_credential_from_reader(text.as_slice(), name) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(Some(Credentials::Password(user, Secret(password))))
        }
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Credentials::Identity(Secret(token)))),
        Err(CredentialRetrievalError::NoCredentialConfigured | CredentialRetrievalError::ConfigNotFound) => {
            Ok(None)
        }
        // What docker-credential-helpers defines for "there are none".
        Err(CredentialRetrievalError::HelperFailure { stdout, .. })
            if stdout.trim() == "credentials not found in native keychain" =>
        {
            Ok(None)
        }
        // Not its output, which may hold secrets.
        Err(CredentialRetrievalError::HelperFailure { helper, .. }) => {
            Err(bad(format!("{helper} failed; run `echo {name} | {helper} get` to see why")))
        }
        Err(CredentialRetrievalError::ConfigReadError) => {
            Err(bad("its `auths`, `credsStore` or `credHelpers` are not as they should be".to_owned()))
        }
        Err(error) => Err(bad(format!("the credentials of {registry}: {error}"))),
    }
}

/// The header for name and password.
pub(crate) fn basic(user: &str, password: &Secret) -> Authorization {
    let pair = Zeroizing::new(format!("{user}:{}", password.0));
    Authorization(Secret(format!("Basic {}", *Zeroizing::new(STANDARD.encode(pair.as_bytes())))))
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Where a token comes from, and for what.
#[derive(Debug)]
pub(crate) struct TokenRequest<'a> {
    pub(crate) realm: &'a str,
    pub(crate) service: Option<&'a str>,
    /// One or more, separated by spaces.
    pub(crate) scope: &'a str,
}

impl TokenRequest<'_> {
    /// Asks the token server: by GET with name and password or nothing, by POST (OAuth 2) with an identity token.
    /// `busy` hears for how long it wants to be left alone.
    pub(crate) async fn fetch(
        &self,
        http: &reqwest::Client,
        credentials: Option<&Credentials>,
        busy: impl Fn(Duration),
    ) -> Result<(Authorization, Duration), RegistryError> {
        let host = host_of(self.realm);
        let answer = self.request(http, credentials).send().await;
        let answer = answer.map_err(|error| transport_error(&host, &error))?;
        let what = format!("the request for a token for {}", self.scope);
        if !answer.status().is_success() {
            if let Some(wait) = retry_after(answer.headers(), SystemTime::now()) {
                busy(wait);
            }
            let hint = match (answer.status().as_u16(), credentials) {
                (400..=403, Some(Credentials::Identity(_))) => {
                    "; the login expired or was taken back: log in again"
                }
                (400..=403, Some(_)) => "; check the credentials",
                (400..=403, None) => {
                    "; there are no credentials for it: log in first, or give them to the agent"
                }
                _ => "",
            };
            let (status, hint) = (answer.status().as_u16(), hint.to_owned());
            return Err(RegistryError::Status { host, status, what, hint });
        }
        let bytes = bounded(answer, &host, &what, MAX_ANSWER).await?;
        let wrong =
            |reason: &str| RegistryError::Protocol { host: host.clone(), what, reason: reason.to_owned() };
        let Ok(answer) = serde_json::from_slice::<TokenAnswer>(&bytes) else {
            return Err(wrong("it is not valid JSON"));
        };
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        let Some(token) = token.map(Zeroizing::new) else { return Err(wrong("there is no token in it")) };
        let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs);
        Ok((Authorization(Secret(format!("Bearer {}", *token))), life))
    }

    fn request(&self, http: &reqwest::Client, credentials: Option<&Credentials>) -> reqwest::RequestBuilder {
        if let Some(Credentials::Identity(token)) = credentials {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token").append_pair("client_id", "sluice");
            form.append_pair("service", self.service.unwrap_or(""));
            form.append_pair("scope", self.scope).append_pair("refresh_token", &token.0);
            let post = http.post(self.realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
            return post.body(form.finish());
        }
        let mut query: Vec<(&str, &str)> = self.scope.split(' ').map(|scope| ("scope", scope)).collect();
        query.extend(self.service.map(|service| ("service", service)));
        let get = http.get(self.realm).query(&query);
        match credentials {
            Some(Credentials::Password(user, password)) => get.basic_auth(user, Some(&password.0)),
            _ => get,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Authorization {
        Authorization(Secret(format!("Bearer {text}")))
    }

    #[test]
    fn tokens_end_and_secrets_are_not_shown() {
        let mut tokens = Tokens::default();
        tokens.put("h", "s", token("secret"), Duration::from_secs(60));
        assert!(tokens.get("h", "s").is_some());
        assert!(!format!("{tokens:?}").contains("secret"));
        tokens.forget("h", "s", &token("an older one"));
        assert!(tokens.get("h", "s").is_some());
        tokens.forget("h", "s", &token("secret"));
        assert!(tokens.get("h", "s").is_none());
        tokens.put("h", "s", token("secret"), Duration::from_secs(1));
        assert!(tokens.get("h", "s").is_none());
        tokens.put("h", "s", token("secret"), Duration::from_secs(u64::MAX));
        assert!(tokens.get("h", "s").is_some());
        let credentials = Credentials::Password("user".to_owned(), Secret("secret".to_owned()));
        assert!(!format!("{credentials:?}").contains("secret"));
    }

    #[test]
    fn dockers_configuration() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config.json");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("written");
            credentials(Some(&path), "r.example")
        };
        assert_eq!(credentials(Some(&path), "r.example").expect("none"), None);
        assert_eq!(credentials(None, "r.example").expect("none"), None);
        assert_eq!(read("{}").expect("none"), None);
        let password = Credentials::Password("user".to_owned(), Secret("pass:word".to_owned()));
        let encoded = STANDARD.encode("user:pass:word");
        let text = format!(r#"{{"auths":{{"r.example":{{"auth":"{encoded}"}}}}}}"#);
        assert_eq!(read(&text).expect("some"), Some(password));
        let text = r#"{"auths":{"r.example":{"auth":"","identitytoken":"refresh"}}}"#;
        assert_eq!(read(text).expect("some"), Some(Credentials::Identity(Secret("refresh".to_owned()))));
        // Each names the file, none what is in it.
        for text in [
            "{\n  secret",
            "[\"secret\"]",
            r#"{"auths":"secret"}"#,
            r#"{"auths":{"r.example":{"auth":"secret"}}}"#,
        ] {
            let error = read(text).expect_err("refused").to_string();
            assert!(error.contains(&path.display().to_string()) && !error.contains("secret"), "{error}");
        }
        let error = credentials(Some(dir.path()), "r.example").expect_err("a directory").to_string();
        assert!(error.contains("cannot be read"), "{error}");
        let text = r#"{"credHelpers":{"r.example":"none-such-of-sluice"}}"#;
        assert!(read(text).is_err());
    }
}
