//! What is known of jobs, for people or in the reference's form.

use anyhow::{Context, Result};
use chrono::DateTime;
use serde_json::{Value, json};
use sluice_batch::{JobStatus, TaskStatus};

use crate::batch::{self, JobDir};
use crate::commands::size;
use crate::config::Config;

pub(super) async fn list(config: &Config, json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for dir in JobDir::list(config)? {
        let meta = dir.meta()?;
        match batch::status(&dir).await {
            Ok(status) => rows.push((dir.id().to_owned(), status, meta)),
            // A cluster that does not answer hides no other job.
            Err(error) if meta.cluster.is_some() => eprintln!("sluice: job {}: {error:#}", dir.id()),
            Err(error) => return Err(error),
        }
    }
    if json {
        let jobs = rows.iter().map(|(id, status, meta)| {
            json!({ "name": name(id), "uid": meta.uid, "createTime": meta.created, "status": { "state": status.state } })
        });
        say!("{}", json!({ "jobs": jobs.collect::<Vec<_>>() }));
        return Ok(());
    }
    say!("{:<32} {:<24} {:<28} TASKS", "JOB", "STATE", "CREATED");
    for (id, status, meta) in rows {
        say!("{:<32} {:<24} {:<28} {}", id, status.state.name(), meta.created, counts(&status));
    }
    Ok(())
}

fn name(id: &str) -> String {
    format!("projects/local/locations/local/jobs/{id}")
}

/// `3 RUNNING, 2 SUCCEEDED`.
fn counts(status: &JobStatus) -> String {
    let counts: Vec<String> =
        status.counts().into_iter().map(|(state, count)| format!("{count} {state}")).collect();
    counts.join(", ")
}

pub(super) async fn describe(dir: &JobDir, json: bool) -> Result<()> {
    let status = batch::status(dir).await?;
    if json {
        say!("{}", resource(dir, &status)?);
        return Ok(());
    }
    say!("job {} ({}): {}", dir.id(), dir.meta()?.uid, status.state.name());
    if !status.state.is_final() && dir.meta()?.cluster.is_none() && dir.runner()?.is_none() {
        say!("  the process that runs it died; it goes on when the daemon is started the next time");
    }
    for event in &status.status_events {
        say!("  {}  {}", event.event_time, event.description);
    }
    if let Some(duration) = run_duration(&status) {
        say!("  ran for {duration:.3} s");
    }
    say!("{} tasks: {}", status.tasks.len(), counts(&status));
    say!(
        "{:>6}  {:<10} {:>8} {:>6} {:>10} {:>22}  IMAGE",
        "TASK",
        "STATE",
        "ATTEMPTS",
        "EXIT",
        "READY",
        "BYTES"
    );
    for (index, task) in status.tasks.iter().enumerate() {
        for line in rows(index, task) {
            say!("{line}");
        }
    }
    Ok(())
}

/// A line for each container of the task, or one.
fn rows(index: usize, task: &TaskStatus) -> Vec<String> {
    let exit = task.exit_code.map_or_else(|| "-".to_owned(), |code| code.to_string());
    let head = format!("{index:>6}  {:<10} {:>8} {exit:>6}", task.state.name(), task.attempts);
    let mut rows: Vec<String> = task
        .images
        .iter()
        .map(|image| {
            let ready = format!("{:.3} s", image.ready_ms as f64 / 1000.0);
            // A cluster does not tell.
            let bytes = match image.bytes_total {
                0 => "-".to_owned(),
                total => format!("{} / {}", size(image.bytes), size(total)),
            };
            let why = image.fell_back.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            format!("{head} {ready:>10} {bytes:>22}  {}{why}", image.served)
        })
        .collect();
    if rows.is_empty() {
        rows.push(head);
    }
    let failure = task
        .status_events
        .iter()
        .rev()
        .find(|event| event.task_execution.is_some_and(|execution| execution.exit_code != 0));
    rows.extend(failure.map(|event| format!("        {}", event.description)));
    rows
}

/// Seconds in the state RUNNING, of a job that is over.
fn run_duration(status: &JobStatus) -> Option<f64> {
    let (begin, end) = (status.ran.0.as_ref()?, status.ran.1.as_ref()?);
    let time = |text: &str| DateTime::parse_from_rfc3339(text).ok();
    let between = time(end)?.signed_duration_since(time(begin)?);
    Some(between.num_microseconds()? as f64 / 1e6)
}

/// The job as the reference writes it, with what it has in resources of their own beside it: `tasks`.
fn resource(dir: &JobDir, status: &JobStatus) -> Result<Value> {
    let mut job: Value =
        serde_json::from_slice(&dir.read("job.json")?).context("the job's document is damaged")?;
    for container in job
        .pointer_mut("/taskGroups/0/taskSpec/runnables")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(password) = container.pointer_mut("/container/password") {
            *password = json!("(not shown)");
        }
    }
    let meta = dir.meta()?;
    let counts: serde_json::Map<String, Value> = status
        .counts()
        .into_iter()
        .map(|(state, count)| (state.to_owned(), json!(count.to_string())))
        .collect();
    let mut of_job = json!({
        "state": status.state, "statusEvents": status.status_events,
        "taskGroups": { "group0": { "counts": counts } },
    });
    let group = format!("{}/taskGroups/group0", name(dir.id()));
    let tasks: Vec<Value> = status
        .tasks
        .iter()
        .enumerate()
        .map(|(index, task)| json!({ "name": format!("{group}/tasks/{index}"), "status": task }))
        .collect();
    if let (Some(status_fields), Some(duration)) = (of_job.as_object_mut(), run_duration(status)) {
        status_fields.insert("runDuration".to_owned(), json!(format!("{duration:.6}s")));
    }
    let updated = status.status_events.last().map_or(&meta.created, |event| &event.event_time);
    let added = [
        ("name", json!(name(dir.id()))),
        ("uid", json!(meta.uid)),
        ("createTime", json!(meta.created)),
        ("updateTime", json!(updated)),
        ("status", of_job),
        ("tasks", json!(tasks)),
    ];
    let fields = job.as_object_mut().context("the job's document is damaged")?;
    fields.extend(added.map(|(key, value)| (key.to_owned(), value)));
    Ok(job)
}
