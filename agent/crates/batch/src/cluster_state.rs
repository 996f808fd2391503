//! What a Kubernetes Job and its pods say of a job's state, in the reference's words.

use k8s_openapi::api::batch::v1::Job as ClusterJob;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::kubernetes::INDEX_ANNOTATION;
use crate::record::{Change, ImageReport, Record};
use crate::state::{JobState, JobStatus, TaskState};

/// The index of a pod of an indexed Job.
pub fn pod_index(pod: &Pod) -> Option<usize> {
    pod.metadata.annotations.as_ref()?.get(INDEX_ANNOTATION)?.parse().ok()
}

/// The status of a job of `tasks` tasks; `cancelled`: it was asked to end.
///
/// Of events only those are known that the cluster keeps; a pod that is gone counts as never begun.
pub fn from_kubernetes(job: &ClusterJob, pods: &[Pod], tasks: usize, cancelled: bool) -> JobStatus {
    let mut status = JobStatus::new(tasks);
    let created = stamp(job.metadata.creation_timestamp.as_ref());
    let of_job = |state: JobState, reason: Option<String>, time: &str| Record {
        time: time.to_owned(),
        change: Change::Job { state, reason },
    };
    status.apply(&of_job(JobState::Queued, None, &created));
    let known = job.status.clone().unwrap_or_default();
    let mut ordered: Vec<&Pod> = pods.iter().collect();
    ordered.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
    if known.start_time.is_some() {
        status.apply(&of_job(JobState::Scheduled, None, &stamp(known.start_time.as_ref())));
    }
    let begun = ordered.iter().filter_map(|pod| begin(pod)).min();
    if let Some(begun) = begun {
        status.apply(&of_job(JobState::Running, None, &stamp(Some(&begun))));
    }
    let (completed, failed) = (known.completed_indexes.as_deref(), known.failed_indexes.as_deref());
    for pod in ordered {
        pod_happened(&mut status, pod, in_ranges(failed, pod_index(pod)), &created);
    }
    for task in 0..tasks {
        settle(&mut status, task, in_ranges(completed, Some(task)), in_ranges(failed, Some(task)), &created);
    }
    let conditions = known.conditions.unwrap_or_default();
    let holds = |kind: &str| {
        conditions.iter().find(|condition| condition.type_ == kind && condition.status == "True")
    };
    let over = [("Complete", JobState::Succeeded), ("Failed", JobState::Failed)];
    if let Some((condition, state)) = over.iter().find_map(|(kind, state)| Some((holds(kind)?, *state))) {
        let time = stamp(condition.last_transition_time.as_ref());
        // What ended between two looks ran all the same.
        for before in [JobState::Scheduled, JobState::Running] {
            status.apply(&of_job(before, None, &time));
        }
        status.apply(&of_job(state, condition.message.clone(), &time));
    } else if job.metadata.deletion_timestamp.is_some() {
        let time = stamp(job.metadata.deletion_timestamp.as_ref());
        status.apply(&of_job(JobState::DeletionInProgress, None, &time));
    } else if cancelled {
        let time = holds("Suspended").map(|condition| stamp(condition.last_transition_time.as_ref()));
        let active = known.active.unwrap_or(0) + known.terminating.unwrap_or(0);
        status.apply(&of_job(JobState::CancellationInProgress, None, time.as_ref().unwrap_or(&created)));
        if let Some(time) = time.filter(|_| active == 0) {
            status.apply(&of_job(JobState::Cancelled, None, &time));
        }
    }
    if status.state.is_final() {
        unexecuted(&mut status);
    }
    status
}

/// What one pod, an attempt of a task, says.
fn pod_happened(status: &mut JobStatus, pod: &Pod, for_good: bool, created: &str) {
    let Some(task) = pod_index(pod) else { return };
    let mut say = |state: TaskState, exit_code: Option<i32>, reason: Option<String>, time: &str| {
        let change = Change::Task { task, state, exit_code, reason };
        status.apply(&Record { time: time.to_owned(), change });
    };
    let made = pod.metadata.creation_timestamp.as_ref().map_or(created.to_owned(), |time| stamp(Some(time)));
    say(TaskState::Assigned, None, None, &made);
    let begun = begin(pod);
    if let Some(begun) = &begun {
        say(TaskState::Running, None, None, &stamp(Some(begun)));
    }
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if phase == Some("Failed") {
        let (code, time) = failure(pod);
        let reason = pod.status.as_ref().and_then(|status| status.message.clone().or(status.reason.clone()));
        let time = if time.is_empty() { made.clone() } else { time };
        let next = if for_good { TaskState::Failed } else { TaskState::Pending };
        say(next, Some(code), reason, &time);
    }
    if let (Some(begun), Some(ready)) =
        (begun, pod.status.as_ref().and_then(|status| status.start_time.clone()))
    {
        let ready_ms = begun.0.as_millisecond().saturating_sub(ready.0.as_millisecond());
        let report = ImageReport {
            served: "by the cluster's node".to_owned(),
            ready_ms: u64::try_from(ready_ms).unwrap_or(0),
            ..ImageReport::default()
        };
        status.apply(&Record { time: stamp(Some(&begun)), change: Change::Image { task, report } });
    }
}

/// Brings a task to the state in which the Job counts it.
fn settle(status: &mut JobStatus, task: usize, completed: bool, failed: bool, time: &str) {
    let state = match (completed, failed) {
        (true, _) => TaskState::Succeeded,
        (_, true) => TaskState::Failed,
        _ => return,
    };
    let is = status.tasks.get(task).map(|task| (task.state, task.exit_code)).unwrap_or_default();
    if is.0 == state {
        return;
    }
    let code = if state == TaskState::Succeeded { Some(0) } else { is.1 };
    for (next, exit_code) in [(TaskState::Assigned, None), (TaskState::Running, None), (state, code)] {
        let change = Change::Task { task, state: next, exit_code, reason: None };
        status.apply(&Record { time: time.to_owned(), change });
    }
}

