//! The job document, field by field as the REST reference (v1 `projects.locations.jobs`) has it.
//!
//! Unknown fields are refused. What only the service writes (`name`, `uid`, `status`, times) is read and not kept.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::allocation::AllocationPolicy;
use crate::number::{Int64, Seconds};

/// A job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Job {
    #[serde(skip_serializing)]
    name: Option<IgnoredAny>,
    #[serde(skip_serializing)]
    uid: Option<IgnoredAny>,
    #[serde(skip_serializing)]
    status: Option<IgnoredAny>,
    #[serde(skip_serializing)]
    create_time: Option<IgnoredAny>,
    #[serde(skip_serializing)]
    update_time: Option<IgnoredAny>,
    /// 0 to 99.
    pub priority: Option<Int64>,
    /// Exactly one.
    pub task_groups: Vec<TaskGroup>,
    /// Machines; of no meaning on this node.
    pub allocation_policy: Option<AllocationPolicy>,
    /// For whoever reads them.
    pub labels: BTreeMap<String, String>,
    /// Where output goes.
    pub logs_policy: Option<LogsPolicy>,
    /// Pub/Sub messages; of no meaning on this node.
    pub notifications: Vec<Notification>,
}

/// Tasks that share a specification.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TaskGroup {
    #[serde(skip_serializing)]
    name: Option<IgnoredAny>,
    /// What each task does.
    pub task_spec: Option<TaskSpec>,
    /// How many; 1 if not given.
    pub task_count: Option<Int64>,
    /// How many at once.
    pub parallelism: Option<Int64>,
    /// In which order.
    pub scheduling_policy: Option<SchedulingPolicy>,
    /// One task for each of these.
    pub task_environments: Vec<Environment>,
    /// How many at once on one node: this one.
    pub task_count_per_node: Option<Int64>,
    /// A file of the job's hosts.
    pub require_hosts_file: bool,
    /// ssh between nodes; of no meaning with one.
    pub permissive_ssh: bool,
    /// Not as root.
    pub run_as_non_root: bool,
}

/// Order of tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SchedulingPolicy {
    /// As the next.
    SchedulingPolicyUnspecified,
    /// As soon as there is room.
    AsSoonAsPossible,
    /// One after the other.
    InOrder,
}

/// What a task does.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TaskSpec {
    /// In this order.
    pub runnables: Vec<Runnable>,
    /// What it needs.
    pub compute_resource: Option<ComputeResource>,
    /// A task that takes longer has failed.
    pub max_run_duration: Option<Seconds>,
    /// 0 to 10.
    pub max_retry_count: Option<Int64>,
    /// At most one.
    pub lifecycle_policies: Vec<LifecyclePolicy>,
    /// Deprecated form of `environment.variables`.
    pub environments: BTreeMap<String, String>,
    /// Volumes of the task.
    pub volumes: Vec<Volume>,
    /// Environment of all runnables.
    pub environment: Option<Environment>,
}

/// One step of a task: exactly one of container, script and barrier.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Runnable {
    /// A container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// A script on the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<Script>,
    /// A point that all tasks reach before one goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub barrier: Option<Barrier>,
    /// Name in logs.
    pub display_name: Option<String>,
    /// A failure is none.
    pub ignore_exit_status: bool,
    /// Do not wait for it.
    pub background: bool,
    /// Also after a failure.
    pub always_run: bool,
    /// Over the task's.
    pub environment: Option<Environment>,
    /// Killed, and failed, after that.
    pub timeout: Option<Seconds>,
    /// For whoever reads them.
    pub labels: BTreeMap<String, String>,
}

/// A container runnable.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Container {
    /// Image reference.
    pub image_uri: String,
    /// Instead of the image's command.
    pub commands: Vec<String>,
    /// Instead of the image's entry point.
    pub entrypoint: Option<String>,
    /// `SRC:DST[:ro]`.
    pub volumes: Vec<String>,
    /// Options of `docker run`.
    pub options: Option<String>,
    /// No network but loopback.
    pub block_external_network: bool,
    /// Of the registry.
    pub username: Option<String>,
    /// Of the registry.
    pub password: Option<String>,
    /// Start while the image is still in the registry.
    pub enable_image_streaming: bool,
}

/// A script runnable: a file or a text.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Script {
    /// A file on the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The script itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// A barrier runnable.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Barrier {
    /// For whoever reads it.
    pub name: Option<String>,
}

/// Environment variables.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Environment {
    /// As they are.
    pub variables: BTreeMap<String, String>,
    /// Names in the cloud's secret store.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub secret_variables: BTreeMap<String, String>,
    /// Encrypted by the cloud's key store.
    #[serde(skip_serializing)]
    pub encrypted_variables: Option<IgnoredAny>,
}

/// Resources of a task.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ComputeResource {
    /// Thousandths of a processor.
    pub cpu_milli: Option<Int64>,
    /// MiB.
    pub memory_mib: Option<Int64>,
    /// Of no meaning on this node.
    pub boot_disk_mib: Option<Int64>,
}

/// What to do about which failures.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LifecyclePolicy {
    /// On a match; the other one without.
    pub action: Option<Action>,
    /// Which.
    pub action_condition: Option<ActionCondition>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Nothing said.
    ActionUnspecified,
    /// Once more.
    RetryTask,
    /// Never more.
    FailTask,
}

/// Which failures.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ActionCondition {
    /// Of the task.
    pub exit_codes: Vec<i32>,
}

/// A volume of a task: exactly one of nfs, gcs and a device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Volume {
    /// A file server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nfs: Option<Nfs>,
    /// A bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gcs: Option<Gcs>,
    /// A disk of the allocation policy.
    pub device_name: Option<String>,
    /// Where it is.
    pub mount_path: Option<String>,
    /// How it is mounted.
    pub mount_options: Vec<String>,
}

/// A file server's directory.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Nfs {
    /// Host.
    pub server: String,
    /// Directory.
    pub remote_path: String,
}

/// A bucket or a directory in one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Gcs {
    /// Bucket and directory.
    pub remote_path: String,
}

/// Where output goes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LogsPolicy {
    /// To what.
    pub destination: Option<Destination>,
    /// Directory, with `PATH`.
    pub logs_path: Option<String>,
    /// Of no meaning on this node.
    pub cloud_logging_option: Option<CloudLoggingOption>,
}

/// Settings of the cloud's log.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CloudLoggingOption {
    use_generic_task_monitored_resource: bool,
}

/// To what output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Destination {
    /// Not kept there; here it is.
    DestinationUnspecified,
    /// A log; here a structured one in the job's directory.
    CloudLogging,
    /// Files in `logsPath`.
    Path,
}

/// A Pub/Sub message.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Notification {
    pubsub_topic: Option<String>,
    message: Option<Message>,
}

/// When a message is sent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Message {
    r#type: Option<String>,
    new_job_state: Option<String>,
    new_task_state: Option<String>,
}
