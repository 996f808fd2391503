//! The process of one job: tasks as many at once as allowed, retries, states, and the end, also an early one.
//!
//! It does not depend on the daemon but for images; a daemon that ends and comes back is a pause for those. If this process
//! itself dies, the next one (started with the daemon) ends what was left running, and such attempts have failed with the code
//! that the reference reserves for a machine that was not heard of.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;
use sluice_batch::{
    Change, Job, JobState, NOT_HEARD_OF, Outcome, Plan, REBOOTED, RunKind, Surroundings, TaskState,
    UNKNOWN_FAILURE, Verdict, verdict,
};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::barrier::Barriers;
use super::cgroup::{Hierarchies, Limits};
use super::dir::{Held, JobDir, Meta, Wish};
use super::journal::Journal;
use super::login::login;
use super::output::{Output, logs_path};
use super::task::{Attempt, Ended};
use crate::config::Config;

/// Somebody may be looking whether the lock is held.
const HOLD_TRIES: usize = 50;
const HOLD_INTERVAL: Duration = Duration::from_millis(20);
const HOSTNAME: &str = "/proc/sys/kernel/hostname";
/// What tells one boot of the machine from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What all tasks of the job have in common.
#[derive(Debug)]
pub(super) struct Context {
    /// This program's path, as it was in the beginning: an upgrade may replace it while the job runs.
    binary: PathBuf,
    pub(super) config: Arc<Config>,
    pub(super) dir: JobDir,
    pub(super) meta: Meta,
    pub(super) plan: Plan,
    pub(super) around: Surroundings,
    pub(super) journal: Journal,
    pub(super) output: Arc<Output>,
    pub(super) groups: Hierarchies,
    pub(super) limits: Limits,
    pub(super) barriers: Barriers,
}

/// How many processors there are for tasks of a job that does not say.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs the job until it is over, or until this process is told to leave it to the next. `announce` is called once it is
/// certain that nobody else does.
pub(crate) async fn run(
    config: Arc<Config>,
    dir: JobDir,
    stopped: impl Future<Output = ()>,
    announce: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let Some(held) = hold(&dir).await? else { return Ok(()) };
    let job = dir.job()?;
    let context = Arc::new(Context::new(config, dir, &job)?);
    context.end_left().await?;
    announce()?;
    let left = context.tasks(stopped).await?;
    context.clean().await?;
    let wish = context.dir.wish();
    if left && wish == Wish::None {
        return Ok(());
    }
    context.conclude(wish)?;
    drop(held);
    if wish == Wish::Delete { context.dir.remove() } else { Ok(()) }
}

async fn hold(dir: &JobDir) -> Result<Option<Held>> {
    for _ in 0..HOLD_TRIES {
        if let Some(held) = dir.hold()? {
            return Ok(Some(held));
        }
        tokio::time::sleep(HOLD_INTERVAL).await;
    }
    Ok(None)
}

