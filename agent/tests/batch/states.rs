//! What becomes of a job: refused, cancelled, deleted, listed.

use serde_json::{Value, json};

use crate::jobs::{Jobs, job, runs, script, state, task_states};
use crate::rig::wait_until;

#[test]
fn a_job_that_is_cancelled_leaves_nothing_running() {
    let jobs = Jobs::new();
    let container = json!({ "container": {
        "imageUri": jobs.node.image(), "commands": ["sleep", "1000"], "enableImageStreaming": true,
    } });
    let runnables = json!([
        { "script": { "text": "exec sleep 1000" }, "background": true },
        container,
        { "script": { "text": "echo no" }, "alwaysRun": true },
    ]);
    jobs.submit("long", &job(&runnables, 5, 2));
    let there = || [0, 1].iter().all(|task| jobs.processes("long", *task).len() >= 2);
    wait_until("two tasks run", there);
    let processes = [0, 1].map(|task| jobs.processes("long", task)).concat();
    assert_eq!(jobs.node.ok(&["batch", "cancel", "long"]), "CANCELLED\n");
    let ended = jobs.describe("long");
    assert_eq!(task_states(&ended), ["FAILED", "FAILED", "UNEXECUTED", "UNEXECUTED", "UNEXECUTED"]);
    assert!(!processes.iter().any(runs), "{processes:?}");
    let states: Vec<&str> = ended["status"]["statusEvents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["description"].as_str().unwrap().rsplit(' ').next().unwrap())
        .collect();
    assert_eq!(states, ["QUEUED", "SCHEDULED", "RUNNING", "CANCELLATION_IN_PROGRESS", "CANCELLED"]);
    assert!(jobs.lines("long", 0).is_empty());
    let containers = std::fs::read_dir(jobs.node.path("root/containers")).unwrap().flatten();
    let left: Vec<_> = containers.map(|entry| entry.file_name()).filter(|name| name != ".runtime").collect();
    assert!(left.is_empty(), "{left:?}");
    let said = jobs.node.complaint(&["batch", "cancel", "long"]);
    assert!(said.contains("is over: CANCELLED"), "{said}");
}

#[test]
fn a_job_that_is_deleted_is_gone_and_its_name_is_free() {
    let jobs = Jobs::new();
    let endless = job(&json!([script("exec sleep 1000")]), 1, 1);
    jobs.submit("mine", &endless);
    let said = jobs.node.complaint(&["batch", "submit", &jobs.document(&endless), "--job-id", "mine"]);
    assert!(said.contains("there is a job `mine` already"), "{said}");
    wait_until("it runs", || !jobs.processes("mine", 0).is_empty());
    let processes = jobs.processes("mine", 0);
    jobs.node.ok(&["batch", "delete", "mine"]);
    assert!(!processes.iter().any(runs), "{processes:?}");
    let said = jobs.node.complaint(&["batch", "describe", "mine"]);
    assert!(said.contains("there is no job `mine` here"), "{said}");
    jobs.run("mine", &job(&json!([script("true")]), 1, 1));
    let listed: Value = serde_json::from_str(&jobs.node.ok(&["batch", "list", "--json"])).unwrap();
    assert_eq!(listed["jobs"].as_array().unwrap().len(), 1);
    assert_eq!(listed["jobs"][0]["status"]["state"], "SUCCEEDED");
    assert!(jobs.node.ok(&["batch", "list"]).contains("mine"));
    jobs.node.ok(&["batch", "delete", "mine"]);
    assert_eq!(jobs.node.ok(&["batch", "list"]).lines().count(), 1);
}

#[test]
fn what_is_refused_is_named_and_what_is_not_applied_is_said() {
    let jobs = Jobs::new();
    let mut document = job(&json!([script("true")]), 1, 1);
    document["allocationPolicy"] = json!({ "location": { "allowedLocations": ["regions/us-central1"] } });
    document["priority"] = json!("7");
    let checked = jobs.node.run(&["batch", "validate", &jobs.document(&document)]);
    let said = String::from_utf8(checked.stderr).unwrap();
    assert!(
        said.contains("allocationPolicy: not applied") && said.contains("priority: not applied"),
        "{said}"
    );
    document["taskGroups"][0]["taskSpec"]["runables"] = json!([]);
    let said = jobs.node.complaint(&["batch", "validate", &jobs.document(&document)]);
    assert!(said.contains("taskGroups[0].taskSpec.runables: unknown field `runables`"), "{said}");
    let volumes = json!([{ "gcs": { "remotePath": "bucket" }, "mountPath": "/mnt" }]);
    let refused = crate::jobs::with(job(&json!([script("true")]), 1, 1), "volumes", volumes);
    let said = jobs.node.complaint(&["batch", "submit", &jobs.document(&refused)]);
    assert!(said.contains("taskGroups[0].taskSpec.volumes[0].gcs: buckets are not mounted here"), "{said}");
    let said = jobs.node.complaint(&[
        "batch",
        "submit",
        &jobs.document(&job(&json!([script("true")]), 1, 1)),
        "--job-id",
        "Not_One",
    ]);
    assert!(said.contains("is not an identifier of a job"), "{said}");
    assert_eq!(jobs.node.ok(&["batch", "list"]).lines().count(), 1);
}

#[test]
fn the_exit_code_of_waiting_is_the_jobs() {
    let jobs = Jobs::new();
    let document = jobs.document(&job(&json!([script("exit 9")]), 1, 1));
    let output = jobs.node.run(&["batch", "submit", &document, "--job-id", "failing", "--wait"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b"failing\nFAILED\n"[..]));
    assert_eq!(state(&jobs.describe("failing")), "FAILED");
}
