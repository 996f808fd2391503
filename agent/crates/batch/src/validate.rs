//! From bytes to a job that is known to make sense: the document's form, then the rules, each finding with its path.

use std::fmt;

use serde_json::Value;

use crate::job::{
    Action, Container, Destination, Environment, Job, LogsPolicy, Runnable, SchedulingPolicy, TaskGroup,
    TaskSpec, Volume,
};
use crate::number::Int64;
use crate::plan::{Bind, docker_options, task_count};

/// A larger document is refused.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;
const MOST_TASKS: i64 = 10_000;
const MOST_RUNNABLES: usize = 100;

/// Something in the document, by its path in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// As in `taskGroups[0].taskSpec.runnables[1].container`.
    pub path: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Something that is accepted and has no effect, or another one than its author may think.
pub type Note = Problem;

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Too many bytes.
    #[error("the job document has {0} bytes; at most {MAX_DOCUMENT_BYTES} are read")]
    TooLarge(usize),
    /// Not JSON, or not of the form of a job.
    #[error("{0}")]
    Document(Problem),
    /// Against the rules.
    #[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
    Rules(Vec<Problem>),
}

/// Reads a document; fields that the reference does not have are refused by name and path.
pub fn parse(document: &[u8]) -> Result<Job, JobError> {
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(JobError::TooLarge(document.len()));
    }
    let mut json = serde_json::Deserializer::from_slice(document);
    let job: Job = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => "document".to_owned(),
            path => path,
        };
        JobError::Document(Problem { path, message: error.into_inner().to_string() })
    })?;
    let document_error = |error: serde_json::Error| {
        JobError::Document(Problem { path: "document".to_owned(), message: error.to_string() })
    };
    json.end().map_err(document_error)?;
    let written = serde_json::from_slice(document).map_err(document_error)?;
    let understood = serde_json::to_value(&job).map_err(document_error)?;
    match list_for_object(&written, &understood, String::new()) {
        Some(problem) => Err(JobError::Document(problem)),
        None => Ok(job),
    }
}

/// serde reads a list as the fields of an object in order; a job document never means that.
fn list_for_object(written: &Value, understood: &Value, path: String) -> Option<Problem> {
    match (written, understood) {
        (Value::Array(_), Value::Object(_)) => {
            let path = if path.is_empty() { "document".to_owned() } else { path };
            Some(Problem { path, message: "an object is expected, not a list".to_owned() })
        }
        (Value::Object(written), Value::Object(understood)) => written.iter().find_map(|(key, value)| {
            let dot = if path.is_empty() { "" } else { "." };
            list_for_object(value, understood.get(key)?, format!("{path}{dot}{key}"))
        }),
        (Value::Array(written), Value::Array(understood)) => written
            .iter()
            .zip(understood)
            .enumerate()
            .find_map(|(number, (one, other))| list_for_object(one, other, format!("{path}[{number}]"))),
        _ => None,
    }
}

/// An identifier of a job, as the service wants it: `^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`.
pub fn valid_job_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    bytes.len() <= 63
        && bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.last().is_some_and(|last| *last != b'-')
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
}

/// What the rules found to say about a job that keeps them.
#[derive(Debug, Clone, Default)]
pub struct Checked {
    /// What is not applied.
    pub notes: Vec<Note>,
}

impl Job {
    /// Checks the rules. `relaxed` lets streamed containers use the fields that the reference ignores there.
    pub fn check(&self, relaxed: bool) -> Result<Checked, JobError> {
        let mut rules = Rules { relaxed, ..Rules::default() };
        rules.job(self);
        if rules.problems.is_empty() {
            Ok(Checked { notes: rules.notes })
        } else {
            Err(JobError::Rules(rules.problems))
        }
    }
}

#[derive(Debug, Default)]
struct Rules {
    relaxed: bool,
    problems: Vec<Problem>,
    notes: Vec<Note>,
}

