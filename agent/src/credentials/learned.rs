//! Credentials that the CRI handed over with pulls: kept in memory and, for the next agent, in a file of the state directory
//! that only root reads. The state directory is on tmpfs, so they reach no disk and go with a reboot.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sluice_registry::{Client, Credentials, Secret};
use zeroize::Zeroizing;

const NAME: &str = "credentials.json";
/// Of one repository, the last ones: those of other tenants may be taken back.
const PER_REPOSITORY: usize = 4;
/// Repositories; the ones that were pulled longest ago go.
const REPOSITORIES: usize = 2000;

/// By host and repository.
type Key = (String, String);

/// See the module text.
#[derive(Debug)]
pub(crate) struct Learned {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last pull's first.
    all: HashMap<Key, Vec<Entry>>,
    /// Counts pulls.
    clock: u64,
}

#[derive(Debug, Clone)]
struct Entry {
    credentials: Credentials,
    /// A pull with them succeeded.
    proved: bool,
    /// Pulls under way with them.
    trials: usize,
    last: u64,
}

/// As in the file.
#[derive(Serialize, Deserialize)]
struct Kept {
    host: String,
    repository: String,
    user: Option<String>,
    #[serde(serialize_with = "exposed", deserialize_with = "secret")]
    secret: Secret,
}

fn exposed<S: serde::Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose())
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
    String::deserialize(deserializer).map(Secret::new)
}

/// A pull that is under way with credentials. Dropped, it failed.
#[derive(Debug)]
pub(crate) struct Trial {
    learned: Arc<Learned>,
    key: Key,
    credentials: Credentials,
}

