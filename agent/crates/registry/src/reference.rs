//! References in the usual notation: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`, with docker.io's defaults.
//!
//! The grammar is distribution's (github.com/distribution/reference, `regexp.go`, `normalize.go`). `oci_spec` has it as one regular
//! expression, which takes 85 ms and 15 MB to compile: as long as the rest of a start's resolution. A test compares the two.

use oci_spec::distribution::Reference;

const DOCKER: &str = "docker.io";
/// What docker.io was called.
const DOCKER_LEGACY: &str = "index.docker.io";
const MAX_REPOSITORY_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;

/// `None`: it is no reference.
pub(crate) fn parse(text: &str) -> Option<Reference> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    // A colon before the last slash is a port's.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if !digest.is_none_or(is_digest) || !tag.is_none_or(is_tag) {
        return None;
    }
    let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
    let (host, path) = match name.split_once('/') {
        Some((first, path)) if is_host(first) => (first, path),
        _ => (DOCKER, name),
    };
    // The grammar takes what is no host's name for a component (`a_0.a/0`), though what comes of it is a host.
    let fits = is_domain(host) || name.split('/').all(is_component);
    if !fits || !path.split('/').all(is_component) {
        return None;
    }
    let host = if host == DOCKER_LEGACY { DOCKER } else { host };
    let repository =
        if host == DOCKER && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
    if repository.len() > MAX_REPOSITORY_BYTES {
        return None;
    }
    let (host, tag, digest) = (host.to_owned(), tag.map(str::to_owned), digest.map(str::to_owned));
    Some(match (tag, digest) {
        (None, None) => Reference::with_tag(host, repository, "latest".to_owned()),
        (Some(tag), None) => Reference::with_tag(host, repository, tag),
        (None, Some(digest)) => Reference::with_digest(host, repository, digest),
        (Some(tag), Some(digest)) => Reference::with_tag_and_digest(host, repository, tag, digest),
    })
}

fn is_domain(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        let ends = bytes.first().into_iter().chain(bytes.last());
        !label.is_empty()
            && ends.copied().all(|byte| byte.is_ascii_alphanumeric())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

/// Lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between them.
fn is_component(text: &str) -> bool {
    let is_letter = |char: char| char.is_ascii_lowercase() || char.is_ascii_digit();
    let between = text.trim_matches(is_letter);
    let edges_are_letters = text.starts_with(is_letter) && text.ends_with(is_letter);
    let is_separator = |run: &str| matches!(run, "." | "_" | "__") || run.bytes().all(|byte| byte == b'-');
    edges_are_letters && between.split(is_letter).all(is_separator)
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

pub(crate) fn is_digest(text: &str) -> bool {
    let length = match text.split_once(':') {
        Some(("sha256", _)) => 64,
        Some(("sha384", _)) => 96,
        Some(("sha512", _)) => 128,
        _ => return false,
    };
    let hex = text.split_once(':').map_or("", |(_, hex)| hex);
    hex.len() == length && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn theirs(text: &str) -> Option<Reference> {
        let found: Reference = text.parse().ok()?;
        // Theirs takes `FOO/bar` for a repository of docker.io, which no registry does.
        (!found.repository().bytes().any(|byte| byte.is_ascii_uppercase())).then_some(found)
    }

    #[test]
    fn usual_references_are_what_oci_spec_says() {
        let digest = format!("sha256:{}", "0f".repeat(32));
        for text in [
            "busybox",
            "busybox:1.36",
            "user/app",
            "localhost/app",
            "localhost:5000/a/b__c:v1",
            "registry.example:443/a.b/c-d---e",
            "index.docker.io/busybox",
            "docker.io/library/busybox",
            "test.com:5000",
            "a/b_c.com:8080",
            "a_0.a/0",
            "a_0.a:1/0",
            "a-.a/0",
            "a..b/c",
            "UPPER/case",
            "Host.example/a",
            "",
            "a//b",
            "a/",
            ":tag",
            "a:",
            "-a",
            "a..b",
            "a___b",
            "host.example:/a",
            "a b",
        ] {
            assert_eq!(parse(text), theirs(text), "{text}");
            let pinned = format!("{text}@{digest}");
            assert_eq!(parse(&pinned), theirs(&pinned), "{pinned}");
        }
        for text in ["a@sha256:0f", "a@md5:00000000000000000000000000000000", "a@", "a@@"] {
            assert_eq!((parse(text), theirs(text)), (None, None), "{text}");
        }
        assert_eq!(parse("a").unwrap().whole(), "docker.io/library/a:latest");
    }

    proptest! {
        #[test]
        fn whatever_is_a_reference_to_oci_spec_is_one(text in "[a-zA-Z0-9.:/_@-]{0,24}") {
            prop_assert_eq!(parse(&text), theirs(&text), "{}", text);
        }

        #[test]
        fn what_looks_like_a_reference_is_understood_as_by_oci_spec(
            text in "([a-zA-Z0-9.-]{1,6}(:[0-9]{0,3})?/)?[a-z0-9._-]{1,8}(/[a-z0-9._-]{1,8})?(:[a-zA-Z0-9._-]{0,6})?"
        ) {
            prop_assert_eq!(parse(&text), theirs(&text), "{}", text);
        }
    }
}