impl Rules {
    fn refuse(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem { path: path.into(), message: message.into() });
    }

    fn note(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.notes.push(Problem { path: path.into(), message: message.into() });
    }

    fn range(&mut self, path: String, value: Option<Int64>, lowest: i64, highest: i64) {
        if let Some(Int64(value)) = value
            && !(lowest..=highest).contains(&value)
        {
            self.refuse(path, format!("{value} is not in the range {lowest} to {highest}"));
        }
    }

    fn job(&mut self, job: &Job) {
        self.range("priority".to_owned(), job.priority, 0, 99);
        if job.priority.is_some_and(|priority| priority != Int64(0)) {
            self.note("priority", "not applied: jobs of this machine do not wait for each other");
        }
        if job.allocation_policy.is_some() {
            self.note("allocationPolicy", "not applied: the job runs on this machine as it is");
        }
        if !job.notifications.is_empty() {
            self.note("notifications", "not applied: there is no Pub/Sub here");
        }
        if let Some(logs) = &job.logs_policy {
            self.logs(logs);
        }
        match job.task_groups.as_slice() {
            [group] => self.group(group),
            groups => {
                self.refuse("taskGroups", format!("{} task groups: exactly one is supported", groups.len()))
            }
        }
    }

    fn logs(&mut self, logs: &LogsPolicy) {
        let path = logs.logs_path.as_deref().unwrap_or("");
        if logs.destination == Some(Destination::Path) && !path.starts_with('/') {
            self.refuse(
                "logsPolicy.logsPath",
                format!("`{path}` is not an absolute path, which destination PATH needs"),
            );
        }
        if logs.cloud_logging_option.is_some() {
            self.note(
                "logsPolicy.cloudLoggingOption",
                "not applied: the log is a file of the job's directory",
            );
        }
    }

    fn group(&mut self, group: &TaskGroup) {
        let at = |field: &str| format!("taskGroups[0].{field}");
        self.range(at("taskCount"), group.task_count, 1, MOST_TASKS);
        self.range(at("parallelism"), group.parallelism, 1, MOST_TASKS);
        self.range(at("taskCountPerNode"), group.task_count_per_node, 1, MOST_TASKS);
        let in_order = group.scheduling_policy == Some(SchedulingPolicy::InOrder);
        if in_order && group.parallelism.is_some_and(|parallelism| parallelism != Int64(1)) {
            self.refuse(at("parallelism"), "must be 1 with schedulingPolicy IN_ORDER");
        }
        if !group.task_environments.is_empty() && group.task_count.is_some() {
            self.note(at("taskCount"), "not applied: there is one task for each of taskEnvironments");
        }
        if i64::try_from(group.task_environments.len()).unwrap_or(i64::MAX) > MOST_TASKS {
            self.refuse(at("taskEnvironments"), format!("more than {MOST_TASKS} tasks"));
        }
        for (number, environment) in group.task_environments.iter().enumerate() {
            self.environment(&at(&format!("taskEnvironments[{number}]")), environment);
        }
        if group.permissive_ssh {
            self.note(at("permissiveSsh"), "not applied: there is one machine");
        }
        if group.run_as_non_root {
            self.refuse(at("runAsNonRoot"), "not supported: the user would come from the cloud's OS Login");
        }
        match &group.task_spec {
            Some(spec) => self.spec(spec, group),
            None => self.refuse(at("taskSpec"), "required"),
        }
    }

    fn spec(&mut self, spec: &TaskSpec, group: &TaskGroup) {
        let at = |field: &str| format!("taskGroups[0].taskSpec.{field}");
        self.range(at("maxRetryCount"), spec.max_retry_count, 0, 10);
        if let Some(resource) = &spec.compute_resource {
            self.range(at("computeResource.cpuMilli"), resource.cpu_milli, 1, 1 << 30);
            self.range(at("computeResource.memoryMib"), resource.memory_mib, 1, 1 << 30);
            if resource.boot_disk_mib.is_some() {
                self.note(at("computeResource.bootDiskMib"), "not applied: tasks share this machine's disk");
            }
        }
        if spec.lifecycle_policies.len() > 1 {
            self.refuse(at("lifecyclePolicies"), "at most one policy is supported");
        }
        for (number, policy) in spec.lifecycle_policies.iter().enumerate() {
            let path = at(&format!("lifecyclePolicies[{number}]"));
            if policy.action.is_none_or(|action| action == Action::ActionUnspecified) {
                self.refuse(format!("{path}.action"), "required: RETRY_TASK or FAIL_TASK");
            }
            if policy.action_condition.as_ref().is_none_or(|condition| condition.exit_codes.is_empty()) {
                self.refuse(format!("{path}.actionCondition.exitCodes"), "required: at least one exit code");
            }
        }
        if let Some(environment) = &spec.environment {
            self.environment(&at("environment"), environment);
        }
        self.names(&at("environments"), spec.environments.keys());
        for (number, volume) in spec.volumes.iter().enumerate() {
            self.volume(&at(&format!("volumes[{number}]")), volume);
        }
        if spec.runnables.is_empty() || spec.runnables.len() > MOST_RUNNABLES {
            self.refuse(
                at("runnables"),
                format!("{} runnables: 1 to {MOST_RUNNABLES} are needed", spec.runnables.len()),
            );
        }
        for (number, runnable) in spec.runnables.iter().enumerate() {
            self.runnable(&at(&format!("runnables[{number}]")), runnable, group);
        }
    }

    fn volume(&mut self, path: &str, volume: &Volume) {
        let sources = [volume.nfs.is_some(), volume.gcs.is_some(), volume.device_name.is_some()];
        if sources.iter().filter(|given| **given).count() != 1 {
            self.refuse(path, "exactly one of nfs, gcs and deviceName is needed");
        }
        if volume.nfs.is_some() {
            self.refuse(
                format!("{path}.nfs"),
                "not mounted here: mount it on the machine and bind it with container.volumes",
            );
        }
        if volume.gcs.is_some() {
            self.refuse(format!("{path}.gcs"), "buckets are not mounted here: copy what is needed, or bind a directory with container.volumes");
        }
        if !volume
            .mount_path
            .as_deref()
            .is_some_and(|target| target.starts_with('/') && !target.contains(':'))
        {
            self.refuse(format!("{path}.mountPath"), "an absolute path without a colon is needed");
        }
        if let Some(device) = &volume.device_name {
            if valid_device(device) {
                self.note(format!("{path}.deviceName"), "a directory of the job stands for the disk");
            } else {
                self.refuse(
                    format!("{path}.deviceName"),
                    format!("`{device}` is not a name of letters, digits, - and _"),
                );
            }
        }
        if !volume.mount_options.is_empty() {
            self.note(format!("{path}.mountOptions"), "not applied: a directory stands for the disk");
        }
    }

    fn runnable(&mut self, path: &str, runnable: &Runnable, group: &TaskGroup) {
        let kinds = [runnable.container.is_some(), runnable.script.is_some(), runnable.barrier.is_some()];
        if kinds.iter().filter(|given| **given).count() != 1 {
            self.refuse(path, "exactly one of container, script and barrier is needed");
        }
        if let Some(environment) = &runnable.environment {
            self.environment(&format!("{path}.environment"), environment);
        }
        if let Some(script) = &runnable.script {
            match (&script.path, &script.text) {
                (Some(file), None) if !file.starts_with('/') => {
                    self.refuse(format!("{path}.script.path"), "not an absolute path")
                }
                (Some(_), None) | (None, Some(_)) => {}
                _ => self.refuse(format!("{path}.script"), "exactly one of path and text is needed"),
            }
        }
        if runnable.barrier.is_some() {
            let tasks = task_count(group);
            let at_once = group
                .parallelism
                .unwrap_or(Int64(tasks))
                .0
                .min(group.task_count_per_node.unwrap_or(Int64(tasks)).0);
            if at_once < tasks || group.scheduling_policy == Some(SchedulingPolicy::InOrder) {
                self.refuse(format!("{path}.barrier"), format!("never passed: all {tasks} tasks must run at once, parallelism and taskCountPerNode allow {at_once}"));
            }
            if runnable.background {
                self.refuse(format!("{path}.background"), "a barrier is not run in the background");
            }
        }
        if let Some(container) = &runnable.container {
            self.container(&format!("{path}.container"), container);
        }
    }

    fn container(&mut self, path: &str, container: &Container) {
        if container.image_uri.is_empty() || container.image_uri.starts_with('-') {
            self.refuse(format!("{path}.imageUri"), "an image reference is needed");
        }
        for (number, volume) in container.volumes.iter().enumerate() {
            if let Err(message) = Bind::parse(volume) {
                self.refuse(format!("{path}.volumes[{number}]"), message);
            }
        }
        let others = [
            ("options", container.options.is_some()),
            ("blockExternalNetwork", container.block_external_network),
            ("username", container.username.is_some()),
            ("password", container.password.is_some()),
        ];
        if container.enable_image_streaming && !self.relaxed {
            for (field, _) in others.iter().filter(|(_, given)| *given) {
                self.refuse(format!("{path}.{field}"), "with enableImageStreaming a container only supports imageUri, commands, entrypoint and volumes (--relaxed supports the others too)");
            }
            return;
        }
        self.credentials(path, container);
        match docker_options(container.options.as_deref().unwrap_or("")) {
            Err(message) => self.refuse(format!("{path}.options"), message),
            Ok(options) if container.block_external_network && options.network.is_some() => {
                self.refuse(
                    format!("{path}.options"),
                    "the network cannot be given with blockExternalNetwork",
                );
            }
            Ok(_) => {}
        }
    }

    fn credentials(&mut self, path: &str, container: &Container) {
        let given = [("username", &container.username), ("password", &container.password)];
        if given.iter().filter(|(_, value)| value.is_some()).count() == 1 {
            self.refuse(path, "username and password are needed together");
        }
        for (field, value) in given {
            let Some(value) = value else { continue };
            if value.starts_with("projects/") && value.contains("/secrets/") {
                self.refuse(
                    format!("{path}.{field}"),
                    "not available here: the cloud's Secret Manager holds it",
                );
            } else {
                self.note(
                    format!("{path}.{field}"),
                    "put into this machine's Docker configuration, as docker login does",
                );
            }
        }
    }

    fn environment(&mut self, path: &str, environment: &Environment) {
        self.names(&format!("{path}.variables"), environment.variables.keys());
        if !environment.secret_variables.is_empty() {
            self.refuse(
                format!("{path}.secretVariables"),
                "not available here: the cloud's Secret Manager holds them",
            );
        }
        if environment.encrypted_variables.is_some() {
            self.refuse(
                format!("{path}.encryptedVariables"),
                "not available here: the cloud's key management decrypts them",
            );
        }
    }

    fn names<'a>(&mut self, path: &str, names: impl Iterator<Item = &'a String>) {
        for name in names.filter(|name| name.is_empty() || name.contains(['=', '\0'])) {
            self.refuse(path, format!("`{}` is not a name of a variable", name.escape_debug()));
        }
    }
}

fn valid_device(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}
