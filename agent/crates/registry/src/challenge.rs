//! `WWW-Authenticate`: what a registry wants (RFC 9110, section 11.6.1).

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// A challenge that can be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best one of an answer's: tokens rather than passwords.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut all: Vec<Self> = values.flat_map(Self::parse).collect();
        all.sort_by_key(|challenge| *challenge == Self::Basic);
        all.into_iter().next()
    }

    /// All challenges of one header that are known.
    fn parse(header: &str) -> Vec<Self> {
        let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
        let mut rest = header;
        while let Some((word, after)) = word(rest) {
            let (value, after) = match after.trim_start().strip_prefix('=') {
                // The padding of a scheme's one value, which no scheme known here has.
                Some(value) if found.is_empty() || value.starts_with('=') => {
                    rest = value.trim_start_matches('=');
                    continue;
                }
                Some(value) => value_of(value.trim_start()),
                None => {
                    found.push((word.to_ascii_lowercase(), Vec::new()));
                    rest = after;
                    continue;
                }
            };
            if let Some((_, parameters)) = found.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        }
        found.into_iter().filter_map(|(scheme, parameters)| Self::known(&scheme, &parameters)).collect()
    }

    fn known(scheme: &str, parameters: &[(String, String)]) -> Option<Self> {
        let parameter = |name: &str| {
            let found = parameters.iter().find(|(key, value)| key == name && !value.is_empty());
            found.map(|(_, value)| value.clone())
        };
        match scheme {
            "basic" => Some(Self::Basic),
            "bearer" => Some(Self::Bearer {
                realm: parameter("realm")?,
                service: parameter("service"),
                scope: parameter("scope"),
            }),
            _ => None,
        }
    }
}

/// The next word, after separators, and what follows it.
fn word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start_matches([' ', '\t', ',']);
    let end = text.find([' ', '\t', ',', '=']).unwrap_or(text.len());
    let (word, after) = text.split_at(end);
    if word.is_empty() && after.is_empty() { None } else { Some((word, after)) }
}

/// A parameter's value, quoted or not, and what follows it.
fn value_of(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        let (value, after) = text.split_at(end);
        return (value.to_owned(), after);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, quoted.get(at + 1..).unwrap_or("")),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenges() {
        let full = bearer("https://auth.x/token", Some("reg"), Some("repository:a/b:pull,push"));
        let table: &[(&str, Vec<Challenge>)] = &[
            (
                r#"Bearer realm="https://auth.x/token",service="reg",scope="repository:a/b:pull,push""#,
                vec![full.clone()],
            ),
            (
                r#"bearer  realm = "https://auth.x/token" , service=reg, scope="repository:a/b:pull,push""#,
                vec![full.clone()],
            ),
            (
                "Bearer realm=https://auth.x/token,service=reg",
                vec![bearer("https://auth.x/token", Some("reg"), None)],
            ),
            (r#"Bearer realm="a\"b""#, vec![bearer("a\"b", None, None)]),
            (r#"Basic realm="x""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            (
                r#"Negotiate, Basic realm="a, b", Bearer realm="r",error="invalid_token""#,
                vec![Challenge::Basic, bearer("r", None, None)],
            ),
            (r#"Negotiate dGVzdA==, Bearer realm="r""#, vec![bearer("r", None, None)]),
            (r#"Bearer service="without a realm""#, vec![]),
            (r#"Bearer realm="never closed"#, vec![bearer("never closed", None, None)]),
            ("", vec![]),
            ("=,=\"", vec![]),
        ];
        for (header, wanted) in table {
            assert_eq!(Challenge::parse(header), *wanted, "{header}");
        }
    }

    #[test]
    fn anything_is_parsed_to_an_end() {
        let alphabet = ["Bearer", "Basic", "realm", "=", "==", ",", " ", "\t", "\"", "\\", "x", "é"];
        let mut state = 7_u64;
        for _ in 0..20_000 {
            let mut header = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                header.push_str(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            assert!(Challenge::parse(&header).len() <= 12, "{header}");
        }
    }

    #[test]
    fn tokens_are_preferred_over_several_headers() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Basic realm=\"x\"".parse().expect("a value"));
        headers.append(WWW_AUTHENTICATE, "Bearer realm=\"r\"".parse().expect("a value"));
        assert_eq!(Challenge::of(&headers), Some(bearer("r", None, None)));
        assert_eq!(Challenge::of(&HeaderMap::new()), None);
    }
}
