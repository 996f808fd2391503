//! Secrets of type `kubernetes.io/dockerconfigjson` (and `dockercfg`), as files: what a mounted Secret holds, or what the
//! operator put in place. Read at each look-up, so that a changed Secret counts at once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use sluice_registry::{Credentials, Secret};

use super::matching::{matches, weight};

/// Secrets have at most 1 MiB in Kubernetes.
const MAX_SECRET: u64 = 1 << 20;
/// A directory in a directory is a mounted Secret; kubelet's own `..data` link is one more.
const MAX_DEPTH: usize = 3;

/// A directory of them.
#[derive(Debug)]
pub(super) struct Secrets(PathBuf);

impl Secrets {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Those for a repository, the most particular first. A file that cannot be used is logged by its name only.
    pub(super) fn get(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let mut files = Vec::new();
        if let Err(error) = list(&self.0, MAX_DEPTH, &mut files) {
            tracing::warn!(path = %self.0.display(), %error, "pull secrets cannot be listed");
        }
        files.sort();
        let mut found = Vec::new();
        for file in files {
            match read(&file) {
                Ok(all) => found.extend(all.into_iter().filter(|(key, _)| matches(key, host, repository))),
                Err(error) => {
                    tracing::warn!(path = %file.display(), error = format!("{error:#}"), "a pull secret is not used");
                }
            }
        }
        found.sort_by_key(|(key, _)| std::cmp::Reverse(weight(key)));
        found.into_iter().map(|(_, credentials)| credentials).collect()
    }
}

fn list(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        // What kubelet's links of a mounted Secret point to is met through them.
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".."));
        if hidden {
            continue;
        }
        if path.is_dir() && depth > 0 {
            list(&path, depth - 1, files)?;
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<(String, Credentials)>> {
    if path.metadata()?.len() > MAX_SECRET {
        bail!("it is larger than {MAX_SECRET} bytes");
    }
    let text = std::fs::read(path)?;
    // The position alone: the rest of a parser's message may quote what is there.
    let whole: Map<String, Value> = serde_json::from_slice(&text).map_err(|error| {
        anyhow::anyhow!("it is not valid JSON, line {} column {}", error.line(), error.column())
    })?;
    let auths = match whole.get("auths") {
        Some(auths) => auths.as_object().context("its `auths` are no object")?,
        // `kubernetes.io/dockercfg` has the entries by themselves.
        None => &whole,
    };
    Ok(auths.iter().filter_map(|(key, entry)| Some((key.clone(), entry_credentials(entry)?))).collect())
}

/// One entry of `auths`: user and password, both in `auth`, or an identity token.
pub(super) fn entry_credentials(entry: &Value) -> Option<Credentials> {
    let field = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    if let Some(token) = field("identitytoken") {
        return Some(Credentials::Identity(Secret::new(token.to_owned())));
    }
    if let (Some(user), Some(password)) = (field("username"), field("password")) {
        return Some(Credentials::Password(user.to_owned(), Secret::new(password.to_owned())));
    }
    user_and_password(field("auth")?)
}

/// Base64 of `user:password`.
pub(super) fn user_and_password(encoded: &str) -> Option<Credentials> {
    let text = String::from_utf8(STANDARD.decode(encoded).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Credentials::Password(user.to_owned(), Secret::new(password.trim_end_matches('\0').to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password(user.to_owned(), Secret::new(password.to_owned()))
    }

    #[test]
    fn a_mounted_secret_and_a_bad_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::new(dir.path().join("secrets"));
        assert!(secrets.get("r.example", "app").is_empty(), "there are none yet");
        // As kubelet mounts it: links into a directory that is replaced as a whole.
        let mounted = dir.path().join("secrets/team");
        std::fs::create_dir_all(mounted.join("..data")).expect("created");
        let text = format!(
            r#"{{"auths":{{"r.example":{{"auth":"{}"}},"r.example/team":{{"username":"t","password":"s"}}}}}}"#,
            STANDARD.encode("user:pass:word")
        );
        std::fs::write(mounted.join("..data/.dockerconfigjson"), text).expect("written");
        std::os::unix::fs::symlink("..data/.dockerconfigjson", mounted.join(".dockerconfigjson"))
            .expect("linked");
        std::fs::write(dir.path().join("secrets/broken"), "{").expect("written");
        assert_eq!(secrets.get("r.example", "app"), [password("user", "pass:word")]);
        assert_eq!(
            secrets.get("r.example", "team/app"),
            [password("t", "s"), password("user", "pass:word")],
            "the more particular first"
        );
        assert!(secrets.get("other.example", "app").is_empty());
        std::fs::write(dir.path().join("secrets/legacy"), r#"{"o.example":{"identitytoken":"refresh"}}"#)
            .expect("written");
        let identity = Credentials::Identity(Secret::new("refresh".to_owned()));
        assert_eq!(secrets.get("o.example", "app"), [identity]);
    }
}
