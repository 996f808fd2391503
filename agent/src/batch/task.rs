//! One attempt of a task: its runnables in order, those in the background, barriers, and what ends it early.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_batch::{Change, Outcome, RunKind, Step, TIMED_OUT, TaskState, UNKNOWN_FAILURE};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::barrier::Passing;
use super::runner::Context as JobContext;
use super::step::{Copies, Start, StepEnd};

/// How long output that is written already may take to be copied.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

/// Why the runnables of an attempt end now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// They do not.
    No,
    /// Those in the foreground are done.
    Done,
    /// The task ran as long as it may.
    TimedOut,
    /// The job is to end.
    Cancelled,
}

/// How an attempt ended, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) reason: Option<String>,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Attempt {
    job: Arc<JobContext>,
    task: usize,
    attempt: u32,
    ending: watch::Sender<Ending>,
    background: Vec<(Step, JoinHandle<Result<StepEnd>>)>,
    copies: Copies,
    /// Of the first runnable that failed.
    failure: Option<(i32, String)>,
}

impl Attempt {
    /// The `attempt`-th (from 0) of `task`; `stop` becomes true when the job is to end.
    pub(super) async fn run(
        job: Arc<JobContext>,
        task: usize,
        attempt: u32,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Ended> {
        let mut this = Self {
            job: Arc::clone(&job),
            task,
            attempt,
            ending: watch::Sender::new(Ending::No),
            background: Vec::new(),
            copies: Vec::new(),
            failure: None,
        };
        let ending = this.ending.clone();
        let early = async {
            let over = async {
                match job.plan.max_run {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => Ending::TimedOut,
                _ = stop.wait_for(|stop| *stop) => Ending::Cancelled,
            }
        };
        let ran = {
            let steps = this.steps();
            tokio::pin!(steps);
            tokio::select! {
                biased;
                ran = &mut steps => ran,
                early = early => {
                    ending.send_replace(early);
                    steps.await
                }
            }
        };
        let cleaned = this.clean().await;
        ran?;
        cleaned?;
        Ok(this.verdict())
    }

    fn verdict(&self) -> Ended {
        let failed =
            |code, reason: &str| Ended { outcome: Outcome::Failed(code), reason: Some(reason.to_owned()) };
        match (*self.ending.borrow(), &self.failure) {
            (Ending::Cancelled, _) => {
                Ended { outcome: Outcome::Cancelled, reason: Some("the job was ended".to_owned()) }
            }
            (Ending::TimedOut, _) => failed(TIMED_OUT, "the task ran longer than maxRunDuration"),
            (_, Some((code, reason))) => failed(*code, reason),
            (_, None) => Ended { outcome: Outcome::Well, reason: None },
        }
    }

    fn is_over(&self) -> bool {
        *self.ending.borrow() != Ending::No
    }

    async fn steps(&mut self) -> Result<()> {
        let job = Arc::clone(&self.job);
        let (groups, group, limits) = (job.groups.clone(), self.group(), job.limits);
        tokio::task::spawn_blocking(move || groups.create(&group, limits)).await??;
        job.journal.append([Change::Task {
            task: self.task,
            state: TaskState::Running,
            exit_code: None,
            reason: None,
        }])?;
        for (number, step) in job.plan.steps.iter().enumerate() {
            self.look_after_background().await?;
            if self.is_over() {
                break;
            }
            if self.failure.is_some() && !step.always_run {
                continue;
            }
            let failure = if matches!(step.kind, RunKind::Barrier) {
                self.wait_at(number, step).await
            } else {
                self.execute(number, step).await
            };
            if self.failure.is_none() {
                self.failure = failure;
            }
        }
        // One more look before they are ended: what failed by itself until now counts.
        self.look_after_background().await
    }

    /// Runs a script or container, or only starts it; how it failed.
    async fn execute(&mut self, number: usize, step: &Step) -> Option<(i32, String)> {
        let start = Start {
            job: Arc::clone(&self.job),
            task: self.task,
            attempt: self.attempt,
            number,
            ending: self.ending.subscribe(),
        };
        let ended = async {
            let (running, copies) = start.begin(step)?;
            self.copies.extend(copies);
            if step.background {
                self.background.push((step.clone(), running));
                return Ok(None);
            }
            Ok(running.await.context("the runnable was lost")??.failure(step))
        };
        ended.await.unwrap_or_else(|error: anyhow::Error| {
            Some((UNKNOWN_FAILURE, format!("runnable {}: {error:#}", step.name)))
        })
    }

    /// Waits until every task was here; how that failed.
    async fn wait_at(&self, number: usize, step: &Step) -> Option<(i32, String)> {
        let mut ending = self.ending.subscribe();
        let too_long = async {
            match step.timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            passing = self.job.barriers.pass(number, self.task) => match passing {
                Passing::All => None,
                Passing::Never(task) => Some((
                    UNKNOWN_FAILURE,
                    format!("barrier {} is never passed: task {task} failed before it", step.name),
                )),
            },
            () = too_long => StepEnd::TimedOut.failure(step),
            _ = ending.wait_for(|ending| *ending != Ending::No) => None,
        }
    }

    /// Takes note of those in the background that ended.
    async fn look_after_background(&mut self) -> Result<()> {
        let mut running = Vec::new();
        for (step, handle) in self.background.drain(..) {
            if !handle.is_finished() {
                running.push((step, handle));
                continue;
            }
            let failure = handle.await.context("a runnable was lost")??.failure(&step);
            if self.failure.is_none() {
                self.failure = failure;
            }
        }
        self.background = running;
        Ok(())
    }

    fn group(&self) -> PathBuf {
        self.job.task_group(self.task)
    }

    /// Ends what is left, in the background or by itself, and sees the last of its output.
    async fn clean(&mut self) -> Result<()> {
        self.ending.send_if_modified(|ending| {
            let undecided = *ending == Ending::No;
            if undecided {
                *ending = Ending::Done;
            }
            undecided
        });
        for (_, running) in self.background.drain(..) {
            running.await.context("a runnable was lost")??;
        }
        let (groups, group) = (self.job.groups.clone(), self.group());
        let removed = tokio::task::spawn_blocking(move || {
            groups.kill(&group)?;
            groups.remove(&group)
        });
        removed.await??;
        for mut copy in self.copies.drain(..) {
            match tokio::time::timeout(LAST_OUTPUT, &mut copy).await {
                Ok(copied) => copied.context("output was lost")??,
                // Something holds the pipe that is in none of our groups.
                Err(_elapsed) => copy.abort(),
            }
        }
        Ok(())
    }
}
