//! What happened to a job, record by record: the journal that its status is folded from.
//!
//! Records only say what is; reading them all again gives the same status, so a journal is the whole state of a job.

use serde::{Deserialize, Serialize};

use crate::state::{JobState, JobStatus, StatusEvent, TaskExecution, TaskState};

/// How a task's image came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageReport {
    /// Number of the runnable.
    pub runnable: usize,
    /// `streamed`, `local` or `unpacked`.
    pub served: String,
    /// Why it was not streamed, if it was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<String>,
    /// Milliseconds from the runnable's start until the runtime starts its process.
    pub ready_ms: u64,
    /// Bytes of the image that came to the node while the runnable ran.
    pub bytes: u64,
    /// Bytes of the image.
    pub bytes_total: u64,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Change {
    /// The job has another state.
    Job {
        /// Now.
        state: JobState,
        /// Why, if there is more to say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A task has another state.
    Task {
        /// Which.
        task: usize,
        /// Now. `Assigned` begins an attempt.
        state: TaskState,
        /// Of the attempt that ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        /// Why, if there is more to say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A container of a task ended.
    Image {
        /// Which.
        task: usize,
        /// How its image came.
        report: ImageReport,
    },
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When, RFC 3339.
    pub time: String,
    /// What.
    #[serde(flatten)]
    pub change: Change,
}

impl JobStatus {
    /// Of a job of so many tasks to which nothing has happened.
    pub fn new(tasks: usize) -> Self {
        Self { tasks: vec![Default::default(); tasks], ..Self::default() }
    }

    /// Says whether the record follows from what is known; one that does not changes nothing.
    pub fn apply(&mut self, record: &Record) -> bool {
        let time = record.time.as_str();
        match &record.change {
            Change::Job { state, reason } => self.become_state(*state, reason.as_deref(), time),
            Change::Task { task, state, exit_code, reason } => {
                self.task_becomes(*task, *state, *exit_code, reason.as_deref(), time)
            }
            Change::Image { task, report } => {
                let task = self.tasks.get_mut(*task);
                task.map(|task| task.images.push(report.clone())).is_some()
            }
        }
    }

    fn become_state(&mut self, next: JobState, reason: Option<&str>, time: &str) -> bool {
        // The first record of every job says what a new one is anyway.
        let first = self.status_events.is_empty() && next == JobState::Queued;
        if !first && !self.state.may_become(next) {
            return false;
        }
        let because = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        let description = if first {
            format!("Job state is set to {}{because}", next.name())
        } else {
            format!("Job state is set from {} to {}{because}", self.state.name(), next.name())
        };
        self.status_events.push(StatusEvent::new("STATUS_CHANGED", description, time));
        if next == JobState::Running {
            self.ran.0 = Some(time.to_owned());
        } else if self.ran.0.is_some() && self.ran.1.is_none() && self.state == JobState::Running {
            self.ran.1 = Some(time.to_owned());
        }
        self.state = next;
        true
    }

    fn task_becomes(
        &mut self,
        task: usize,
        next: TaskState,
        exit_code: Option<i32>,
        reason: Option<&str>,
        time: &str,
    ) -> bool {
        let Some(task) = self.tasks.get_mut(task).filter(|task| task.state.may_become(next)) else {
            return false;
        };
        let mut description = format!("Task state is updated from {} to {}", task.state.name(), next.name());
        if let Some(code) = exit_code.filter(|code| *code != 0) {
            description += &format!(" with exit code {code}");
        }
        if let Some(reason) = reason {
            description += &format!(": {reason}");
        }
        task.status_events.push(StatusEvent {
            task_state: Some(next),
            task_execution: exit_code.map(|exit_code| TaskExecution { exit_code }),
            ..StatusEvent::new("STATUS_CHANGED", description, time)
        });
        if next == TaskState::Assigned {
            task.attempts += 1;
            task.images.clear();
        }
        task.exit_code = exit_code.or(task.exit_code);
        task.state = next;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(change: Change) -> Record {
        Record { time: "2026-01-01T00:00:00Z".to_owned(), change }
    }

    fn task(state: TaskState, exit_code: Option<i32>) -> Record {
        record(Change::Task { task: 0, state, exit_code, reason: None })
    }

    #[test]
    fn records_survive_a_file() {
        let report = ImageReport { served: "streamed".to_owned(), ready_ms: 3, ..ImageReport::default() };
        for change in [
            Change::Job { state: JobState::Running, reason: None },
            Change::Task {
                task: 7,
                state: TaskState::Failed,
                exit_code: Some(3),
                reason: Some("x".to_owned()),
            },
            Change::Image { task: 7, report },
        ] {
            let written = serde_json::to_string(&record(change.clone())).expect("text");
            let read: Record = serde_json::from_str(&written).expect(&written);
            assert_eq!(read, record(change), "{written}");
        }
    }

    #[test]
    fn a_task_that_is_tried_twice() {
        let mut status = JobStatus::new(1);
        for next in [
            task(TaskState::Assigned, None),
            task(TaskState::Running, None),
            task(TaskState::Pending, Some(3)),
            task(TaskState::Assigned, None),
            task(TaskState::Running, None),
            task(TaskState::Succeeded, Some(0)),
        ] {
            assert!(status.apply(&next), "{next:?}");
        }
        let one = &status.tasks[0];
        assert_eq!((one.state, one.attempts, one.exit_code), (TaskState::Succeeded, 2, Some(0)));
        assert_eq!(one.status_events[2].task_execution, Some(TaskExecution { exit_code: 3 }));
        assert!(one.status_events[2].description.ends_with("from RUNNING to PENDING with exit code 3"));
    }

    #[test]
    fn what_does_not_follow_changes_nothing() {
        let mut status = JobStatus::new(1);
        assert!(status.apply(&record(Change::Job { state: JobState::Queued, reason: None })));
        assert!(!status.apply(&record(Change::Job { state: JobState::Queued, reason: None })));
        assert!(!status.apply(&record(Change::Job { state: JobState::Succeeded, reason: None })));
        assert!(!status.apply(&task(TaskState::Succeeded, Some(0))));
        let elsewhere = Change::Task { task: 1, state: TaskState::Assigned, exit_code: None, reason: None };
        assert!(!status.apply(&record(elsewhere)));
        assert_eq!((status.state, status.status_events.len()), (JobState::Queued, 1));
    }
}
