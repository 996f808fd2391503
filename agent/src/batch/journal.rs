//! A job's journal: records appended, and a status folded from them.
//!
//! A record is one write of one line. One that was cut by a crash is the last, has no line end, and did not happen. Final
//! states are durable before anything follows from them.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result};
use chrono::{DateTime, SecondsFormat, Utc};
use sluice_batch::{Change, JobStatus, Record};

use super::dir::JobDir;

const NAME: &str = "journal";

/// Now, as RFC 3339 has it.
pub(crate) fn now() -> String {
    DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// Written by the process that runs the job.
#[derive(Debug)]
pub(super) struct Journal {
    state: Mutex<(File, JobStatus)>,
}

impl Journal {
    /// Opens it for writing; what a crash cut is taken away.
    pub(super) fn open(dir: &JobDir, tasks: usize) -> Result<Self> {
        let path = dir.path(NAME);
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        let bytes = dir.read(NAME)?;
        let whole = whole_lines(&bytes);
        if whole.len() < bytes.len() {
            file.set_len(whole.len() as u64).with_context(|| format!("cannot mend {}", path.display()))?;
        }
        Ok(Self { state: Mutex::new((file, fold(whole, tasks)?)) })
    }

    fn lock(&self) -> MutexGuard<'_, (File, JobStatus)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the status.
    pub(super) fn with<T>(&self, look: impl FnOnce(&JobStatus) -> T) -> T {
        look(&self.lock().1)
    }

    /// Writes what happened. What does not follow from the status is not written.
    pub(super) fn append(&self, changes: impl IntoIterator<Item = Change>) -> Result<()> {
        let time = now();
        let mut state = self.lock();
        let (file, status) = &mut *state;
        let mut lines = Vec::new();
        let mut durable = false;
        for change in changes {
            durable |= match &change {
                Change::Job { .. } => true,
                Change::Task { state, .. } => state.is_final(),
                Change::Image { .. } => false,
            };
            let record = Record { time: time.clone(), change };
            if status.apply(&record) {
                serde_json::to_writer(&mut lines, &record).context("cannot write a record")?;
                lines.push(b'\n');
            } else {
                tracing::debug!(?record, "does not follow");
            }
        }
        file.write_all(&lines).context("cannot write the job's journal")?;
        if durable {
            file.sync_data().context("cannot make the job's journal durable")?;
        }
        Ok(())
    }
}

/// The status of a job that others run.
pub(crate) fn read_status(dir: &JobDir, tasks: usize) -> Result<JobStatus> {
    match std::fs::read(dir.path(NAME)) {
        Ok(bytes) => fold(whole_lines(&bytes), tasks),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(JobStatus::new(tasks)),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", dir.path(NAME).display())),
    }
}

fn whole_lines(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    bytes.get(..end).unwrap_or_default()
}

fn fold(lines: &[u8], tasks: usize) -> Result<JobStatus> {
    let mut status = JobStatus::new(tasks);
    for (number, line) in lines.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty())
    {
        let record: Record = serde_json::from_slice(line)
            .with_context(|| format!("line {} of the job's journal is damaged", number + 1))?;
        status.apply(&record);
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_was_cut_did_not_happen() {
        let queued = br#"{"time":"t","change":"job","state":"QUEUED"}"#;
        let mut bytes = queued.to_vec();
        bytes.push(b'\n');
        let whole = bytes.len();
        bytes.extend_from_slice(&queued[..20]);
        assert_eq!(whole_lines(&bytes).len(), whole);
        assert_eq!(fold(whole_lines(&bytes), 1).expect("folded").status_events.len(), 1);
        assert!(fold(b"{\n", 1).is_err());
    }
}