impl Context {
    fn new(config: Arc<Config>, dir: JobDir, job: &Job) -> Result<Self> {
        let meta = dir.meta()?;
        let plan = Plan::of(job, processors()).context("the job has no task specification")?;
        let hostname =
            std::fs::read_to_string(HOSTNAME).with_context(|| format!("cannot read {HOSTNAME}"))?;
        let mut around = Surroundings {
            job_uid: meta.uid.clone(),
            job_id: dir.id().to_owned(),
            hosts_file: None,
            hostname: hostname.trim().to_owned(),
        };
        for (device, _) in &plan.devices {
            let path = dir.path("volumes").join(device);
            std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        if plan.hosts_file {
            let path = dir.path("hosts");
            std::fs::write(&path, format!("{}\n", around.hostname))
                .with_context(|| format!("cannot write {}", path.display()))?;
            around.hosts_file = Some(path.display().to_string());
        }
        let journal = Journal::open(&dir, plan.task_count)?;
        let output = Output::open(&dir, &meta.uid, logs_path(job, &plan, &dir))?;
        let context = Self {
            binary: crate::program::own()?,
            limits: Limits { cpu_milli: plan.cpu_milli, memory_mib: plan.memory_mib },
            barriers: Barriers::new(plan.task_count),
            groups: Hierarchies::find(),
            output: Arc::new(output),
            config,
            dir,
            meta,
            plan,
            around,
            journal,
        };
        context.write_scripts()?;
        context.log_in()?;
        Ok(context)
    }

    /// Makes the user names and passwords of images known.
    fn log_in(&self) -> Result<()> {
        for step in &self.plan.steps {
            if let RunKind::Container(container) = &step.kind
                && let (Some(user), Some(password)) = (&container.username, &container.password)
            {
                login(self.config.docker_config.as_deref(), &container.image_uri, user, password)?;
            }
        }
        Ok(())
    }

    fn write_scripts(&self) -> Result<()> {
        for (number, step) in self.plan.steps.iter().enumerate() {
            if let RunKind::Text(text) = &step.kind {
                let path = self.script_file(number);
                std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(())
    }

    pub(super) fn script_file(&self, number: usize) -> PathBuf {
        self.dir.path(&format!("script-{number}"))
    }

    pub(super) fn volumes_dir(&self) -> String {
        self.dir.path("volumes").display().to_string()
    }

    /// Directories that stand for disks, and where scripts see them; these are made.
    pub(super) fn device_dirs(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let pair = |(device, target): &(String, String)| {
            let target = PathBuf::from(target);
            std::fs::create_dir_all(&target)
                .with_context(|| format!("cannot make the mount path {}", target.display()))?;
            Ok((self.dir.path("volumes").join(device), target))
        };
        self.plan.devices.iter().map(pair).collect()
    }

    fn job_group(&self) -> PathBuf {
        Path::new("sluice").join(format!("batch-{}", self.meta.uid))
    }

    pub(super) fn task_group(&self, task: usize) -> PathBuf {
        self.job_group().join(task.to_string())
    }

    /// This program, with the options that the job was submitted with.
    pub(super) fn sluice(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(&self.meta.options);
        command
    }

    /// Removes the container of a `sluice run` that was killed before it could.
    pub(super) fn sweep(&self, pid: Pid) -> Result<()> {
        let runtime = sluice_container::find_runtime(None)?;
        let of_it = |id: &str| id.starts_with(&format!("sluice-{pid}-"));
        sluice_container::Bundle::sweep(&self.config.root.join("containers"), &runtime, of_it)?;
        Ok(())
    }

    /// Ends what an earlier process of this job left, and says how these attempts ended.
    async fn end_left(self: &Arc<Self>) -> Result<()> {
        let boot = self.dir.path("boot");
        let now = std::fs::read_to_string(BOOT_ID).with_context(|| format!("cannot read {BOOT_ID}"))?;
        let before = std::fs::read_to_string(&boot).unwrap_or_default();
        std::fs::write(&boot, &now).with_context(|| format!("cannot write {}", boot.display()))?;
        let code = if before.is_empty() || before == now { NOT_HEARD_OF } else { REBOOTED };
        self.clean().await?;
        let was_left = |state: TaskState| matches!(state, TaskState::Assigned | TaskState::Running);
        let left: Vec<usize> = self.journal.with(|status| {
            let tasks = status.tasks.iter().enumerate();
            tasks.filter(|(_, task)| was_left(task.state)).map(|(number, _)| number).collect()
        });
        for task in left {
            let reason = Some("the process that ran it died".to_owned());
            self.attempt_over(task, Ended { outcome: Outcome::Failed(code), reason })?;
        }
        let over: Vec<(usize, bool)> = self.journal.with(|status| {
            let tasks = status.tasks.iter().enumerate().filter(|(_, task)| task.state.is_final());
            tasks.map(|(number, task)| (number, task.state == TaskState::Succeeded)).collect()
        });
        over.into_iter().for_each(|(task, well)| self.barriers.over(task, well));
        Ok(())
    }

    /// Runs tasks until all are over, or until told to stop; says whether some are left.
    async fn tasks(self: &Arc<Self>, stopped: impl Future<Output = ()>) -> Result<bool> {
        let mut waiting: VecDeque<usize> = self.journal.with(|status| {
            let tasks = status.tasks.iter().enumerate().filter(|(_, task)| task.state == TaskState::Pending);
            tasks.map(|(number, _)| number).collect()
        });
        let states = [JobState::Scheduled, JobState::Running];
        let stop = watch::Sender::new(self.dir.wish() != Wish::None);
        if !waiting.is_empty() && !*stop.borrow() {
            self.journal.append(states.map(|state| Change::Job { state, reason: None }))?;
        }
        let mut running = JoinSet::new();
        tokio::pin!(stopped);
        loop {
            while !*stop.borrow() && running.len() < self.plan.parallelism {
                let Some(task) = waiting.pop_front() else { break };
                self.begin(task, &mut running, &stop)?;
            }
            tokio::select! {
                ended = running.join_next() => {
                    let Some(ended) = ended else { return Ok(!waiting.is_empty()) };
                    let (task, ended) = ended.context("a task was lost")?;
                    if *stop.borrow() && self.dir.wish() == Wish::None {
                        // Left to the next process.
                        waiting.push_front(task);
                    } else if self.attempt_over(task, ended)? == Verdict::Retry {
                        waiting.push_front(task);
                    }
                }
                () = &mut stopped, if !*stop.borrow() => {
                    stop.send_replace(true);
                    self.announce_end()?;
                }
            }
        }
    }

    fn begin(
        self: &Arc<Self>,
        task: usize,
        running: &mut JoinSet<(usize, Ended)>,
        stop: &watch::Sender<bool>,
    ) -> Result<()> {
        let attempt = self.journal.with(|status| status.tasks.get(task).map_or(0, |task| task.attempts));
        self.journal.append([Change::Task {
            task,
            state: TaskState::Assigned,
            exit_code: None,
            reason: None,
        }])?;
        let (context, stop) = (Arc::clone(self), stop.subscribe());
        running.spawn(async move {
            let ended = Attempt::run(context, task, attempt, stop).await;
            let lost = |error: anyhow::Error| Ended {
                outcome: Outcome::Failed(UNKNOWN_FAILURE),
                reason: Some(format!("{error:#}")),
            };
            (task, ended.unwrap_or_else(lost))
        });
        Ok(())
    }

    fn announce_end(&self) -> Result<()> {
        let state = match self.dir.wish() {
            Wish::None => return Ok(()),
            Wish::Cancel => JobState::CancellationInProgress,
            Wish::Delete => JobState::DeletionInProgress,
        };
        self.journal.append([Change::Job { state, reason: None }])
    }

    /// Writes down how an attempt ended and what follows.
    fn attempt_over(&self, task: usize, ended: Ended) -> Result<Verdict> {
        let retries = self
            .journal
            .with(|status| status.tasks.get(task).map_or(0, |task| task.attempts.saturating_sub(1)));
        let verdict = verdict(&self.plan, ended.outcome, retries);
        let (state, exit_code) = match (verdict, ended.outcome) {
            (Verdict::Succeed, _) => (TaskState::Succeeded, Some(0)),
            (Verdict::Retry, Outcome::Failed(code)) => (TaskState::Pending, Some(code)),
            (_, Outcome::Failed(code)) => (TaskState::Failed, Some(code)),
            (..) => (TaskState::Failed, Some(UNKNOWN_FAILURE)),
        };
        self.journal.append([Change::Task { task, state, exit_code, reason: ended.reason }])?;
        if state.is_final() {
            self.barriers.over(task, state == TaskState::Succeeded);
        }
        Ok(verdict)
    }

    /// Ends every process of the job and takes its control groups away.
    async fn clean(self: &Arc<Self>) -> Result<()> {
        let (groups, group) = (self.groups.clone(), self.job_group());
        let cleaned = tokio::task::spawn_blocking(move || {
            groups.kill(&group)?;
            groups.remove(&group)
        });
        cleaned.await?
    }

    /// The job's last state.
    fn conclude(&self, wish: Wish) -> Result<()> {
        let (unexecuted, failed): (Vec<usize>, Vec<usize>) = self.journal.with(|status| {
            let which = |state: TaskState| {
                let tasks = status.tasks.iter().enumerate().filter(move |(_, task)| task.state == state);
                tasks.map(|(number, _)| number).collect()
            };
            (which(TaskState::Pending), which(TaskState::Failed))
        });
        self.journal.append(unexecuted.into_iter().map(|task| Change::Task {
            task,
            state: TaskState::Unexecuted,
            exit_code: None,
            reason: None,
        }))?;
        let mut reason = None;
        let states = match wish {
            Wish::Delete => vec![JobState::DeletionInProgress],
            Wish::Cancel => vec![JobState::CancellationInProgress, JobState::Cancelled],
            Wish::None if failed.is_empty() => vec![JobState::Succeeded],
            Wish::None => {
                reason = Some(name_tasks(&failed));
                vec![JobState::Failed]
            }
        };
        let changes = states.into_iter().map(|state| Change::Job { state, reason: reason.clone() });
        self.journal.append(changes)
    }
}

/// `failed: task 1, 2 and 5 more`, at most five by number.
fn name_tasks(tasks: &[usize]) -> String {
    const NAMED: usize = 5;
    let named: Vec<String> = tasks.iter().take(NAMED).map(usize::to_string).collect();
    let more = match tasks.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("failed: task {}{more}", named.join(", "))
}
