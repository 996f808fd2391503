//! Where the output of runnables goes: one JSON object a line in the job's directory, in the form of the cloud's log entries,
//! or files below `logsPath`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sluice_batch::{Destination, Job, Plan};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};

use super::dir::JobDir;
use super::journal::now;

/// Longer lines are cut into several.
const MAX_LINE: u64 = 64 << 10;
pub(crate) const LOG: &str = "log";

/// One line of output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub(crate) timestamp: String,
    /// `INFO` for standard output, `ERROR` for standard error.
    pub(crate) severity: String,
    pub(crate) text_payload: String,
    pub(crate) labels: Labels,
}

/// Whose line it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Labels {
    pub(crate) job_uid: String,
    pub(crate) task_group_name: String,
    /// `task/UID-group0-INDEX/ATTEMPT/0`.
    pub(crate) task_id: String,
    pub(crate) task_index: usize,
    /// Display name, or else the number.
    pub(crate) runnable: String,
}

/// Where `logsPath` is: below a disk's mount path it is in the directory that stands for the disk.
pub(crate) fn logs_path(job: &Job, plan: &Plan, dir: &JobDir) -> Option<PathBuf> {
    let policy = job.logs_policy.as_ref().filter(|policy| policy.destination == Some(Destination::Path))?;
    let path = Path::new(policy.logs_path.as_deref()?);
    let below = plan.devices.iter().find_map(|(device, mount)| {
        Some(dir.path("volumes").join(device).join(path.strip_prefix(mount).ok()?))
    });
    Some(below.unwrap_or_else(|| path.to_path_buf()))
}

/// A task's file below `logsPath`.
pub(crate) fn task_file(logs_path: &Path, uid: &str, task: usize) -> PathBuf {
    logs_path.join(format!("output-{uid}-group0-{task}.log"))
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Output {
    uid: String,
    to: To,
}

#[derive(Debug)]
enum To {
    Log(Mutex<File>),
    /// Files by task.
    Files(PathBuf),
}

fn appended(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    file.with_context(|| format!("cannot open the log {}", path.display()))
}

impl Output {
    pub(super) fn open(dir: &JobDir, uid: &str, logs_path: Option<PathBuf>) -> Result<Self> {
        let to = match logs_path {
            Some(path) => {
                std::fs::create_dir_all(&path)
                    .with_context(|| format!("cannot make logsPath {}", path.display()))?;
                To::Files(path)
            }
            None => To::Log(Mutex::new(appended(&dir.path(LOG))?)),
        };
        Ok(Self { uid: uid.to_owned(), to })
    }

    /// Where the output of a runnable goes.
    pub(super) fn of(self: &Arc<Self>, task: usize, attempt: u32, runnable: &str) -> Result<RunnableOutput> {
        let labels = Labels {
            job_uid: self.uid.clone(),
            task_group_name: "group0".to_owned(),
            task_id: format!("task/{}-group0-{task}/{attempt}/0", self.uid),
            task_index: task,
            runnable: runnable.to_owned(),
        };
        let file = match &self.to {
            To::Log(_) => None,
            To::Files(path) => Some(appended(&task_file(path, &self.uid, task))?),
        };
        Ok(RunnableOutput { output: Arc::clone(self), labels, file })
    }
}

/// The way of a runnable's lines.
#[derive(Debug)]
pub(super) struct RunnableOutput {
    output: Arc<Output>,
    labels: Labels,
    file: Option<File>,
}

impl RunnableOutput {
    /// Copies lines until all writers closed their end.
    pub(super) async fn copy(self, from: impl AsyncRead + Unpin, severity: &str) -> Result<()> {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await;
            if read.context("cannot read a runnable's output")? == 0 {
                return Ok(());
            }
            self.write(&line, severity)?;
        }
    }

    fn write(&self, line: &[u8], severity: &str) -> Result<()> {
        match (&self.file, &self.output.to) {
            (Some(file), _) => (&*file).write_all(line),
            (None, To::Log(log)) => {
                let text = String::from_utf8_lossy(line);
                let mut entry = serde_json::to_vec(&Entry {
                    timestamp: now(),
                    severity: severity.to_owned(),
                    text_payload: text.trim_end_matches('\n').to_owned(),
                    labels: self.labels.clone(),
                })?;
                entry.push(b'\n');
                log.lock().unwrap_or_else(PoisonError::into_inner).write_all(&entry)
            }
            (None, To::Files(_)) => Ok(()),
        }
        .context("cannot write a runnable's output")
    }
}
