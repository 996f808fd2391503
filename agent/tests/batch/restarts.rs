//! Jobs outlive the daemon, and their own process.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::jobs::{Jobs, failure, job, runs, script, state, task_states, with};
use crate::rig::wait_until;

#[test]
fn fifty_tasks_four_at_once_with_failures_a_kill_and_a_restart_in_the_middle() {
    let jobs = Jobs::new();
    let shared = jobs.node.room("shared");
    // Each task says that it runs, every tenth fails the first time, and the eighth waits to be killed.
    let text = "echo $BATCH_TASK_INDEX.$BATCH_TASK_RETRY_ATTEMPT; touch /shared/on-$BATCH_TASK_INDEX; ls /shared 2>/dev/null | grep -c on- >> /shared/at-once; \
        if [ $BATCH_TASK_INDEX.$BATCH_TASK_RETRY_ATTEMPT = 7.0 ]; then touch /shared/seven; sleep 1000; fi; \
        rm /shared/on-$BATCH_TASK_INDEX; \
        case $BATCH_TASK_INDEX.$BATCH_TASK_RETRY_ATTEMPT in *3.0) exit 9;; esac; [ \"$(cat /data/changed)\" = after ]";
    let runnables = json!([{ "container": {
        "imageUri": jobs.node.image(), "commands": ["sh", "-c", text], "enableImageStreaming": true,
        "volumes": [format!("{}:/shared", shared.display())],
    } }]);
    jobs.submit("fifty", &with(job(&runnables, 50, 4), "maxRetryCount", json!(1)));
    let count =
        |wanted: &str| task_states(&jobs.describe("fifty")).iter().filter(|state| **state == wanted).count();
    wait_until("some are done, and the eighth runs", || {
        shared.join("seven").exists() && count("SUCCEEDED") >= 5
    });
    jobs.node.kill_daemon();
    for pid in jobs.processes("fifty", 7) {
        // The container's others end with its first.
        let killed = kill(Pid::from_raw(pid), Signal::SIGKILL);
        assert!(matches!(killed, Ok(()) | Err(nix::errno::Errno::ESRCH)), "{killed:?}");
    }
    let ended = jobs.over("fifty");
    assert_eq!(task_states(&ended), ["SUCCEEDED"; 50], "{ended:#}");
    for task in 0..50 {
        let status = &ended["tasks"][task]["status"];
        let retried = task % 10 == 3 || task == 7;
        assert_eq!(status["attempts"], if retried { 2 } else { 1 }, "{task}: {status:#}");
        let lines = jobs.lines("fifty", task);
        assert_eq!(lines.last().unwrap(), &format!("{task}.{}", u8::from(retried)));
        assert!(
            status["images"][0]["readyMs"].is_u64() && status["images"][0]["served"] != "unpacked",
            "{status:#}"
        );
    }
    assert!(failure(&ended, 7).contains("exit code 137"), "{ended:#}");
    let at_once = std::fs::read_to_string(shared.join("at-once")).unwrap();
    let most = at_once.lines().map(|line| line.parse::<usize>().unwrap()).max().unwrap();
    assert!((2..=4).contains(&most), "{most} at once");
}

#[test]
fn a_job_goes_on_after_its_own_process_died() {
    let jobs = Jobs::new();
    let done = jobs.node.path("done");
    // The first task was done before, the second is interrupted, the third not begun.
    let text = format!(
        "echo $BATCH_TASK_INDEX.$BATCH_TASK_RETRY_ATTEMPT; case $BATCH_TASK_INDEX.$BATCH_TASK_RETRY_ATTEMPT in 1.0) touch {}; sleep 1000;; esac",
        done.display()
    );
    let document = with(job(&json!([script(&text)]), 3, 1), "maxRetryCount", json!(1));
    jobs.submit("again", &document);
    wait_until("the second task runs", || done.exists());
    let left = jobs.processes("again", 1);
    let runner = Pid::from_raw(jobs.runner("again"));
    kill(runner, Signal::SIGKILL).unwrap();
    wait_until("its process is gone", || {
        jobs.node.ok(&["batch", "describe", "again"]).contains("process that runs it died")
    });
    assert_eq!(state(&jobs.describe("again")), "RUNNING");
    // Any command that needs the daemon starts it.
    jobs.node.ok(&["gc"]);
    let ended = jobs.over("again");
    assert_eq!(task_states(&ended), ["SUCCEEDED"; 3], "{ended:#}");
    assert!(failure(&ended, 1).contains("exit code 50002: the process that ran it died"), "{ended:#}");
    assert_eq!(jobs.lines("again", 0), ["0.0"]);
    assert_eq!(jobs.lines("again", 1), ["1.0", "1.1"]);
    assert!(!left.iter().any(runs));
}

#[test]
fn a_job_without_a_process_can_be_cancelled() {
    let jobs = Jobs::new();
    jobs.submit("orphan", &job(&json!([script("exec sleep 1000")]), 2, 1));
    wait_until("it runs", || !jobs.processes("orphan", 0).is_empty());
    let left = jobs.processes("orphan", 0);
    kill(Pid::from_raw(jobs.runner("orphan")), Signal::SIGKILL).unwrap();
    assert_eq!(jobs.node.ok(&["batch", "cancel", "orphan"]), "CANCELLED\n");
    assert_eq!(task_states(&jobs.describe("orphan")), ["FAILED", "UNEXECUTED"]);
    assert!(!left.iter().any(runs));
}
