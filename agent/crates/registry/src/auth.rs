//! Credentials and tokens: Docker's `config.json` with its helpers, bearer tokens (distribution's token specification), basic.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use docker_credential::DockerCredential;
use serde::Deserialize;

use crate::RegistryError;

/// Tokens without a stated life live this long (the specification's default is 60 s).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used in the last seconds of its life.
const MARGIN: Duration = Duration::from_secs(5);

/// The value of an `Authorization` header. Its text never reaches a log.
#[derive(Clone)]
pub(crate) struct Authorization(pub(crate) String);

impl fmt::Debug for Authorization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Authorization(..)")
    }
}

/// Tokens by realm-independent key (host and scope), with their end.
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
        let end = Instant::now() + life.saturating_sub(MARGIN);
        self.known.insert((host.to_owned(), scope.to_owned()), (token, end));
    }

    pub(crate) fn forget(&mut self, host: &str, scope: &str) {
        self.known.remove(&(host.to_owned(), scope.to_owned()));
    }
}

/// What a registry wants, from `WWW-Authenticate`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    pub(crate) fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut fields = HashMap::new();
        let mut rest = rest;
        while let Some((key, after)) = rest.split_once("=\"") {
            let (value, after) = after.split_once('"')?;
            fields.insert(key.trim_matches([',', ' ']).to_ascii_lowercase(), value.to_owned());
            rest = after;
        }
        let realm = fields.remove("realm")?;
        Some(Self::Bearer { realm, service: fields.remove("service"), scope: fields.remove("scope") })
    }
}

/// Credentials for `registry` from Docker's configuration, helpers included. Blocks on a helper.
pub(crate) fn credentials(
    config: Option<&Path>,
    registry: &str,
) -> Result<Option<(String, String)>, RegistryError> {
    let Some(file) = config.and_then(|path| std::fs::File::open(path).ok()) else { return Ok(None) };
    let name = if registry == "docker.io" { "https://index.docker.io/v1/" } else { registry };
    match docker_credential::get_credential_from_reader(file, name) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(Some((user, password))),
        // Distribution: an identity token is a refresh token; registries take it as the password of this user.
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(("<token>".to_owned(), token))),
        Err(
            docker_credential::CredentialRetrievalError::NoCredentialConfigured
            | docker_credential::CredentialRetrievalError::ConfigNotFound,
        ) => Ok(None),
        Err(error) => Err(RegistryError::Config(format!("credentials of {registry}: {error}"))),
    }
}

pub(crate) fn basic((user, password): &(String, String)) -> Authorization {
    Authorization(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Asks a token server.
pub(crate) async fn fetch_token(
    http: &reqwest::Client,
    realm: &str,
    service: Option<&str>,
    scope: &str,
    credentials: Option<&(String, String)>,
) -> Result<(Authorization, Duration), RegistryError> {
    let host = realm.split('/').nth(2).unwrap_or(realm).to_owned();
    let mut query = vec![("scope", scope)];
    query.extend(service.map(|service| ("service", service)));
    let mut request = http.get(realm).query(&query);
    if let Some((user, password)) = credentials {
        request = request.basic_auth(user, Some(password));
    }
    let unreachable = |error: reqwest::Error| RegistryError::Unreachable {
        host: host.clone(),
        reason: crate::client::reason(&error),
    };
    let answer = request.send().await.map_err(unreachable)?;
    if !answer.status().is_success() {
        return Err(RegistryError::Status {
            host,
            status: answer.status().as_u16(),
            what: format!("the request for a token for {scope}"),
            hint: "; check the credentials in Docker's config.json",
        });
    }
    let answer: TokenAnswer = answer.json().await.map_err(unreachable)?;
    let Some(token) = answer.token.or(answer.access_token) else {
        return Err(RegistryError::Protocol {
            host,
            what: "the request for a token".to_owned(),
            reason: "there is no token in it".to_owned(),
        });
    };
    let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs);
    Ok((Authorization(format!("Bearer {token}")), life))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let header = r#"Bearer realm="https://auth.x/token",service="reg",scope="repository:a/b:pull""#;
        let want = Challenge::Bearer {
            realm: "https://auth.x/token".to_owned(),
            service: Some("reg".to_owned()),
            scope: Some("repository:a/b:pull".to_owned()),
        };
        assert_eq!(Challenge::parse(header), Some(want));
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Negotiate"), None);
    }

    #[test]
    fn tokens_end_and_secrets_are_not_shown() {
        let mut tokens = Tokens::default();
        tokens.put("h", "s", Authorization("Bearer secret".to_owned()), Duration::from_secs(60));
        assert!(tokens.get("h", "s").is_some());
        tokens.put("h", "s", Authorization("Bearer secret".to_owned()), Duration::from_secs(1));
        assert!(tokens.get("h", "s").is_none());
        assert!(!format!("{tokens:?}").contains("secret"));
    }
}
