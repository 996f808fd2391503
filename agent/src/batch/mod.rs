//! Batch jobs on this machine: a directory and a process for each.
//!
//! What a job document means is known to the crate `batch`; here it is run.

mod barrier;
mod cgroup;
mod cluster;
mod dir;
mod journal;
mod login;
mod output;
mod runner;
mod step;
mod task;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use sluice_batch::{Change, JobState, JobStatus, Plan};

pub(crate) use cluster::{ClusterJobs, status};
pub(crate) use dir::{Cluster, JobDir, Meta, Wish};
pub(crate) use journal::now;
pub(crate) use output::{Entry, LOG, logs_path, task_file};
pub(crate) use runner::{processors, run};

use crate::config::Config;
use journal::{Journal, read_status};

const RUNNER_LOG: &str = "runner.log";

/// Starts the process that runs a job, and waits until it does.
pub(crate) fn start_runner(dir: &JobDir) -> Result<Child> {
    let log_path = dir.path(RUNNER_LOG);
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("cannot open {}", log_path.display()))?;
    let mut command = Command::new(crate::program::own()?);
    command.args(dir.meta()?.options).arg("batch-runner").arg(dir.id());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).current_dir("/").process_group(0);
    let mut child = command.spawn().context("cannot start the job's process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot hear from the job's process")?;
    }
    if line.trim() != "ready" {
        child.wait().context("cannot wait for the job's process")?;
        if dir.runner()?.is_some() {
            // A daemon that started at this moment was first.
            return Ok(child);
        }
        let log = std::fs::read_to_string(&log_path).unwrap_or_default();
        let reason = log.lines().last().unwrap_or("it wrote no log");
        bail!("the job's process did not start: {reason} (log: {})", log_path.display());
    }
    Ok(child)
}

/// The first thing that happens to a job.
pub(crate) fn queue(dir: &JobDir, tasks: usize) -> Result<()> {
    Journal::open(dir, tasks)?.append([Change::Job { state: JobState::Queued, reason: None }])
}

/// Whether somebody should run the job and nobody does.
fn is_orphan(dir: &JobDir) -> Result<bool> {
    if dir.meta()?.cluster.is_some() || dir.runner()?.is_some() {
        return Ok(false);
    }
    Ok(!local_status(dir)?.state.is_final() || dir.wish() == Wish::Delete)
}

/// Goes on with the jobs whose process died, as at a reboot.
pub(crate) fn resume(config: &Config) -> Result<()> {
    for dir in JobDir::list(config)? {
        let resumed = is_orphan(&dir).and_then(|orphan| {
            if !orphan {
                return Ok(());
            }
            let mut child = start_runner(&dir)?;
            tracing::info!(job = dir.id(), pid = child.id(), "a job whose process had died goes on");
            // Reaped, so that its number is free for others.
            std::thread::Builder::new().name("batch-job".to_owned()).spawn(move || child.wait())?;
            Ok(())
        });
        if let Err(error) = resumed {
            tracing::error!(job = dir.id(), error = format!("{error:#}"), "a job does not go on");
        }
    }
    Ok(())
}

/// The status of a job of this machine.
fn local_status(dir: &JobDir) -> Result<JobStatus> {
    let plan = Plan::of(&dir.job()?, processors()).context("the job has no task specification")?;
    read_status(dir, plan.task_count)
}
