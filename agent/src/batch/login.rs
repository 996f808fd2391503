//! A registry's user name and password from a job document: put where `docker login` puts them, since images are fetched by the
//! daemon, also after the job, and it reads Docker's configuration.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value, json};

/// Docker's own name for its registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Makes them those of the registry of `image`. Blocks.
pub(super) fn login(config: Option<&Path>, image: &str, user: &str, password: &str) -> Result<()> {
    let path =
        config.context("there is no place for the image's username and password: set docker_config")?;
    let registry = match sluice_registry::Client::parse(image)?.registry() {
        "docker.io" | "index.docker.io" => DOCKER_HUB.to_owned(),
        other => other.to_owned(),
    };
    write(path, &registry, user, password)
        .with_context(|| format!("cannot put the image's username and password into {}", path.display()))
}

fn write(path: &Path, registry: &str, user: &str, password: &str) -> Result<()> {
    let dir = path.parent().context("it has no directory")?;
    fs::create_dir_all(dir)?;
    // Two jobs that begin at once must not lose each other's.
    let _held = Flock::lock(fs::File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let (mut config, mode) = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => (Map::new(), 0o600),
        read => (serde_json::from_slice(&read?)?, fs::metadata(path)?.permissions().mode()),
    };
    let auths = config.entry("auths").or_insert_with(|| json!({}));
    let auths = auths.as_object_mut().context("its `auths` are not as they should be")?;
    let wanted = json!({ "auth": STANDARD.encode(format!("{user}:{password}")) });
    if auths.get(registry) == Some(&wanted) {
        return Ok(());
    }
    auths.insert(registry.to_owned(), wanted);
    let staged = dir.join(format!(".sluice-{}.json", std::process::id()));
    let mut options = OpenOptions::new();
    let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&staged)?;
    file.write_all(&serde_json::to_vec_pretty(&Value::Object(config))?)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()?;
    Ok(fs::rename(&staged, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("docker/config.json");
        login(Some(&path), "r.example/app:1", "me", "se:cret").expect("written");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        login(Some(&path), "busybox", "you", "x").expect("written");
        let read: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("json");
        assert_eq!(read["auths"]["r.example"]["auth"], STANDARD.encode("me:se:cret"));
        assert_eq!(read["auths"][DOCKER_HUB]["auth"], STANDARD.encode("you:x"));
        assert!(login(None, "busybox", "you", "x").is_err());
    }
}
