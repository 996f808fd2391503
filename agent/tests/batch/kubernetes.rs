//! `--target kubernetes`: what is made, and what the same commands then say of it.

use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::jobs::{Jobs, failure, job, script, state, task_states, with};

fn document(jobs: &Jobs) -> String {
    let container = json!({ "container": {
        "imageUri": "registry.example/app:1", "entrypoint": "/bin/app", "commands": ["--fast"], "enableImageStreaming": true,
    } });
    let document = with(job(&json!([container]), 3, 2), "maxRetryCount", json!(1));
    jobs.document(&with(document, "computeResource", json!({ "cpuMilli": 500, "memoryMib": 64 })))
}

#[test]
fn a_dry_run_prints_the_job_and_makes_nothing() {
    let jobs = Jobs::new();
    let said = jobs.node.ok(&[
        "batch",
        "submit",
        &document(&jobs),
        "--job-id",
        "demo",
        "--target",
        "kubernetes",
        "--dry-run",
    ]);
    let made: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&made["apiVersion"], &made["kind"]), (&json!("batch/v1"), &json!("Job")));
    let spec = &made["spec"];
    assert_eq!(
        (&spec["completionMode"], &spec["completions"], &spec["parallelism"]),
        (&json!("Indexed"), &json!(3), &json!(2))
    );
    assert_eq!(spec["backoffLimitPerIndex"], 1);
    assert_eq!(spec["template"]["spec"]["nodeSelector"], json!({ "sluice.dev/image-streaming": "true" }));
    assert_eq!(
        spec["template"]["spec"]["containers"][0]["resources"]["limits"],
        json!({ "cpu": "500m", "memory": "64Mi" })
    );
    assert_eq!(jobs.node.ok(&["batch", "list"]).lines().count(), 1);
    let barrier = jobs.document(&job(&json!([{ "barrier": {} }, script("true")]), 2, 2));
    let said = jobs.node.complaint(&["batch", "submit", &barrier, "--target", "kubernetes", "--dry-run"]);
    assert!(
        said.contains("taskGroups[0].taskSpec.runnables[0].barrier: Kubernetes has no barrier"),
        "{said}"
    );
}

#[test]
fn a_job_of_a_cluster_is_followed_to_its_end() {
    let jobs = Jobs::new();
    let server = ApiServer::start();
    let config = jobs.node.path("kubeconfig");
    std::fs::write(&config, server.kubeconfig()).unwrap();
    let document = document(&jobs);
    let submit = [
        "batch",
        "submit",
        &document,
        "--job-id",
        "demo",
        "--target",
        "kubernetes",
        "--kubeconfig",
        config.to_str().unwrap(),
    ];
    assert_eq!(jobs.node.ok(&submit), "demo\n");
    assert_eq!(state(&jobs.describe("demo")), "QUEUED");
    let made = server.cluster.lock().unwrap().jobs[0].clone();
    assert_eq!((&made["metadata"]["namespace"], &made["spec"]["completions"]), (&json!("work"), &json!(3)));
    // Another node's command does not take the name.
    let said = jobs.node.complaint(&submit);
    assert!(said.contains("there is a job `demo` already"), "{said}");
    let ended = |code: i32, at: &str| json!({ "terminated": { "exitCode": code, "startedAt": "2026-01-01T00:00:03Z", "finishedAt": at } });
    server.pod(0, 1, "Failed", &ended(9, "2026-01-01T00:00:04Z"));
    server.pod(0, 5, "Running", &json!({ "running": { "startedAt": "2026-01-01T00:00:08Z" } }));
    server.pod(1, 1, "Succeeded", &ended(0, "2026-01-01T00:00:04Z"));
    server.job_status(json!({ "startTime": "2026-01-01T00:00:01Z", "active": 1, "completedIndexes": "1" }));
    let seen = jobs.describe("demo");
    assert_eq!(
        (state(&seen), task_states(&seen)),
        ("RUNNING", vec!["RUNNING", "SUCCEEDED", "PENDING"]),
        "{seen:#}"
    );
    assert!(failure(&seen, 0).contains("exit code 9"), "{seen:#}");
    assert_eq!(seen["tasks"][0]["status"]["images"][0]["readyMs"], 3000);
    let said = jobs.node.ok(&["batch", "logs", "demo", "--task", "1"]);
    assert_eq!(said, "1 [runnable-0] demo-1-1 says\n1 [runnable-0] runnable-0 is done\n");
    let waiting = jobs.node.command(&["batch", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&waiting.stdout).contains("RUNNING"), "{waiting:?}");
    server.job_status(json!({
        "startTime": "2026-01-01T00:00:01Z", "completedIndexes": "0-2",
        "conditions": [{ "type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T00:00:11Z" }],
    }));
    let seen = jobs.describe("demo");
    assert_eq!((state(&seen), task_states(&seen)), ("SUCCEEDED", vec!["SUCCEEDED"; 3]));
    jobs.node.ok(&["batch", "delete", "demo"]);
    assert!(server.cluster.lock().unwrap().jobs.is_empty());
    assert_eq!(jobs.node.ok(&["batch", "list"]).lines().count(), 1);
}

#[test]
fn a_job_of_a_cluster_is_cancelled_and_one_that_is_refused_forgotten() {
    let jobs = Jobs::new();
    let server = ApiServer::start();
    let config = jobs.node.path("kubeconfig");
    std::fs::write(&config, server.kubeconfig()).unwrap();
    let document = document(&jobs);
    let submit = [
        "batch",
        "submit",
        &document,
        "--job-id",
        "demo",
        "--target",
        "kubernetes",
        "--kubeconfig",
        config.to_str().unwrap(),
    ];
    jobs.node.ok(&submit);
    assert_eq!(jobs.node.ok(&["batch", "cancel", "demo"]), "CANCELLED\n");
    assert_eq!(task_states(&jobs.describe("demo")), ["UNEXECUTED"; 3]);
    jobs.node.ok(&["batch", "delete", "demo"]);
    server.cluster.lock().unwrap().jobs.push(json!({ "metadata": { "name": "demo" } }));
    let said = jobs.node.complaint(&submit);
    assert!(said.contains("the cluster does not take Job `demo`"), "{said}");
    assert_eq!(jobs.node.ok(&["batch", "list"]).lines().count(), 1);
}
