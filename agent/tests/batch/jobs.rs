//! Jobs on a test's node: submitted, waited for, looked at.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::rig::{Node, wait_until};

/// A node whose jobs' leftovers are looked for when it is dropped.
pub(crate) struct Jobs {
    pub(crate) node: Node,
}

impl Jobs {
    pub(crate) fn new() -> Self {
        Self { node: Node::indexed("[stream]\nfill = false\n") }
    }

    /// Writes a document; where.
    pub(crate) fn document(&self, job: &Value) -> String {
        let path = self.node.path("job.json");
        fs::write(&path, job.to_string()).unwrap();
        path.display().to_string()
    }

    /// Submits a job under a name.
    #[track_caller]
    pub(crate) fn submit(&self, id: &str, job: &Value) {
        let said = self.node.ok(&["batch", "submit", &self.document(job), "--job-id", id]);
        assert_eq!(said, format!("{id}\n"));
    }

    /// Submits a job and waits for its end; the job with its state and tasks.
    #[track_caller]
    pub(crate) fn run(&self, id: &str, job: &Value) -> Value {
        self.submit(id, job);
        self.over(id)
    }

    /// Waits for a job's end.
    #[track_caller]
    pub(crate) fn over(&self, id: &str) -> Value {
        let is_final = |state: &str| ["SUCCEEDED", "FAILED", "CANCELLED"].contains(&state);
        let mut job = Value::Null;
        // Longer than any of the tests' jobs: the machine may be busy.
        for _ in 0..10 {
            let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                wait_until("the job is over", || {
                    job = self.describe(id);
                    is_final(state(&job))
                });
            }));
            if waited.is_ok() {
                return job;
            }
        }
        panic!("{id} is not over: {job:#}");
    }

    #[track_caller]
    pub(crate) fn describe(&self, id: &str) -> Value {
        serde_json::from_str(&self.node.ok(&["batch", "describe", id, "--json"])).unwrap()
    }

    /// The output of a job's task, line by line.
    #[track_caller]
    pub(crate) fn lines(&self, id: &str, task: usize) -> Vec<String> {
        let said = self.node.ok(&["batch", "logs", id, "--json", "--task", &task.to_string()]);
        let text = |line: &str| {
            serde_json::from_str::<Value>(line).unwrap()["textPayload"].as_str().unwrap().to_owned()
        };
        said.lines().map(text).collect()
    }

    /// The process that runs a job.
    pub(crate) fn runner(&self, id: &str) -> i32 {
        fs::read_to_string(self.node.path("root/batch").join(id).join("runner")).unwrap().parse().unwrap()
    }

    /// Processes in the control groups of a job's task.
    pub(crate) fn processes(&self, id: &str, task: usize) -> Vec<i32> {
        let uid = self.describe(id)["uid"].as_str().unwrap().to_owned();
        let mut found = Vec::new();
        for group in groups(&format!("batch-{uid}")) {
            gather(&group.join(task.to_string()), &mut found);
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // What a failed test leaves running.
        for entry in fs::read_dir(self.node.path("root/batch")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            if std::thread::panicking() {
                eprintln!(
                    "--- {id}\n{}",
                    String::from_utf8_lossy(&self.node.run(&["batch", "describe", &id]).stdout)
                );
                eprintln!("{}", fs::read_to_string(entry.path().join("runner.log")).unwrap_or_default());
            }
            let deleted = self.node.run(&["batch", "delete", &id]);
            assert!(deleted.status.success() || std::thread::panicking(), "{deleted:?}");
            let left = groups(&format!("batch-{id}-"));
            assert!(left.is_empty() || std::thread::panicking(), "{left:?}");
        }
    }
}

/// Directories of control groups whose name begins so.
fn groups(name: &str) -> Vec<PathBuf> {
    let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
    hierarchies.extend(fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path()));
    let inside = |root: &PathBuf| fs::read_dir(root.join("sluice")).into_iter().flatten().flatten();
    let named = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(name);
    hierarchies.iter().flat_map(inside).map(|entry| entry.path()).filter(named).collect()
}

fn gather(group: &Path, found: &mut Vec<i32>) {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    found.extend(text.lines().map(|line| line.parse::<i32>().unwrap()));
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            gather(&entry.path(), found);
        }
    }
}

/// Whether a process runs; one that nobody asked for the end of does not.
pub(crate) fn runs(pid: &i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub(crate) fn state(job: &Value) -> &str {
    job["status"]["state"].as_str().unwrap()
}

/// States of a job's tasks.
pub(crate) fn task_states(job: &Value) -> Vec<&str> {
    job["tasks"].as_array().unwrap().iter().map(|task| task["status"]["state"].as_str().unwrap()).collect()
}

/// What the last failure of a task is said to be.
pub(crate) fn failure(job: &Value, task: usize) -> String {
    let events = job["tasks"][task]["status"]["statusEvents"].as_array().unwrap();
    let failed =
        events.iter().rev().find(|event| event["taskExecution"]["exitCode"].as_i64().unwrap_or(0) != 0);
    failed.map(|event| event["description"].as_str().unwrap().to_owned()).unwrap_or_default()
}

pub(crate) fn script(text: &str) -> Value {
    json!({ "script": { "text": text } })
}

/// A job of one group.
pub(crate) fn job(runnables: &Value, tasks: usize, parallelism: usize) -> Value {
    json!({ "taskGroups": [{
        "taskSpec": { "runnables": runnables }, "taskCount": tasks.to_string(), "parallelism": parallelism,
    }] })
}

/// The job, with something else in its task specification.
pub(crate) fn with(mut job: Value, field: &str, value: Value) -> Value {
    job["taskGroups"][0]["taskSpec"][field] = value;
    job
}
