//! What is to be done: tasks, their steps in order, and each step's environment.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::job::{Action, Container, Job, Runnable, SchedulingPolicy, TaskGroup};
use crate::number::Int64;

/// Environment variables.
pub type Variables = BTreeMap<String, String>;

/// `SRC:DST[:ro|:rw]` of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the machine.
    pub source: String,
    /// In the container.
    pub target: String,
    /// Not writable there.
    pub read_only: bool,
}

impl Bind {
    /// Reads docker's form; both paths are absolute.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not SRC:DST or SRC:DST:ro with absolute paths");
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, read_only) = match parts.as_slice() {
            [source, target] | [source, target, "rw"] => (*source, *target, false),
            [source, target, "ro"] => (*source, *target, true),
            _ => return Err(wrong()),
        };
        if !source.starts_with('/') || !target.starts_with('/') {
            return Err(wrong());
        }
        Ok(Self { source: source.to_owned(), target: target.to_owned(), read_only })
    }
}

/// Those options of `docker run` that have a meaning here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DockerOptions {
    /// `host` or `none`.
    pub network: Option<String>,
    /// `USER[:GROUP]`.
    pub user: Option<String>,
    /// Directory.
    pub workdir: Option<String>,
    /// `KEY=VALUE`s.
    pub env: Vec<String>,
}

/// Reads `container.options`. Words are separated by blanks; there is no quoting.
pub fn docker_options(text: &str) -> Result<DockerOptions, String> {
    let mut options = DockerOptions::default();
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        let (name, given) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        if name == "--rm" && given.is_none() {
            continue;
        }
        if !matches!(name, "--network" | "--net" | "--user" | "-u" | "--workdir" | "-w" | "--env" | "-e") {
            return Err(format!("`{word}` is not supported; --network, --user, --workdir and --env are"));
        }
        let value =
            given.or_else(|| words.next()).ok_or_else(|| format!("`{word}` needs a value"))?.to_owned();
        match name {
            "--network" | "--net" if matches!(value.as_str(), "host" | "none") => {
                options.network = Some(value)
            }
            "--network" | "--net" => {
                return Err(format!("network `{value}` is not supported; host and none are"));
            }
            "--user" | "-u" => options.user = Some(value),
            "--workdir" | "-w" => options.workdir = Some(value),
            _ if value.contains('=') => options.env.push(value),
            _ => return Err(format!("`{value}` is not KEY=VALUE")),
        }
    }
    Ok(options)
}

/// How a step runs.
#[derive(Debug, Clone)]
pub enum RunKind {
    /// A container.
    Container(Container),
    /// A script's text.
    Text(String),
    /// A script of the machine.
    File(String),
    /// All tasks meet here.
    Barrier,
}

/// One step of every task.
#[derive(Debug, Clone)]
pub struct Step {
    /// For logs: the display name, or else the number.
    pub name: String,
    /// What it is.
    pub kind: RunKind,
    /// A failure is none.
    pub ignore_exit_status: bool,
    /// Do not wait for it.
    pub background: bool,
    /// Also after a failure.
    pub always_run: bool,
    /// Ends, failed, after that.
    pub timeout: Option<Duration>,
    variables: Variables,
}

/// What a task is told about the job it is of.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Surroundings {
    /// Unique for ever.
    pub job_uid: String,
    /// Unique on this machine.
    pub job_id: String,
    /// Path of the file of hosts, if asked for.
    pub hosts_file: Option<String>,
    /// Name of the machine, the only one.
    pub hostname: String,
}

/// A job, resolved.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many tasks.
    pub task_count: usize,
    /// How many at once.
    pub parallelism: usize,
    /// Attempts after the first.
    pub max_retries: u32,
    /// Of each attempt.
    pub max_run: Option<Duration>,
    /// On which exit codes what is done.
    pub policy: Option<(Action, Vec<i32>)>,
    /// In order.
    pub steps: Vec<Step>,
    /// Device and mount path.
    pub devices: Vec<(String, String)>,
    /// A file of hosts is wanted.
    pub hosts_file: bool,
    /// Thousandths of a processor.
    pub cpu_milli: Option<u64>,
    /// MiB.
    pub memory_mib: Option<u64>,
    variables: Variables,
    per_task: Vec<Variables>,
}

/// How many tasks a group has.
pub(crate) fn task_count(group: &TaskGroup) -> i64 {
    match group.task_environments.len() {
        0 => group.task_count.unwrap_or(Int64(1)).0,
        environments => i64::try_from(environments).unwrap_or(i64::MAX),
    }
}

