//! Whether an image may be streamed: the node's switch, and the lists of image patterns.
//!
//! Asked for new images only: what is mounted stays.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Node;
use crate::api::NodeStatus;
use crate::config::Config;
use crate::pattern::fits;

/// The switch and the lists.
#[derive(Debug)]
pub(super) struct Switch {
    /// There while the node is switched off by command, so that it stays so over restarts.
    mark: PathBuf,
    enabled: bool,
    allow: Vec<String>,
    deny: Vec<String>,
}

impl Switch {
    pub(super) fn open(config: &Config) -> Result<Self> {
        Ok(Self {
            mark: config.root.join("streaming-disabled"),
            enabled: config.streaming_enabled,
            allow: config.allow.clone(),
            deny: config.deny.clone(),
        })
    }

    fn set(&self, on: bool) -> Result<()> {
        let done = if on { remove(&self.mark) } else { std::fs::write(&self.mark, "") };
        done.with_context(|| format!("cannot change {}", self.mark.display()))
    }

    /// Why no image is streamed.
    fn off(&self) -> Option<String> {
        if !self.enabled {
            return Some("streaming is switched off by the configuration".to_owned());
        }
        self.mark.exists().then(|| "streaming is switched off on this node".to_owned())
    }

    /// Why this image is not.
    fn refuses(&self, reference: &str) -> Option<String> {
        if let Some(pattern) = self.deny.iter().find(|pattern| fits(pattern, reference)) {
            return Some(format!("the configuration denies it (`{pattern}`)"));
        }
        let allowed = self.allow.iter().any(|pattern| fits(pattern, reference));
        (!allowed).then(|| "the configuration does not allow it".to_owned())
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Node {
    /// Why a new image is not streamed.
    pub(super) fn refuses(&self, reference: &str) -> Option<String> {
        self.cannot_stream.clone().or_else(|| self.switch.off()).or_else(|| self.switch.refuses(reference))
    }

    /// Switches streaming of new images on or off.
    pub(crate) fn set_streaming(&self, on: bool) -> Result<()> {
        self.switch.set(on)
    }

    pub(crate) fn node_status(&self) -> NodeStatus {
        let reason = self.cannot_stream.clone().or_else(|| self.switch.off());
        NodeStatus {
            streaming: reason.is_none(),
            reason,
            snapshotter: self.config.snapshotter_socket(),
            images_in_use: self.lock(&self.images).len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deny_wins_and_the_switch_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let list = |patterns: &[&str]| patterns.iter().map(|one| (*one).to_owned()).collect();
        let switch = || Switch {
            mark: dir.path().join("mark"),
            enabled: true,
            allow: list(&["registry.example/*"]),
            deny: list(&["*/secret:*"]),
        };
        assert_eq!(switch().refuses("registry.example/app:1"), None);
        assert!(switch().refuses("registry.example/secret:1").is_some());
        assert!(switch().refuses("other.example/app:1").is_some());
        switch().set(false).expect("off");
        assert!(switch().off().is_some());
        switch().set(true).expect("on");
        switch().set(true).expect("on again");
        assert_eq!(switch().off(), None);
    }
}
