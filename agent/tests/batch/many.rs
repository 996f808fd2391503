//! Many tasks: nothing adds up.

use std::time::Instant;

use serde_json::json;

use crate::jobs::{Jobs, job, script};

#[test]
fn a_thousand_tasks_leave_nothing_behind() {
    let jobs = Jobs::new();
    let begun = Instant::now();
    jobs.submit("thousand", &job(&json!([script(":")]), 1000, 4));
    let runner = std::path::Path::new("/proc").join(jobs.runner("thousand").to_string());
    let (mut descriptors, mut threads) = (0, 0);
    while runner.join("exe").exists() {
        let count = |name: &str| std::fs::read_dir(runner.join(name)).map_or(0, Iterator::count);
        (descriptors, threads) = (descriptors.max(count("fd")), threads.max(count("task")));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    eprintln!(
        "1000 tasks in {:.1} s, at most {descriptors} descriptors and {threads} threads",
        begun.elapsed().as_secs_f64()
    );
    let ended = jobs.over("thousand");
    assert_eq!(ended["status"]["taskGroups"]["group0"]["counts"], json!({ "SUCCEEDED": "1000" }));
    // Four tasks have a few each, whatever came before.
    assert!(descriptors < 100, "{descriptors} descriptors");
    assert!(threads < 100, "{threads} threads");
    let files = std::fs::read_dir(jobs.node.path("root/batch/thousand")).unwrap().count();
    assert!(files < 20, "{files} files");
}
