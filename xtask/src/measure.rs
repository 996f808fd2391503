//! Time to ready: from the question for an image to the command's output, in several ways.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::containerd::Containerd;
use crate::run::script;
use crate::sluice::{Registry, Sluice};

/// A way to start a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// containerd: pull, unpack, run.
    FullPull,
    /// sluice, no index published: everything is pulled, and indexed on the way.
    FirstPull,
    /// sluice, with an index.
    Streamed,
    /// The same, and another node published a profile.
    Profile,
    /// The same, and a start pack.
    Pack,
    /// sluice, everything local.
    Local,
}

impl Way {
    pub(crate) const ALL: [Self; 6] =
        [Self::FullPull, Self::FirstPull, Self::Streamed, Self::Profile, Self::Pack, Self::Local];

    /// For tables.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::FullPull => "containerd, full pull",
            Self::FirstPull => "sluice, first pull (no index)",
            Self::Streamed => "sluice, streamed",
            Self::Profile => "sluice, with profile",
            Self::Pack => "sluice, with profile and start pack",
            Self::Local => "sluice, everything local",
        }
    }
}

/// One start.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Start {
    /// Until the command's output was there and the container had ended.
    pub(crate) ready_s: f64,
    /// Bytes of bodies the registry sent until then.
    pub(crate) bytes: u64,
    /// Peak resident memory of the daemon.
    pub(crate) peak_bytes: u64,
}

/// What starts are measured with.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) binary: &'a Path,
    pub(crate) work: PathBuf,
    pub(crate) registry: &'a Registry,
    pub(crate) containerd: &'a Containerd,
    /// `--store` of the published index.
    pub(crate) index_store: String,
    /// What the command must say.
    pub(crate) says: Option<&'static str>,
}

impl Bench<'_> {
    /// Publishes the image's index beforehand, as a CI pipeline does.
    pub(crate) fn index(&self, image: &str) -> Result<String> {
        let sluice = Sluice::new(self.binary, &self.work.join("index"), "")?;
        sluice.run(&["index", "--store", &self.index_store, image])
    }

    /// Starts a container once, from nothing local and cold caches.
    pub(crate) fn start(&self, way: Way, image: &str, command: &[&str]) -> Result<Start> {
        match way {
            Way::FullPull => {
                self.cold()?;
                let start = Instant::now();
                let said = self.containerd.pull_and_run(image, command)?;
                let measured = self.measured(start, &said, 0)?;
                self.containerd.forget(image)?;
                Ok(measured)
            }
            Way::FirstPull => self.with_sluice(
                "publish_index = false\nindex_store = \"file:///nonexistent-sluice\"\n",
                image,
                command,
                &[],
            ),
            Way::Streamed => {
                let config = format!("index_store = {:?}\n[prefetch]\nenabled = false\n", self.index_store);
                self.with_sluice(&config, image, command, &[])
            }
            Way::Profile => self.with_sluice(&self.learned("profile"), image, command, &[]),
            Way::Pack => self.with_sluice(&self.learned("pack"), image, command, &[]),
            Way::Local => {
                let config = format!("index_store = {:?}\n", self.index_store);
                self.with_sluice(&config, image, command, &["pull", image])
            }
        }
    }

    /// `index_store` of an index with what another node learned.
    fn learned(&self, kind: &str) -> String {
        format!("index_store = \"{}-{kind}\"\n", self.index_store)
    }

    /// Another node starts the container once and publishes what it learned: with a start pack, and without. Bytes of the pack.
    pub(crate) fn learn(&self, image: &str, command: &[&str]) -> Result<u64> {
        let mut pack = 0;
        for kind in ["profile", "pack"] {
            let sluice = Sluice::new(self.binary, &self.work.join("learning"), &self.learned(kind))?;
            sluice.run(&["index", image])?;
            sluice.run(&[&["trace", "record", image][..], command].concat())?;
            sluice.run(&["pull", image])?;
            let push: &[&str] = if kind == "pack" { &["--pack"] } else { &[] };
            let said = sluice.run(&[&["profile", "push"][..], push, &[image]].concat())?;
            let bytes = said.split_once("start pack of ").and_then(|(_, rest)| rest.split(' ').next());
            pack = bytes.map_or(Ok(pack), str::parse).context("the size of the start pack is not told")?;
        }
        Ok(pack)
    }

    /// `before` is done before the start is measured.
    fn with_sluice(&self, config: &str, image: &str, command: &[&str], before: &[&str]) -> Result<Start> {
        let none = self.work.join("no-indexes");
        let config = config.replace("/nonexistent-sluice", &none.to_string_lossy());
        let sluice = Sluice::new(self.binary, &self.work.join("sluice"), &config)?;
        sluice.start_daemon()?;
        if !before.is_empty() {
            sluice.run(before)?;
        }
        self.cold()?;
        let start = Instant::now();
        let said = sluice.run(&[&["run", image][..], command].concat())?;
        let mut measured = self.measured(start, &said, 0)?;
        let peak = sluice.status()?.get("resident_peak_bytes").and_then(serde_json::Value::as_u64);
        measured.peak_bytes = peak.context("the daemon does not tell its memory")?;
        Ok(measured)
    }

    fn cold(&self) -> Result<()> {
        script("sync; echo 3 > /proc/sys/vm/drop_caches", &[])?;
        self.registry.reset()
    }

    fn measured(&self, start: Instant, said: &str, peak_bytes: u64) -> Result<Start> {
        let ready_s = start.elapsed().as_secs_f64();
        if let Some(word) = self.says.filter(|word| !said.contains(word)) {
            bail!("the container said `{said}` instead of `{word}`");
        }
        Ok(Start { ready_s, bytes: self.registry.bytes_sent()?, peak_bytes })
    }
}

/// The middle of some numbers.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match (numbers.len() % 2, numbers.get(middle), numbers.get(middle.saturating_sub(1))) {
        (0, Some(high), Some(low)) => (high + low) / 2.0,
        (_, Some(one), _) => *one,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).is_nan());
    }
}