impl Plan {
    /// The plan of a job that was checked; none if it has no task specification. `processors` bounds what runs at once
    /// when the job does not say.
    pub fn of(job: &Job, processors: usize) -> Option<Self> {
        let group = job.task_groups.first()?;
        let spec = group.task_spec.as_ref()?;
        let size = |value: Option<Int64>| value.and_then(|value| usize::try_from(value.0).ok());
        let wide = |value: Option<Int64>| value.and_then(|value| u64::try_from(value.0).ok());
        let task_count = usize::try_from(task_count(group)).ok()?;
        let barrier = spec.runnables.iter().any(|runnable| runnable.barrier.is_some());
        let parallelism = match group.scheduling_policy {
            Some(SchedulingPolicy::InOrder) => 1,
            // A barrier is passed only if all run at once.
            _ if barrier => task_count,
            _ => size(group.parallelism)
                .unwrap_or(processors)
                .min(size(group.task_count_per_node).unwrap_or(usize::MAX)),
        };
        let mut variables = spec.environments.clone();
        variables.extend(spec.environment.iter().flat_map(|environment| environment.variables.clone()));
        let policy = spec.lifecycle_policies.first();
        Some(Self {
            task_count,
            parallelism: parallelism.clamp(1, task_count.max(1)),
            max_retries: spec.max_retry_count.and_then(|count| u32::try_from(count.0).ok()).unwrap_or(0),
            max_run: spec.max_run_duration.map(|duration| duration.0),
            policy: policy.and_then(|policy| {
                Some((policy.action?, policy.action_condition.as_ref()?.exit_codes.clone()))
            }),
            steps: spec
                .runnables
                .iter()
                .enumerate()
                .filter_map(|(number, one)| Step::of(number, one))
                .collect(),
            devices: spec
                .volumes
                .iter()
                .filter_map(|volume| Some((volume.device_name.clone()?, volume.mount_path.clone()?)))
                .collect(),
            hosts_file: group.require_hosts_file,
            cpu_milli: spec.compute_resource.and_then(|resource| wide(resource.cpu_milli)),
            memory_mib: spec.compute_resource.and_then(|resource| wide(resource.memory_mib)),
            variables,
            per_task: group.task_environments.iter().map(|one| one.variables.clone()).collect(),
        })
    }

    /// The environment of a step: of the task, of this task, of the step, and what the reference predefines.
    pub fn variables(&self, step: &Step, index: usize, attempt: u32, around: &Surroundings) -> Variables {
        let mut all = self.variables.clone();
        all.extend(
            self.per_task.get(index).into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())),
        );
        all.extend(step.variables.clone());
        let mut set = |key: &str, value: String| all.insert(key.to_owned(), value);
        set("BATCH_TASK_INDEX", index.to_string());
        set("BATCH_TASK_COUNT", self.task_count.to_string());
        set("BATCH_TASK_RETRY_ATTEMPT", attempt.to_string());
        set("BATCH_JOB_UID", around.job_uid.clone());
        set("BATCH_JOB_ID", around.job_id.clone());
        set("BATCH_NODE_COUNT", "1".to_owned());
        set("BATCH_NODE_INDEX", "0".to_owned());
        set("BATCH_MAIN_NODE_HOSTNAME", around.hostname.clone());
        if let Some(file) = &around.hosts_file {
            set("BATCH_HOSTS_FILE", file.clone());
        }
        all
    }

    /// What a container binds, as `SRC:DST[:ro]`. Sources below a device's mount path are the directories that stand for it.
    pub fn binds(&self, container: &Container, volumes_dir: &str) -> Vec<String> {
        let directory = |device: &str| format!("{volumes_dir}/{device}");
        if container.volumes.is_empty() {
            let bind = |(device, path): &(String, String)| format!("{}:{path}", directory(device));
            return self.devices.iter().map(bind).collect();
        }
        let translate = |volume: &String| {
            let below = self.devices.iter().find_map(|(device, path)| {
                let rest = volume.strip_prefix(path.trim_end_matches('/'))?;
                rest.starts_with([':', '/']).then(|| format!("{}{rest}", directory(device)))
            });
            below.unwrap_or_else(|| volume.clone())
        };
        container.volumes.iter().map(translate).collect()
    }
}

impl Step {
    fn of(number: usize, runnable: &Runnable) -> Option<Self> {
        let script = runnable.script.as_ref();
        let kind = if let Some(container) = &runnable.container {
            RunKind::Container(container.clone())
        } else if let Some(text) = script.and_then(|script| script.text.clone()) {
            RunKind::Text(text)
        } else if let Some(path) = script.and_then(|script| script.path.clone()) {
            RunKind::File(path)
        } else {
            runnable.barrier.as_ref().map(|_| RunKind::Barrier)?
        };
        Some(Self {
            name: runnable.display_name.clone().unwrap_or_else(|| number.to_string()),
            kind,
            ignore_exit_status: runnable.ignore_exit_status,
            background: runnable.background,
            always_run: runnable.always_run,
            timeout: runnable.timeout.map(|timeout| timeout.0),
            variables: runnable.environment.as_ref().map(|one| one.variables.clone()).unwrap_or_default(),
        })
    }
}
