//! A job's directory: what it is, what happened to it, and who runs it.
//!
//! ```text
//! ROOT/batch/JOB/job.json       the document, as submitted
//!                meta.json      what else was said at its submission
//!                journal        one record a line; the job's state is folded from it
//!                runner         locked by the process that runs the job, and holding its number
//!                cancel delete  asked for
//!                log            output of its runnables, one JSON object a line
//!                volumes/NAME   what stands for disks
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use sluice_batch::{Job, parse, valid_job_id};

use crate::config::Config;

/// What was said beside the document.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Unique for ever.
    pub(crate) uid: String,
    /// RFC 3339.
    pub(crate) created: String,
    /// Fields that the reference ignores are supported.
    pub(crate) relaxed: bool,
    /// Options of the command line that the job's process gets too.
    pub(crate) options: Vec<String>,
    /// The job's place in a cluster; none: it runs on this machine.
    #[serde(default)]
    pub(crate) cluster: Option<Cluster>,
}

/// Where on Kubernetes a job is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Cluster {
    /// As given by `--kubeconfig`.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// As given by `--context`.
    pub(crate) context: Option<String>,
    /// As given by `--namespace`; the context's, once the job is there.
    pub(crate) namespace: Option<String>,
}

/// What somebody wants to become of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wish {
    /// To run.
    None,
    /// To end.
    Cancel,
    /// To be gone.
    Delete,
}

/// See the module text.
#[derive(Debug, Clone)]
pub(crate) struct JobDir {
    id: String,
    path: PathBuf,
}

/// Holds the runner's lock.
#[derive(Debug)]
pub(super) struct Held(#[expect(dead_code, reason = "held until it is dropped")] Flock<File>);

fn all(config: &Config) -> PathBuf {
    config.root.join("batch")
}

impl JobDir {
    /// Makes a job's directory: all of it, or nothing.
    pub(crate) fn create(config: &Config, id: &str, document: &[u8], meta: &Meta) -> Result<Self> {
        check_id(id)?;
        let parent = all(config);
        let made = Self { id: id.to_owned(), path: parent.join(id) };
        let staged = parent.join(format!(".new-{}", meta.uid));
        let staging = || -> io::Result<()> {
            // The document may hold secrets, and so may the output.
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&staged)?;
            write_durably(&staged.join("job.json"), document)?;
            write_durably(&staged.join("meta.json"), &serde_json::to_vec(meta)?)?;
            File::open(&staged)?.sync_all()?;
            fs::rename(&staged, &made.path)?;
            File::open(&parent)?.sync_all()
        };
        match staging() {
            Ok(()) => Ok(made),
            Err(error) => {
                remove_if_there(&staged)?;
                if error
                    .raw_os_error()
                    .is_some_and(|code| code == Errno::ENOTEMPTY as i32 || code == Errno::EEXIST as i32)
                {
                    bail!("there is a job `{id}` already");
                }
                Err(error).with_context(|| format!("cannot make {}", made.path.display()))
            }
        }
    }

    /// A job that was submitted.
    pub(crate) fn open(config: &Config, id: &str) -> Result<Self> {
        check_id(id)?;
        let path = all(config).join(id);
        if !path.join("meta.json").exists() {
            bail!("there is no job `{id}` here; `sluice batch list` shows them");
        }
        Ok(Self { id: id.to_owned(), path })
    }

    /// All jobs, by name.
    pub(crate) fn list(config: &Config) -> Result<Vec<Self>> {
        let parent = all(config);
        let entries = match fs::read_dir(&parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot list {}", parent.display()))?,
        };
        let mut jobs = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", parent.display()))?.path();
            let id = path.file_name().and_then(|name| name.to_str()).unwrap_or("").to_owned();
            if valid_job_id(&id) && path.join("meta.json").exists() {
                jobs.push(Self { id, path });
            }
        }
        jobs.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(jobs)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    pub(crate) fn meta(&self) -> Result<Meta> {
        serde_json::from_slice(&self.read("meta.json")?)
            .with_context(|| format!("{} is damaged", self.path("meta.json").display()))
    }

    pub(crate) fn job(&self) -> Result<Job> {
        Ok(parse(&self.read("job.json")?)?)
    }

    /// Becomes the one that runs the job; none if there is one.
    pub(super) fn hold(&self) -> Result<Option<Held>> {
        let path = self.path("runner");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                held.set_len(0)
                    .and_then(|()| write!(held, "{}", std::process::id()))
                    .with_context(|| format!("cannot write {}", path.display()))?;
                Ok(Some(Held(held)))
            }
            Err((_, Errno::EAGAIN)) => Ok(None),
            Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// The process that runs the job.
    pub(crate) fn runner(&self) -> Result<Option<Pid>> {
        let path = self.path("runner");
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.with_context(|| format!("cannot open {}", path.display()))?,
        };
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_free) => Ok(None),
            Err((_, Errno::EAGAIN)) => {
                let pid = text.parse().context("the job's process has only just begun; try again")?;
                Ok(Some(Pid::from_raw(pid)))
            }
            Err((_, errno)) => Err(errno).with_context(|| format!("cannot look at {}", path.display())),
        }
    }

    /// Tells whoever runs the job; says whether there is somebody.
    pub(crate) fn signal_runner(&self) -> Result<bool> {
        let Some(pid) = self.runner()? else { return Ok(false) };
        let pidfd = match sluice_kernel::process::pidfd_open(pid) {
            Err(Errno::ESRCH) => return Ok(false),
            pidfd => pidfd.context("cannot reach the job's process")?,
        };
        // Still it: the lock was held after the descriptor was there.
        if self.runner()? != Some(pid) {
            return Ok(false);
        }
        match sluice_kernel::process::pidfd_send_signal(&pidfd, Signal::SIGTERM) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno).context("cannot signal the job's process"),
        }
    }

    /// Writes a wish down, for good.
    pub(crate) fn wish_for(&self, wish: Wish) -> Result<()> {
        let name = match wish {
            Wish::None => return Ok(()),
            Wish::Cancel => "cancel",
            Wish::Delete => "delete",
        };
        let written = write_durably(&self.path(name), b"").and_then(|()| File::open(&self.path)?.sync_all());
        written.with_context(|| format!("cannot write {}", self.path(name).display()))
    }

    pub(crate) fn wish(&self) -> Wish {
        if self.path("delete").exists() {
            Wish::Delete
        } else if self.path("cancel").exists() {
            Wish::Cancel
        } else {
            Wish::None
        }
    }

    /// Removes the job. Its name is free at once.
    pub(crate) fn remove(&self) -> Result<()> {
        let gone = self.path.with_file_name(format!(".gone-{}-{}", self.id, std::process::id()));
        match fs::rename(&self.path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.with_context(|| format!("cannot remove {}", self.path.display()))?,
        }
        remove_if_there(&gone)
    }
}

fn check_id(id: &str) -> Result<()> {
    if !valid_job_id(id) {
        bail!(
            "`{id}` is not an identifier of a job: small letters, digits and hyphens, at most 63, a letter first and no hyphen last"
        );
    }
    Ok(())
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
