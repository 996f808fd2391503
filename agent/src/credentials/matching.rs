//! Which images a set of credentials is for, as kubelet decides it (`URLsMatchStr` in its `credentialprovider` package):
//! `host[:port][/path]`, where `*` stands for part of one label of the host and the path is a prefix.

use crate::pattern::fits;

/// Names of Docker Hub, which is one registry.
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Whether credentials for `pattern` are for a repository at `host`.
pub(super) fn matches(pattern: &str, host: &str, repository: &str) -> bool {
    let (pattern_host, path) = split(pattern);
    let hosts: &[&str] = if DOCKER_HUB.contains(&host) { &DOCKER_HUB } else { &[host] };
    hosts.iter().any(|host| host_matches(pattern_host, host)) && repository.starts_with(path)
}

/// Longer patterns say more: they come first.
pub(super) fn weight(pattern: &str) -> usize {
    let (host, path) = split(pattern);
    host.len() + path.len()
}

/// Host with its port, and path without what only says the API's version.
fn split(pattern: &str) -> (&str, &str) {
    let rest = pattern.split_once("://").map_or(pattern, |(_, rest)| rest);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path);
    (host, if matches!(path, "v1" | "v2") { "" } else { path })
}

fn host_matches(pattern: &str, host: &str) -> bool {
    let port = |text: &'_ str| text.rsplit_once(':').map(|(name, port)| (name.to_owned(), port.to_owned()));
    let (pattern, pattern_port) = port(pattern).unwrap_or((pattern.to_owned(), String::new()));
    let (host, host_port) = port(host).unwrap_or((host.to_owned(), String::new()));
    let labels = |name: &str| name.split('.').map(str::to_owned).collect::<Vec<_>>();
    let (wanted, given) = (labels(&pattern), labels(&host));
    pattern_port == host_port
        && wanted.len() == given.len()
        && wanted.iter().zip(&given).all(|(wanted, given)| fits(wanted, given))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_kubelet() {
        for (pattern, host, repository, wanted) in [
            ("registry.example", "registry.example", "team/app", true),
            ("registry.example", "registry.example:5000", "team/app", false),
            ("registry.example:5000", "registry.example:5000", "team/app", true),
            ("https://registry.example/v2/", "registry.example", "team/app", true),
            ("registry.example/team", "registry.example", "team/app", true),
            ("registry.example/team", "registry.example", "other/app", false),
            ("*.registry.example", "a.registry.example", "app", true),
            ("*.registry.example", "registry.example", "app", false),
            ("*.registry.example", "a.b.registry.example", "app", false),
            ("*.*.registry.example", "a.b.registry.example", "app", true),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "app", true),
            ("https://index.docker.io/v1/", "docker.io", "library/app", true),
            ("docker.io", "docker.io", "library/app", true),
            ("*", "registry.example", "app", false),
        ] {
            assert_eq!(matches(pattern, host, repository), wanted, "{pattern} {host}/{repository}");
        }
        assert!(weight("registry.example/team") > weight("registry.example"));
    }
}
