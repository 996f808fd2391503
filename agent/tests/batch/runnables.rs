//! Runnables: order, background, barriers, what runs after a failure, limits, volumes, variables.

use serde_json::json;

use crate::jobs::{Jobs, failure, job, script, state, task_states, with};
use crate::rig::wait_until;

#[test]
fn scripts_run_on_the_machine_one_after_the_other() {
    let jobs = Jobs::new();
    let file = jobs.node.path("script.sh");
    std::fs::write(&file, "#!/bin/sed 1d\nthe second line\n").unwrap();
    let runnables = json!([
        script("echo first $BATCH_TASK_INDEX of $BATCH_TASK_COUNT, attempt $BATCH_TASK_RETRY_ATTEMPT; pwd"),
        { "script": { "text": "#!/bin/sh -e\nfalse\necho not reached" }, "ignoreExitStatus": true },
        { "script": { "path": file }, "displayName": "from a file" },
        { "script": { "text": "echo $WHOSE $OTHER >&2; nohup sleep 100 & echo left" },
          "environment": { "variables": { "WHOSE": "the runnable's" } } },
    ]);
    let job = with(
        job(&runnables, 2, 2),
        "environment",
        json!({ "variables": { "WHOSE": "the task's", "OTHER": "other" } }),
    );
    let ended = jobs.run("scripts", &job);
    assert_eq!(state(&ended), "SUCCEEDED", "{ended:#}");
    let mut lines = jobs.lines("scripts", 1);
    assert_eq!(lines[..3], ["first 1 of 2, attempt 0", "/", "the second line"]);
    lines[3..].sort();
    assert_eq!(lines[3..], ["left", "the runnable's other"]);
    let logged = jobs.node.ok(&["batch", "logs", "scripts", "--json"]);
    assert!(
        logged.contains(r#""severity":"ERROR""#) && logged.contains(r#""runnable":"from a file""#),
        "{logged}"
    );
    assert_eq!(ended["status"]["taskGroups"]["group0"]["counts"]["SUCCEEDED"], "2");
}

#[test]
fn after_a_failure_only_what_always_runs() {
    let jobs = Jobs::new();
    let runnables = json!([
        script("exit 3"),
        script("echo not reached"),
        { "script": { "text": "echo cleaning; exit 4" }, "alwaysRun": true },
    ]);
    let ended = jobs.run("failing", &job(&runnables, 1, 1));
    assert_eq!(state(&ended), "FAILED");
    assert_eq!(jobs.lines("failing", 0), ["cleaning"]);
    assert!(failure(&ended, 0).ends_with("exit code 3: runnable 0 ended with exit code 3"), "{ended:#}");
    let said = jobs.node.ok(&["batch", "describe", "failing"]);
    assert!(said.contains("FAILED: failed: task 0"), "{said}");
}

#[test]
fn the_background_lasts_as_long_as_the_foreground() {
    let jobs = Jobs::new();
    let shared = jobs.node.room("shared");
    let runnables = json!([
        { "script": { "text": format!("echo up > {0}/up; exec sleep 1000", shared.display()) }, "background": true },
        script(&format!("until [ -e {0}/up ]; do sleep 0.05; done; echo served", shared.display())),
    ]);
    assert_eq!(state(&jobs.run("serving", &job(&runnables, 1, 1))), "SUCCEEDED");
    assert_eq!(jobs.lines("serving", 0), ["served"]);
    let failing = json!([
        { "script": { "text": "exit 6" }, "background": true },
        script("sleep 1"),
        script("echo not reached"),
    ]);
    let ended = jobs.run("failing", &job(&failing, 1, 1));
    assert_eq!((state(&ended), ended["tasks"][0]["status"]["exitCode"].as_i64()), ("FAILED", Some(6)));
    assert!(jobs.lines("failing", 0).is_empty());
}

#[test]
fn a_barrier_is_passed_by_all_or_none() {
    let jobs = Jobs::new();
    let dir = jobs.node.room("met");
    let runnables = json!([
        script(&format!("sleep 0.$BATCH_TASK_INDEX; touch {}/$BATCH_TASK_INDEX", dir.display())),
        { "barrier": { "name": "all-there" } },
        script(&format!("ls {} | wc -l", dir.display())),
    ]);
    let ended = jobs.run("meeting", &job(&runnables, 4, 4));
    assert_eq!(task_states(&ended), ["SUCCEEDED"; 4], "{ended:#}");
    for task in 0..4 {
        assert_eq!(jobs.lines("meeting", task), ["4"]);
    }
    let runnables = json!([script("test $BATCH_TASK_INDEX != 2"), { "barrier": {} }, script("echo passed")]);
    let ended = jobs.run("alone", &job(&runnables, 3, 3));
    assert_eq!(task_states(&ended), ["FAILED"; 3]);
    assert!(failure(&ended, 0).contains("barrier 1 is never passed: task 2 failed before it"), "{ended:#}");
}

#[test]
fn time_limits() {
    let jobs = Jobs::new();
    // The shell does not end when it is asked to.
    let stubborn = "trap '' TERM; while :; do sleep 1000; done";
    let runnables = json!([
        { "script": { "text": stubborn }, "timeout": "0.5s" },
        { "script": { "text": "echo cleaning" }, "alwaysRun": true },
    ]);
    jobs.submit("runnable", &job(&runnables, 1, 1));
    let task = with(
        job(&json!([script("sleep 1000"), { "script": { "text": "echo no" }, "alwaysRun": true }]), 1, 1),
        "maxRunDuration",
        json!("0.5s"),
    );
    let ended = jobs.run("task", &task);
    assert_eq!(ended["tasks"][0]["status"]["exitCode"], 50_005);
    assert!(failure(&ended, 0).contains("longer than maxRunDuration") && jobs.lines("task", 0).is_empty());
    let ended = jobs.over("runnable");
    assert_eq!(ended["tasks"][0]["status"]["exitCode"], 50_005);
    assert!(failure(&ended, 0).contains("longer than its timeout"), "{ended:#}");
    assert_eq!(jobs.lines("runnable", 0), ["cleaning"]);
    assert!(jobs.processes("runnable", 0).is_empty());
}

#[test]
fn retries_follow_the_lifecycle_policy() {
    let jobs = Jobs::new();
    // Task 0 fails as the policy names, task 1 in another way, task 2 only at first.
    let text = "case $BATCH_TASK_INDEX in 0) exit 42;; 1) exit 1;; 2) [ $BATCH_TASK_RETRY_ATTEMPT = 1 ] || exit 5;; esac";
    let mut document = with(job(&json!([script(text)]), 3, 3), "maxRetryCount", json!(2));
    document = with(
        document,
        "lifecyclePolicies",
        json!([{ "action": "FAIL_TASK", "actionCondition": { "exitCodes": [42] } }]),
    );
    let ended = jobs.run("retried", &document);
    assert_eq!(task_states(&ended), ["FAILED", "FAILED", "SUCCEEDED"]);
    let attempts = |task: usize| ended["tasks"][task]["status"]["attempts"].as_u64().unwrap();
    assert_eq!([attempts(0), attempts(1), attempts(2)], [1, 3, 2]);
    let events = ended["tasks"][2]["status"]["statusEvents"].as_array().unwrap();
    let states: Vec<&str> = events.iter().map(|event| event["taskState"].as_str().unwrap()).collect();
    assert_eq!(states, ["ASSIGNED", "RUNNING", "PENDING", "ASSIGNED", "RUNNING", "SUCCEEDED"]);
    let states: Vec<String> = ended["status"]["statusEvents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["description"].as_str().unwrap().rsplit(" to ").next().unwrap().to_owned())
        .collect();
    assert_eq!(states, ["QUEUED", "SCHEDULED", "RUNNING", "FAILED: failed: task 0, 1"]);
}

#[test]
fn a_task_has_the_memory_and_processors_it_asked_for() {
    let jobs = Jobs::new();
    // What the shell keeps in a variable is memory of its own.
    let hungry = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let quota = "for file in /sys/fs/cgroup/cpu/$G/cpu.cfs_quota_us /sys/fs/cgroup/$G/cpu.max; do [ ! -e $file ] || cat $file; done";
    let own = "G=$(grep -E '(:|,)cpu[,:]|^0::/sluice' /proc/self/cgroup | grep sluice | head -1 | cut -d: -f3); G=${G%/*}; ";
    let runnables = json!([script(&format!("{own}{quota}")), script(hungry),]);
    let resource = json!({ "cpuMilli": "500", "memoryMib": "64" });
    let ended = jobs.run("bounded", &with(job(&runnables, 1, 1), "computeResource", resource));
    assert_eq!(state(&ended), "FAILED", "{ended:#}");
    assert!(failure(&ended, 0).contains("runnable 1 ended with exit code"), "{ended:#}");
    assert!(jobs.lines("bounded", 0)[0].starts_with("50000"), "{:?}", jobs.lines("bounded", 0));
    let document = jobs.document(&job(&runnables, 1, 1));
    jobs.node.ok(&[
        "batch", "submit", &document, "--job-id", "free", "--wait", "--memory", "1000", "--cpus", "1.5",
    ]);
    assert_eq!(jobs.lines("free", 0)[1], "100000000");
    assert!(jobs.lines("free", 0)[0].starts_with("150000"));
}

#[test]
fn containers_and_scripts_share_volumes() {
    let jobs = Jobs::new();
    let (disk, host) = (jobs.node.path("mnt/disk"), jobs.node.room("host"));
    std::fs::write(host.join("note"), "from the machine\n").unwrap();
    let image = jobs.node.image();
    let container = |text: &str, volumes: serde_json::Value| json!({ "container": { "imageUri": image, "entrypoint": "/bin/sh", "commands": ["-c", text], "enableImageStreaming": true, "volumes": volumes } });
    let runnables = json!([
        script(&format!("echo by a script > {}/file", disk.display())),
        container(&format!("cat {0}/file; echo by a container >> {0}/file", disk.display()), json!([])),
        container(
            "cat /mine/file /host/note; touch /host/x 2>/dev/null || echo read-only; env | grep BATCH_JOB_ID",
            json!([format!("{}:/mine", disk.display()), format!("{}:/host:ro", host.display())])
        ),
        script(&format!("wc -l < {}/file", disk.display())),
    ]);
    let volumes = json!([{ "deviceName": "scratch", "mountPath": disk }]);
    let ended = jobs.run("sharing", &with(job(&runnables, 1, 1), "volumes", volumes));
    assert_eq!(state(&ended), "SUCCEEDED", "{ended:#} {:?}", jobs.lines("sharing", 0));
    let wanted = [
        "by a script",
        "by a script",
        "by a container",
        "from the machine",
        "read-only",
        "BATCH_JOB_ID=sharing",
        "2",
    ];
    assert_eq!(jobs.lines("sharing", 0), wanted);
    assert_eq!(std::fs::read_dir(&disk).unwrap().count(), 0, "only tasks see the disk");
}

#[test]
fn output_goes_where_the_policy_says() {
    let jobs = Jobs::new();
    let path = jobs.node.path("logs");
    let mut document = job(&json!([script("echo out; echo err >&2")]), 2, 2);
    document["logsPolicy"] = json!({ "destination": "PATH", "logsPath": path });
    let ended = jobs.run("logging", &document);
    let uid = ended["uid"].as_str().unwrap();
    let written = std::fs::read_to_string(path.join(format!("output-{uid}-group0-1.log"))).unwrap();
    let mut lines: Vec<&str> = written.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "out"]);
    assert_eq!(jobs.node.ok(&["batch", "logs", "logging"]).lines().count(), 4);
    // Followed, a log ends with its job.
    let go = jobs.node.path("go");
    jobs.submit(
        "slow",
        &job(
            &json!([script(&format!(
                "echo begun; until [ -e {} ]; do sleep 0.05; done; echo done",
                go.display()
            ))]),
            1,
            1,
        ),
    );
    wait_until("it began", || jobs.node.ok(&["batch", "logs", "slow"]).contains("begun"));
    let following = jobs
        .node
        .command(&["batch", "logs", "slow", "--follow"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::fs::write(go, "").unwrap();
    let said = String::from_utf8(following.wait_with_output().unwrap().stdout).unwrap();
    assert!(
        said.lines().next().unwrap().ends_with("begun") && said.lines().nth(1).unwrap().ends_with("done"),
        "{said}"
    );
}
