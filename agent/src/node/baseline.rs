//! What earlier starts were like, and what became worse since: against the same image before, against the version before it,
//! and against another kernel.
//!
//! A file per repository and entry point has the latest starts. A finding is told once a day at most, however many starts show it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sluice_regress::{Finding, Limits, Start, compare};

/// Starts kept of a repository and entry point.
const KEPT: usize = 120;
/// Starts of the base that are looked at.
const BASE: usize = 20;
/// The same finding again only after so many seconds.
const SILENCE: u64 = 24 * 3600;

/// See the module text.
#[derive(Debug)]
pub(super) struct Baselines {
    dir: PathBuf,
    writing: Mutex<()>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    starts: Vec<Start>,
    /// When each finding was told.
    told: BTreeMap<String, u64>,
}

impl Baselines {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, writing: Mutex::default() }
    }

    /// Adds a start; what became worse with it and those before it, and against what.
    pub(super) fn add(
        &self,
        start: Start,
        limits: &Limits,
        now: u64,
    ) -> Result<Vec<(&'static str, Finding)>> {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(&start);
        let mut kept: Kept = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            read => {
                let bytes = read.with_context(|| format!("cannot read {}", path.display()))?;
                serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                    tracing::warn!(path = %path.display(), %error, "a damaged baseline is begun anew");
                    Kept::default()
                })
            }
        };
        kept.starts.push(start);
        let surplus = kept.starts.len().saturating_sub(KEPT);
        kept.starts.drain(..surplus);
        kept.told.retain(|_, at| now.saturating_sub(*at) < SILENCE);
        let mut found = Vec::new();
        for (against, key, finding) in worse(&kept.starts, limits) {
            if kept.told.insert(key, now).is_none() {
                found.push((against, finding));
            }
        }
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&kept)?)
            .and_then(|()| std::fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(found)
    }

    fn path(&self, start: &Start) -> PathBuf {
        let name = format!("{}\0{}", repository(&start.reference), start.entry);
        let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
        let name: String = digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(name).with_extension("json")
    }
}

/// A reference without tag and digest.
fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or(reference);
    match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    }
}

/// What became worse with the latest start and its like: against what, a name for the finding, the finding.
fn worse(starts: &[Start], limits: &Limits) -> Vec<(&'static str, String, Finding)> {
    let Some(last) = starts.last() else { return Vec::new() };
    let like = |other: &Start| other.image == last.image && other.kernel == last.kernel;
    let own: Vec<&Start> = starts.iter().filter(|one| like(one)).collect();
    let (before, now) = own.split_at(own.len().saturating_sub(limits.starts.max(1)));
    let latest = |wanted: &dyn Fn(&Start) -> bool| starts.iter().rev().find(|one| wanted(one));
    let version = latest(&|one| one.image != last.image && one.kernel == last.kernel);
    let kernel = latest(&|one| one.image == last.image && one.kernel != last.kernel);
    let like_other = |other: Option<&Start>| -> Vec<&Start> {
        let other = other.map(|one| (&one.image, &one.kernel));
        starts.iter().filter(|one| Some((&one.image, &one.kernel)) == other).collect()
    };
    let bases = [
        ("the same image before", before.to_vec()),
        ("the version of the image before", like_other(version)),
        ("the same image on another kernel", like_other(kernel)),
    ];
    let mut found = Vec::new();
    let own = |starts: &[&Start]| {
        starts.iter().rev().take(BASE).rev().map(|one| (*one).clone()).collect::<Vec<Start>>()
    };
    for (against, base) in bases {
        for finding in compare(&own(&base), &own(now), limits).findings {
            let key = format!("{against} {} {} {}", last.image, last.kernel, finding.kind.name());
            found.push((against, key, finding));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(number: u64, image: &str, kernel: &str, ready_ms: u64) -> Start {
        Start {
            image: image.to_owned(),
            reference: "host:5000/app:1".to_owned(),
            kernel: kernel.to_owned(),
            began_at: number,
            ready_ns: Some((ready_ms + number % 7) * 1_000_000),
            ..Start::default()
        }
    }

    #[test]
    fn a_finding_is_told_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let baselines = Baselines::new(dir.path().to_owned());
        let limits = Limits::default();
        let add = |number, image, kernel, ready_ms, now| {
            let found = baselines.add(start(number, image, kernel, ready_ms), &limits, now).expect("kept");
            found
                .into_iter()
                .map(|(against, finding)| format!("{against}: {}", finding.what))
                .collect::<Vec<_>>()
        };
        for number in 0..10 {
            assert!(add(number, "a", "1", 1000, number).is_empty());
        }
        // Slower from the eleventh on: known with the fifth slow one, and said no more after.
        let said: Vec<String> = (10..20).flat_map(|number| add(number, "a", "1", 1500, number)).collect();
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].starts_with("the same image before: time to ready went from 1.00 s to 1.50 s"),
            "{said:?}"
        );
        // Another version, slower still; then another kernel.
        let said: Vec<String> = (20..26).flat_map(|number| add(number, "b", "1", 2500, number)).collect();
        assert!(said.len() == 1 && said[0].starts_with("the version of the image before"), "{said:?}");
        let said: Vec<String> = (26..32).flat_map(|number| add(number, "b", "2", 3500, number)).collect();
        assert!(said.len() == 1 && said[0].starts_with("the same image on another kernel"), "{said:?}");
        // A damaged file is no reason to fail.
        for entry in std::fs::read_dir(dir.path()).expect("a directory") {
            std::fs::write(entry.expect("an entry").path(), "no JSON").expect("written");
        }
        assert!(add(40, "b", "2", 3500, 40).is_empty());
    }

    #[test]
    fn repositories() {
        assert_eq!(repository("host:5000/a/b:1@sha256:00"), "host:5000/a/b");
        assert_eq!(repository("host:5000/a/b"), "host:5000/a/b");
    }
}
