//! What the next agent must know to go on: which images are in use, and by whom.
//!
//! It is kept in the state directory, which a reboot empties as it ends mounts and processes. Files of streamed layers are
//! known by the server of block files, which outlives the agent.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::api::{Holder, Served};

const NAME: &str = "images.json";

/// An image in use.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct KeptImage {
    pub(super) manifest_digest: String,
    pub(super) reference: String,
    pub(super) served: Served,
    pub(super) fell_back: Option<String>,
    pub(super) lower_dirs: Vec<PathBuf>,
    /// The EROFS mount; none for one that was unpacked.
    pub(super) mount: Option<PathBuf>,
    pub(super) layers: Vec<String>,
    pub(super) holders: Vec<KeptHolder>,
}

/// A holder, and what tells a process from a later one of the same number.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct KeptHolder {
    holder: Holder,
    started: Option<u64>,
}

impl KeptHolder {
    pub(super) fn new(holder: &Holder) -> Self {
        Self { holder: holder.clone(), started: started(holder) }
    }

    /// The holder, if it is still there.
    pub(super) fn alive(&self) -> Option<Holder> {
        let alive = match &self.holder {
            Holder::Process(_) => self.started.is_some() && started(&self.holder) == self.started,
            // Only the snapshotter, which is part of the agent, could have released it.
            Holder::Snapshot(_) => true,
            // Its command may be about to mount it: what is no mount point after a while goes with the next `gc`.
            Holder::MountPoint(_) => true,
        };
        alive.then(|| self.holder.clone())
    }
}

/// When a process started, in clock ticks since the boot (field 22 of proc_pid_stat(5)).
fn started(holder: &Holder) -> Option<u64> {
    let Holder::Process(pid) = holder else { return None };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold anything but ends with the last parenthesis.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// Writes the whole list, or leaves the former one.
pub(super) fn write(state: &Path, images: &[KeptImage]) -> Result<()> {
    let (path, new) = (state.join(NAME), state.join(".images.json"));
    std::fs::write(&new, serde_json::to_vec(images)?)
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What the last agent wrote; nothing if there was none.
pub(super) fn read(state: &Path) -> Result<Vec<KeptImage>> {
    let path = state.join(NAME);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => serde_json::from_slice(&read.with_context(|| format!("cannot read {}", path.display()))?)
            .with_context(|| format!("{} is damaged", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut own = KeptHolder::new(&Holder::Process(std::process::id()));
        assert!(own.alive().is_some());
        own.started = own.started.map(|started| started + 1);
        assert!(own.alive().is_none(), "another process of the same number");
        assert!(KeptHolder::new(&Holder::Process(u32::MAX)).alive().is_none());
        assert!(KeptHolder::new(&Holder::MountPoint("/proc".into())).alive().is_some());
    }

    #[test]
    fn the_list_survives() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(read(dir.path()).expect("none is no error").is_empty());
        let image = KeptImage {
            manifest_digest: "sha256:1".to_owned(),
            reference: "r".to_owned(),
            served: Served::Streamed,
            fell_back: None,
            lower_dirs: vec!["/l".into()],
            mount: Some("/m".into()),
            layers: Vec::new(),
            holders: vec![KeptHolder::new(&Holder::MountPoint("/proc".into()))],
        };
        write(dir.path(), &[image]).expect("written");
        let read = read(dir.path()).expect("read");
        assert_eq!(read.len(), 1);
        assert!(read[0].holders[0].alive().is_some());
    }
}