impl Learned {
    /// Takes over what an earlier agent learned. What cannot be read is logged, and learned anew.
    pub(crate) fn open(state: &Path) -> Self {
        let path = state.join(NAME);
        let mut known = Known::default();
        match read(&path) {
            Ok(kept) => {
                for one in kept.into_iter().rev() {
                    let credentials = match one.user {
                        Some(user) => Credentials::Password(user, one.secret),
                        None => Credentials::Identity(one.secret),
                    };
                    known.note((one.host, one.repository), credentials).proved = true;
                }
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "credentials of earlier pulls are lost");
            }
        }
        Self { path, known: Mutex::new(known) }
    }

    /// Those for a repository, the last pull's first.
    pub(crate) fn get(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let known = self.lock();
        let of_repository = known.all.get(&(host.to_owned(), repository.to_owned()));
        of_repository.into_iter().flatten().map(|entry| entry.credentials.clone()).collect()
    }

    /// A pull begins: its layers are read with these from now on.
    pub(crate) fn begin(self: &Arc<Self>, image: &str, credentials: Credentials) -> Result<Trial> {
        let reference = Client::parse(image)?;
        let key = (reference.registry().to_owned(), reference.repository().to_owned());
        self.lock().note(key.clone(), credentials.clone()).trials += 1;
        Ok(Trial { learned: Arc::clone(self), key, credentials })
    }

    fn write(&self, known: &Known) -> Result<()> {
        let mut proved: Vec<(&Key, &Entry)> = known
            .all
            .iter()
            .flat_map(|(key, entries)| entries.iter().map(move |entry| (key, entry)))
            .filter(|(_, entry)| entry.proved)
            .collect();
        proved.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.last));
        let kept: Vec<Kept> =
            proved.into_iter().map(|(key, entry)| Kept::new(key, &entry.credentials)).collect();
        let text = Zeroizing::new(serde_json::to_vec(&kept)?);
        let new = self.path.with_extension("new");
        let write = || -> std::io::Result<()> {
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            std::fs::rename(&new, &self.path)
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trial {
    /// It succeeded: the next agent will know the credentials too.
    pub(crate) fn succeeded(self) -> Result<()> {
        let mut known = self.learned.lock();
        known.of(&self.key, &self.credentials).for_each(|entry| entry.proved = true);
        self.learned.write(&known)
    }
}

impl Drop for Trial {
    /// What did not help is forgotten, unless it helped before.
    fn drop(&mut self) {
        let mut known = self.learned.lock();
        known
            .of(&self.key, &self.credentials)
            .for_each(|entry| entry.trials = entry.trials.saturating_sub(1));
        if let Some(entries) = known.all.get_mut(&self.key) {
            entries.retain(|entry| entry.proved || entry.trials > 0);
        }
    }
}

impl Known {
    fn of(&mut self, key: &Key, credentials: &Credentials) -> impl Iterator<Item = &mut Entry> {
        let entries = self.all.get_mut(key).into_iter().flatten();
        entries.filter(move |entry| entry.credentials == *credentials)
    }

    /// Puts credentials in front of their repository's.
    fn note(&mut self, key: Key, credentials: Credentials) -> &mut Entry {
        if self.all.len() >= REPOSITORIES && !self.all.contains_key(&key) {
            let newest = |entries: &[Entry]| entries.iter().map(|entry| entry.last).max();
            let oldest =
                self.all.iter().min_by_key(|(_, entries)| newest(entries)).map(|(key, _)| key.clone());
            oldest.map(|oldest| self.all.remove(&oldest));
        }
        self.clock += 1;
        let entries = self.all.entry(key).or_default();
        let place = entries.iter().position(|entry| entry.credentials == credentials);
        let mut entry = match place {
            Some(place) => entries.remove(place),
            None => Entry { credentials, proved: false, trials: 0, last: 0 },
        };
        entry.last = self.clock;
        while entries.len() >= PER_REPOSITORY {
            // What never helped goes first: pulls that fail again and again must not drive out what works.
            let place = entries.iter().rposition(|entry| !entry.proved).unwrap_or(entries.len() - 1);
            entries.remove(place);
        }
        entries.insert(0, entry);
        &mut entries[0]
    }
}

impl Kept {
    fn new((host, repository): &Key, credentials: &Credentials) -> Self {
        let (user, secret) = match credentials {
            Credentials::Password(user, password) => (Some(user.clone()), password),
            Credentials::Identity(token) => (None, token),
        };
        let secret = secret.clone();
        Self { host: host.clone(), repository: repository.clone(), user, secret }
    }
}

fn read(path: &Path) -> Result<Vec<Kept>> {
    let text = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => Zeroizing::new(text.with_context(|| format!("cannot read {}", path.display()))?),
    };
    // Its message may quote what is there.
    serde_json::from_slice(&text).map_err(|_quoting| anyhow::anyhow!("{} is damaged", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn password(text: &str) -> Credentials {
        Credentials::Password("user".to_owned(), Secret::new(text.to_owned()))
    }

    #[test]
    fn what_helped_is_kept_for_the_next_agent_and_what_did_not_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let learned = Arc::new(Learned::open(dir.path()));
        let good = learned.begin("r.example/app:1", password("good")).expect("an image");
        assert_eq!(learned.get("r.example", "app"), [password("good")], "while the pull is under way");
        good.succeeded().expect("written");
        let bad = learned.begin("r.example/app:2", password("bad")).expect("an image");
        assert_eq!(learned.get("r.example", "app"), [password("bad"), password("good")]);
        drop(bad);
        assert_eq!(learned.get("r.example", "app"), [password("good")]);
        // Taken back at the registry: a failed pull with what helped before does not forget it.
        let again = learned.begin("r.example/app:1", password("good")).expect("an image");
        drop(again);
        assert_eq!(learned.get("r.example", "app"), [password("good")]);
        assert!(learned.get("r.example", "other").is_empty());

        let path = dir.path().join(NAME);
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
        let identity = Credentials::Identity(Secret::new("refresh".to_owned()));
        let other = learned.begin("docker.io/library/app", identity.clone()).expect("an image");
        other.succeeded().expect("written");
        let next = Learned::open(dir.path());
        assert_eq!(next.get("r.example", "app"), [password("good")]);
        assert_eq!(next.get("docker.io", "library/app"), [identity]);
        assert!(!format!("{next:?}").contains("good"), "secrets are not shown");
        std::fs::write(&path, "[{\"secret\":").expect("written");
        assert!(Learned::open(dir.path()).get("r.example", "app").is_empty(), "damaged");
    }

    #[test]
    fn the_last_few_of_a_repository_are_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let learned = Arc::new(Learned::open(dir.path()));
        for number in 0..10 {
            let trial = learned.begin("r.example/app", password(&number.to_string())).expect("an image");
            trial.succeeded().expect("written");
        }
        let wanted: Vec<_> = (6..10).rev().map(|number| password(&number.to_string())).collect();
        assert_eq!(learned.get("r.example", "app"), wanted);
        assert_eq!(Learned::open(dir.path()).get("r.example", "app"), wanted);
    }
}
