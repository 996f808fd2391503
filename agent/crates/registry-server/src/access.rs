//! Who may read what: name and password at each request, or tokens from `/_sluice/token` (distribution's token
//! specification) that expire. Off until `Server::set_access` names accounts.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use hyper::{Request, StatusCode};
use serde_json::json;

use crate::serve::{error, json_answer, parameter, set};
use crate::trial::Body;

/// Accounts, and how they show who they are.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Nobody else gets anything.
    pub accounts: Vec<Account>,
    /// Life of tokens; none: name and password with each request.
    pub token_life: Option<Duration>,
}

/// One account.
#[derive(Debug, Clone)]
pub struct Account {
    /// User name.
    pub name: String,
    /// Password.
    pub password: String,
    /// Repositories that it may use.
    pub repositories: Vec<String>,
}

/// What is demanded, and the tokens that were given out.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    access: Mutex<Option<Access>>,
    tokens: Mutex<HashMap<String, (String, Instant)>>,
}

impl Gate {
    pub(crate) fn set(&self, access: Option<Access>) {
        *self.access.lock().unwrap_or_else(PoisonError::into_inner) = access;
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The answer to a request that may not pass.
    pub(crate) fn refuses<B>(
        &self,
        request: &Request<B>,
        repository: Option<&str>,
    ) -> Option<hyper::Response<Body>> {
        let access = self.access.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let account = match access.token_life {
            None => header.and_then(|header| access.by_password(header)),
            Some(_) => header.and_then(|header| self.by_token(&access, header)),
        };
        let Some(account) = account else {
            let host = request.headers().get(HOST).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let mut response = error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "log in first");
            let challenge = match access.token_life {
                None => "Basic realm=\"sluice\"".to_owned(),
                Some(_) => {
                    let scope = repository.map(|name| format!(",scope=\"repository:{name}:pull\""));
                    let scope = scope.unwrap_or_default();
                    format!("Bearer realm=\"http://{host}/_sluice/token\",service=\"sluice\"{scope}")
                }
            };
            set(&mut response, WWW_AUTHENTICATE.as_str(), &challenge);
            return Some(response);
        };
        let allowed = repository.is_none_or(|name| account.repositories.iter().any(|one| one == name));
        (!allowed).then(|| error(StatusCode::FORBIDDEN, "DENIED", "not for this account"))
    }

    /// `GET /_sluice/token`: a token for whoever shows name and password.
    pub(crate) fn token<B>(&self, request: &Request<B>) -> hyper::Response<Body> {
        let access = self.access.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(account) = header.and_then(|header| access.by_password(header)) else {
            return error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "no such account");
        };
        // Servers of tokens refuse what the account may not have.
        let scope = parameter(request.uri().query().unwrap_or(""), "scope").unwrap_or_default();
        let asked = scope.strip_prefix("repository:").and_then(|rest| rest.rsplit_once(':'));
        if asked.is_some_and(|(name, _)| !account.repositories.iter().any(|one| one == name)) {
            return error(StatusCode::FORBIDDEN, "DENIED", "not for this account");
        }
        let life = access.token_life.unwrap_or(Duration::from_secs(60));
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        tokens.retain(|_, (_, end)| *end > now);
        let mut random = [0; 16];
        if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random).is_err() {
            return error(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "no random numbers");
        }
        let token = hex::encode(random);
        tokens.insert(token.clone(), (account.name.clone(), now + life));
        let answer = json!({ "token": token, "expires_in": life.as_secs() });
        json_answer(StatusCode::OK, "application/json", &answer)
    }

    fn by_token<'a>(&self, access: &'a Access, header: &str) -> Option<&'a Account> {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, end) = tokens.get(header.strip_prefix("Bearer ")?)?;
        if *end <= Instant::now() {
            return None;
        }
        access.accounts.iter().find(|account| account.name == *name)
    }
}

impl Access {
    fn by_password(&self, header: &str) -> Option<&Account> {
        self.accounts.iter().find(|account| {
            let shown = STANDARD.encode(format!("{}:{}", account.name, account.password));
            header.strip_prefix("Basic ") == Some(&shown)
        })
    }
}
