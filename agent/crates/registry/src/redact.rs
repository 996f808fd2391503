//! Addresses as they may be shown: without queries, which may be signed, and without user names and passwords.

use std::fmt;

use zeroize::Zeroize;

/// Host and port of an address.
pub(crate) fn host_of(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(url) => {
            let host = url.host_str().unwrap_or("").to_owned();
            url.port().map_or(host.clone(), |port| format!("{host}:{port}"))
        }
        Err(_) => "an address that is none".to_owned(),
    }
}

/// Whether two addresses have the same scheme, host and port.
pub(crate) fn same_origin(one: &str, other: &str) -> bool {
    match (url::Url::parse(one), url::Url::parse(other)) {
        (Ok(one), Ok(other)) => one.origin() == other.origin(),
        _ => false,
    }
}

/// A text in which all addresses are shown without their secrets.
pub(crate) fn without_secrets(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, word) in text.split(' ').enumerate() {
        if at > 0 {
            out.push(' ');
        }
        let Some((scheme, rest)) = word.split_once("://") else {
            out.push_str(word);
            continue;
        };
        let rest = rest.split(['?', '#']).next().unwrap_or("");
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        out.push_str(&format!("{scheme}://{host}{path}"));
    }
    out
}

/// A value whose text never reaches a log, and whose memory is overwritten when it goes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(pub(crate) String);

impl Secret {
    /// Takes the text over.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("..")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out() {
        let table = [
            ("GET https://u:p@s3.x/a?X-Amz-Signature=abc failed", "GET https://s3.x/a failed"),
            ("s3://key:secret@bucket/p", "s3://bucket/p"),
            ("(https://x/y?sig=1)", "(https://x/y"),
            ("no address? none", "no address? none"),
        ];
        for (text, wanted) in table {
            assert_eq!(without_secrets(text), wanted);
        }
        assert_eq!(host_of("https://u:p@h:8443/x?y"), "h:8443");
        assert_eq!(host_of("https://h/x"), "h");
        assert!(same_origin("https://h/a", "https://h:443/b"));
        assert!(!same_origin("https://h/a", "http://h/a"));
        assert!(!format!("{:?}", Secret("hidden".to_owned())).contains("hidden"));
    }
}
