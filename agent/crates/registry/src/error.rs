//! What can go wrong between this machine and a registry, and whether it may pass.
//!
//! Texts are for people and end up in logs: they name hosts and what was asked, never queries, tokens or headers.

/// Why a registry gave no answer that can be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The reference is malformed.
    #[error("`{reference}` is not an image reference: {reason}")]
    Reference {
        /// As given.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// The registry cannot be reached, or broke off.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The registry can be reached, but not trusted.
    #[error("no secure connection to {host}: {reason}")]
    Tls {
        /// Host and port.
        host: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The registry refused.
    #[error("{host} answered {status} to {what}{hint}")]
    Status {
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
        /// What was asked.
        what: String,
        /// What to do, beginning with `; `, or empty.
        hint: String,
    },
    /// The registry answered something else than what was asked for.
    #[error("{host} answered {what} wrongly: {reason}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What was asked.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// What came has another digest.
    #[error("{what}: the bytes that came are not it (digest mismatch)")]
    Digest {
        /// What was asked.
        what: String,
    },
    /// The image cannot be used.
    #[error("{reference}: {reason}")]
    Image {
        /// The image.
        reference: String,
        /// Why not.
        reason: String,
    },
    /// Configuration or credentials cannot be used.
    #[error("{0}")]
    Config(String),
    /// An object store failed.
    #[error("object store {url}: {reason}")]
    ObjectStore {
        /// Its address.
        url: String,
        /// Why.
        reason: String,
        /// Whether trying again may help.
        transient: bool,
    },
}

impl RegistryError {
    /// Whether the same request may succeed a little later: the registry is away, or too busy.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            // Of the server's own errors these two say that it never will.
            Self::Status { status, .. } => {
                matches!(status, 408 | 425 | 429 | 500..=599) && !matches!(status, 501 | 505)
            }
            Self::ObjectStore { transient, .. } => *transient,
            _ => false,
        }
    }

    /// Whether a read of what was granted before is worth waiting for: beside what is transient, refused credentials,
    /// which may be renewed, and answers that make no sense, as servers under repair give them.
    pub fn may_pass(&self) -> bool {
        let refused = matches!(self, Self::Status { status: 401 | 403, .. });
        self.is_transient() || refused || matches!(self, Self::Protocol { .. } | Self::Tls { .. })
    }

    /// Whether the registry says that it has no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: 404, .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass() {
        let status = |status| {
            let (host, what, hint) = ("r".to_owned(), "it".to_owned(), String::new());
            RegistryError::Status { host, status, what, hint }
        };
        let (host, reason) = ("r".to_owned(), "why".to_owned());
        let store = |transient| RegistryError::ObjectStore {
            url: "s3://b".to_owned(),
            reason: "why".to_owned(),
            transient,
        };
        // (error, transient, worth waiting for in a read)
        let table = [
            (status(400), false, false),
            (status(401), false, true),
            (status(403), false, true),
            (status(404), false, false),
            (status(408), true, true),
            (status(416), false, false),
            (status(429), true, true),
            (status(500), true, true),
            (status(501), false, false),
            (status(503), true, true),
            (RegistryError::Unreachable { host: host.clone(), reason: reason.clone() }, true, true),
            (RegistryError::Tls { host: host.clone(), reason: reason.clone() }, false, true),
            (RegistryError::Protocol { host, what: "it".to_owned(), reason: reason.clone() }, false, true),
            (RegistryError::Digest { what: "it".to_owned() }, false, false),
            (RegistryError::Config(reason), false, false),
            (store(true), true, true),
            (store(false), false, false),
        ];
        for (error, transient, may_pass) in table {
            assert_eq!((error.is_transient(), error.may_pass()), (transient, may_pass), "{error}");
        }
    }
}
