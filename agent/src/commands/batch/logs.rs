//! `sluice batch logs`: what runnables wrote.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use sluice_batch::Plan;

use crate::batch::{self, ClusterJobs, Entry, JobDir, LOG};

/// One file that is read from where it was left.
struct Tail {
    path: PathBuf,
    /// Lines are plain text, not entries.
    plain: bool,
    reader: Option<BufReader<File>>,
    /// A line of which the end was not written yet.
    begun: Vec<u8>,
}

/// Prints the job's output, oldest first; with `follow` until the job is over.
pub(super) async fn logs(dir: &JobDir, task: Option<usize>, json: bool, follow: bool) -> Result<()> {
    if let Some(cluster) = dir.meta()?.cluster {
        if json {
            bail!("logs of a cluster are plain text");
        }
        let jobs = ClusterJobs::connect(dir.id(), &cluster).await?;
        return jobs
            .logs(task, follow, |task, runnable, text| {
                say!("{task} [{runnable}] {text}");
                Ok(())
            })
            .await;
    }
    let mut tails = tails(dir, task, json)?;
    loop {
        // Looked at first: what comes before the end of the job is read after it.
        let over = !follow || batch::status(dir).await?.state.is_final();
        for tail in &mut tails {
            tail.print(task, json)?;
        }
        if over {
            return Ok(());
        }
        tokio::time::sleep(super::INTERVAL).await;
    }
}

fn tails(dir: &JobDir, task: Option<usize>, json: bool) -> Result<Vec<Tail>> {
    let job = dir.job()?;
    let plan = Plan::of(&job, batch::processors()).context("the job has no task specification")?;
    if task.is_some_and(|task| task >= plan.task_count) {
        bail!("the job has {} tasks, numbered from 0", plan.task_count);
    }
    let tail = |path: PathBuf, plain| Tail { path, plain, reader: None, begun: Vec::new() };
    let Some(path) = batch::logs_path(&job, &plan, dir) else {
        return Ok(vec![tail(dir.path(LOG), false)]);
    };
    if json {
        bail!("the job's logsPolicy writes plain text to {}", path.display());
    }
    let uid = dir.meta()?.uid;
    let tasks = task.map_or(0..plan.task_count, |task| task..task + 1);
    Ok(tasks.map(|task| tail(batch::task_file(&path, &uid, task), true)).collect())
}

impl Tail {
    fn print(&mut self, task: Option<usize>, json: bool) -> Result<()> {
        if self.reader.is_none() {
            match File::open(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                file => {
                    let file = file.with_context(|| format!("cannot open {}", self.path.display()))?;
                    self.reader = Some(BufReader::new(file));
                }
            }
        }
        let Some(reader) = &mut self.reader else { return Ok(()) };
        loop {
            let read = reader.read_until(b'\n', &mut self.begun);
            if read.with_context(|| format!("cannot read {}", self.path.display()))? == 0 {
                return Ok(());
            }
            if self.begun.last() == Some(&b'\n') {
                print_line(&self.begun, self.plain, task, json)?;
                self.begun.clear();
            }
        }
    }
}

fn print_line(line: &[u8], plain: bool, task: Option<usize>, json: bool) -> Result<()> {
    if plain {
        return raw(line);
    }
    let entry: Entry = serde_json::from_slice(line).context("the job's log is damaged")?;
    if task.is_some_and(|task| task != entry.labels.task_index) {
        return Ok(());
    }
    if json {
        return raw(line);
    }
    say!(
        "{} {} [{}] {}",
        entry.timestamp,
        entry.labels.task_index,
        entry.labels.runnable,
        entry.text_payload
    );
    Ok(())
}

fn raw(line: &[u8]) -> Result<()> {
    match io::stdout().lock().write_all(line) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(crate::commands::Unheard.into()),
        written => written.context("cannot write to standard output"),
    }
}