fn unexecuted(status: &mut JobStatus) {
    for task in &mut status.tasks {
        task.state = match task.state {
            TaskState::Pending => TaskState::Unexecuted,
            TaskState::Assigned | TaskState::Running => TaskState::Failed,
            settled => settled,
        };
    }
}

fn containers(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|status| status.init_container_statuses.as_ref()).into_iter().flatten();
    init.chain(status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten())
}

/// When the first container's process began.
fn begin(pod: &Pod) -> Option<Time> {
    let began = |container: &ContainerStatus| {
        let state = container.state.as_ref()?;
        let running = state.running.as_ref().and_then(|running| running.started_at.clone());
        running.or_else(|| state.terminated.as_ref()?.started_at.clone())
    };
    containers(pod).filter_map(began).min()
}

/// Exit code of the first container that failed, and when.
fn failure(pod: &Pod) -> (i32, String) {
    let ended = containers(pod).filter_map(|container| container.state.as_ref()?.terminated.as_ref());
    let failed = ended.filter(|ended| ended.exit_code != 0).min_by_key(|ended| ended.finished_at.clone());
    failed.map_or((crate::UNKNOWN_FAILURE, String::new()), |ended| {
        (ended.exit_code, stamp(ended.finished_at.as_ref()))
    })
}

fn stamp(time: Option<&Time>) -> String {
    time.map(|time| time.0.to_string()).unwrap_or_default()
}

/// Whether a number is among those of a Job's list of indexes, as in `0,3-5`.
fn in_ranges(ranges: Option<&str>, number: Option<usize>) -> bool {
    let Some(number) = number else { return false };
    ranges.unwrap_or("").split(',').any(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        match (from.parse::<usize>(), to.parse::<usize>()) {
            (Ok(from), Ok(to)) => (from..=to).contains(&number),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(index: usize, made: &str, phase: &str, state: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "creationTimestamp": made, "annotations": { INDEX_ANNOTATION: index.to_string() } },
            "status": { "phase": phase, "startTime": made, "containerStatuses": [{
                "name": "runnable-0", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state,
            }] },
        }))
        .unwrap()
    }

    fn job(status: serde_json::Value) -> ClusterJob {
        serde_json::from_value(
            json!({ "metadata": { "creationTimestamp": "2026-01-01T00:00:00Z" }, "status": status }),
        )
        .unwrap()
    }

    #[test]
    fn indexes() {
        for (number, within) in [(0, true), (1, false), (3, true), (4, true), (5, true), (6, false)] {
            assert_eq!(in_ranges(Some("0,3-5"), Some(number)), within, "{number}");
        }
        assert!(!in_ranges(None, Some(0)) && !in_ranges(Some("x,-"), Some(0)));
    }

    #[test]
    fn a_job_on_its_way() {
        let started = |at: &str| json!({ "running": { "startedAt": at } });
        let ended = |code: i32| json!({ "terminated": { "exitCode": code, "startedAt": "2026-01-01T00:00:02Z", "finishedAt": "2026-01-01T00:00:05Z" } });
        let pods = [
            pod(0, "2026-01-01T00:00:01Z", "Failed", ended(7)),
            pod(0, "2026-01-01T00:00:06Z", "Running", started("2026-01-01T00:00:08Z")),
            pod(1, "2026-01-01T00:00:01Z", "Succeeded", ended(0)),
            pod(2, "2026-01-01T00:00:01Z", "Pending", json!({ "waiting": {} })),
        ];
        let known = json!({ "startTime": "2026-01-01T00:00:01Z", "active": 2, "completedIndexes": "1" });
        let status = from_kubernetes(&job(known), &pods, 4, false);
        assert_eq!(status.state, JobState::Running);
        let states: Vec<_> = status.tasks.iter().map(|task| task.state.name()).collect();
        assert_eq!(states, ["RUNNING", "SUCCEEDED", "ASSIGNED", "PENDING"]);
        assert_eq!((status.tasks[0].attempts, status.tasks[0].exit_code), (2, Some(7)));
        assert_eq!(status.tasks[0].images[0].ready_ms, 2000);
    }

    #[test]
    fn how_jobs_end() {
        let condition = |kind: &str| json!([{ "type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:01:00Z", "message": "why" }]);
        let status = from_kubernetes(
            &job(json!({ "conditions": condition("Complete"), "completedIndexes": "0-1" })),
            &[],
            2,
            false,
        );
        assert_eq!((status.state, status.counts()["SUCCEEDED"]), (JobState::Succeeded, 2));
        let status = from_kubernetes(
            &job(json!({ "conditions": condition("Failed"), "failedIndexes": "1" })),
            &[],
            2,
            false,
        );
        assert_eq!((status.state, status.counts()["UNEXECUTED"]), (JobState::Failed, 1));
        assert!(status.status_events.last().unwrap().description.ends_with("to FAILED: why"));
        let suspended = json!({ "conditions": condition("Suspended"), "active": 1 });
        assert_eq!(from_kubernetes(&job(suspended), &[], 2, true).state, JobState::CancellationInProgress);
        let suspended = json!({ "conditions": condition("Suspended") });
        assert_eq!(from_kubernetes(&job(suspended), &[], 2, true).state, JobState::Cancelled);
    }
}
