//! What was changed on the node, with what was there before: one JSON file, written before each change.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A file's bytes and what else uninstalling brings back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
    modified: SystemTime,
}

/// One file that was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Change {
    /// None: it was not there.
    before: Option<Before>,
    /// What was written; of a program only its length, since nobody edits it.
    after: After,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum After {
    Text(String),
    Program,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Record {
    root: PathBuf,
    /// The record's own place, relative to the root.
    path: PathBuf,
    saved: Saved,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    changes: BTreeMap<PathBuf, Change>,
    /// Directories that were made, outermost first.
    directories: Vec<PathBuf>,
}

/// A file as it is; `None` if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<Before>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let meta = path.metadata()?;
    Ok(Some(Before { bytes, mode: meta.mode() & 0o7777, modified: meta.modified()? }))
}

impl Record {
    pub(super) fn load(root: &Path, path: &Path) -> Result<Self> {
        let place = root.join(path);
        let saved = match read(&place)? {
            None => Saved::default(),
            Some(file) => serde_json::from_slice(&file.bytes)
                .with_context(|| format!("{} is not a record of an installation", place.display()))?,
        };
        Ok(Self { root: root.into(), path: path.into(), saved })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.saved.changes.is_empty()
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.saved.changes.keys()
    }

    /// Writes a file, after writing down what was there. What was there before the first installation is kept.
    pub(super) fn write(
        &mut self,
        path: &Path,
        before: Option<Before>,
        bytes: &[u8],
        mode: u32,
    ) -> Result<()> {
        let after = std::str::from_utf8(bytes).map_or(After::Program, |text| After::Text(text.to_owned()));
        let change =
            self.saved.changes.entry(path.to_path_buf()).or_insert(Change { before, after: After::Program });
        change.after = after;
        self.make_directories(path)?;
        self.save()?;
        put(&self.root.join(path), bytes, mode)
    }

    fn make_directories(&mut self, path: &Path) -> Result<()> {
        for file in [path.to_path_buf(), self.path.clone()] {
            let mut ancestors: Vec<&Path> = file.ancestors().skip(1).collect();
            ancestors.reverse();
            for dir in ancestors {
                let place = self.root.join(dir);
                if !place.exists() {
                    std::fs::create_dir(&place)
                        .with_context(|| format!("cannot create {}", place.display()))?;
                    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755))?;
                    self.saved.directories.push(dir.to_path_buf());
                }
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        put(&self.root.join(&self.path), &serde_json::to_vec(&self.saved)?, 0o600)
    }

    /// Brings everything back. `without_ours` takes our part out of a file that somebody changed since, or leaves it alone.
    pub(super) fn restore(self, without_ours: &dyn Fn(&Path, &str) -> Result<Option<String>>) -> Result<()> {
        for (path, change) in &self.saved.changes {
            let place = self.root.join(path);
            let now = read(&place)?;
            if let (Some(now), After::Text(after)) = (&now, &change.after)
                && now.bytes != after.as_bytes()
            {
                let text = String::from_utf8_lossy(&now.bytes);
                match without_ours(path, &text)? {
                    Some(text) => {
                        println!("{} was changed since: only Sluice's lines are taken out", place.display());
                        put(&place, text.as_bytes(), now.mode)?;
                    }
                    None => println!("{} was changed since: it stays", place.display()),
                }
                continue;
            }
            match &change.before {
                Some(before) => {
                    put(&place, &before.bytes, before.mode)?;
                    std::fs::File::options().write(true).open(&place)?.set_modified(before.modified)?;
                }
                None if now.is_some() => {
                    std::fs::remove_file(&place)
                        .with_context(|| format!("cannot remove {}", place.display()))?;
                }
                None => {}
            }
        }
        let own = self.root.join(&self.path);
        std::fs::remove_file(&own).with_context(|| format!("cannot remove {}", own.display()))?;
        for dir in self.saved.directories.iter().rev() {
            match std::fs::remove_dir(self.root.join(dir)) {
                // Somebody else put something there.
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.with_context(|| format!("cannot remove {}", dir.display()))?,
            }
        }
        Ok(())
    }
}

/// Replaces a file in one step: a program that runs keeps its old one.
fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".sluice-new");
    let staged = PathBuf::from(staged);
    let write = || -> std::io::Result<()> {
        let mut file =
            std::fs::File::options().write(true).create(true).truncate(true).mode(mode).open(&staged)?;
        file.write_all(bytes)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        std::fs::rename(&staged, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
