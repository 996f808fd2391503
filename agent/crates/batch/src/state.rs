//! States of jobs and tasks as the reference names them, and what follows from the end of an attempt.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::job::Action;
use crate::plan::Plan;
use crate::record::ImageReport;

/// Reserved exit code: the machine was not heard of while the task ran; here: whoever ran the job died.
pub const NOT_HEARD_OF: i32 = 50_002;
/// Reserved exit code: the machine was started anew while the task ran.
pub const REBOOTED: i32 = 50_003;
/// Reserved exit code: the task or a runnable of it ran longer than it may.
pub const TIMED_OUT: i32 = 50_005;
/// Reserved exit code: the task failed, and not by an exit code of its own.
pub const UNKNOWN_FAILURE: i32 = 50_000;

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum JobState {
    /// Accepted.
    #[default]
    Queued,
    /// About to run.
    Scheduled,
    /// A task ran.
    Running,
    /// All tasks did well.
    Succeeded,
    /// One did not.
    Failed,
    /// About to be gone.
    DeletionInProgress,
    /// About to be cancelled.
    CancellationInProgress,
    /// Ended by request.
    Cancelled,
}

impl JobState {
    /// Nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether `next` may follow.
    pub fn may_become(self, next: Self) -> bool {
        use JobState::{
            CancellationInProgress, Cancelled, DeletionInProgress, Failed, Queued, Running, Scheduled,
            Succeeded,
        };
        match self {
            Queued => matches!(next, Scheduled | Failed | CancellationInProgress | DeletionInProgress),
            Scheduled => matches!(next, Running | Failed | CancellationInProgress | DeletionInProgress),
            Running => matches!(next, Succeeded | Failed | CancellationInProgress | DeletionInProgress),
            CancellationInProgress => matches!(next, Cancelled | Failed | DeletionInProgress),
            Succeeded | Failed | Cancelled => next == DeletionInProgress,
            DeletionInProgress => false,
        }
    }

    /// As in documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Scheduled => "SCHEDULED",
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::DeletionInProgress => "DELETION_IN_PROGRESS",
            Self::CancellationInProgress => "CANCELLATION_IN_PROGRESS",
            Self::Cancelled => "CANCELLED",
        }
    }
}

/// State of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TaskState {
    /// Waiting for room.
    #[default]
    Pending,
    /// Has a machine.
    Assigned,
    /// Runs.
    Running,
    /// Did not do well, for good.
    Failed,
    /// Did well.
    Succeeded,
    /// Not run when the job ended.
    Unexecuted,
}

impl TaskState {
    /// Nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Succeeded | Self::Unexecuted)
    }

    /// Whether `next` may follow. A task that is tried once more is pending again.
    pub fn may_become(self, next: Self) -> bool {
        match self {
            Self::Pending => matches!(next, Self::Assigned | Self::Unexecuted),
            Self::Assigned => matches!(next, Self::Running | Self::Pending | Self::Failed),
            Self::Running => matches!(next, Self::Succeeded | Self::Pending | Self::Failed),
            Self::Failed | Self::Succeeded | Self::Unexecuted => false,
        }
    }

    /// As in documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Assigned => "ASSIGNED",
            Self::Running => "RUNNING",
            Self::Failed => "FAILED",
            Self::Succeeded => "SUCCEEDED",
            Self::Unexecuted => "UNEXECUTED",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusEvent {
    /// What kind.
    pub r#type: String,
    /// For people.
    pub description: String,
    /// RFC 3339.
    pub event_time: String,
    /// Of a task that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_execution: Option<TaskExecution>,
    /// Of a task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_state: Option<TaskState>,
}

impl StatusEvent {
    /// One of a job.
    pub(crate) fn new(kind: &str, description: String, time: &str) -> Self {
        Self { r#type: kind.to_owned(), description, event_time: time.to_owned(), ..Self::default() }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskExecution {
    /// Of its first failure.
    pub exit_code: i32,
}

/// A task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskStatus {
    /// Now.
    pub state: TaskState,
    /// Attempts begun.
    pub attempts: u32,
    /// Exit code of the last attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Of the last attempt, in the order in which its containers ended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageReport>,
    /// Oldest first.
    pub status_events: Vec<StatusEvent>,
}

/// A job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobStatus {
    /// Now.
    pub state: JobState,
    /// Oldest first.
    pub status_events: Vec<StatusEvent>,
    /// When it began to run, and stopped, RFC 3339.
    pub ran: (Option<String>, Option<String>),
    /// By index.
    pub tasks: Vec<TaskStatus>,
}

impl JobStatus {
    /// How many tasks are in which state.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for task in &self.tasks {
            *counts.entry(task.state.name()).or_insert(0) += 1;
        }
        counts
    }
}

/// How an attempt of a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps that count did well.
    Well,
    /// The first that did not.
    Failed(i32),
    /// Ended by request.
    Cancelled,
}

/// What follows from that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done.
    Succeed,
    /// Once more.
    Retry,
    /// Failed for good.
    Fail,
}

/// What follows from an attempt, `retries` after the first. A lifecycle policy's action is for the exit codes it names; the
/// opposite is for all others.
pub fn verdict(plan: &Plan, outcome: Outcome, retries: u32) -> Verdict {
    let code = match outcome {
        Outcome::Well => return Verdict::Succeed,
        Outcome::Cancelled => return Verdict::Fail,
        Outcome::Failed(code) => code,
    };
    let retry = match &plan.policy {
        Some((Action::RetryTask, codes)) => codes.contains(&code),
        Some((Action::FailTask, codes)) => !codes.contains(&code),
        Some((Action::ActionUnspecified, _)) | None => true,
    };
    if retry && retries < plan.max_retries { Verdict::Retry } else { Verdict::Fail }
}
