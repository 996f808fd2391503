//! `sluice batch`: jobs as Google Batch's documents describe them, here or on a cluster.

mod logs;
mod show;

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sluice_batch::{Job, JobState, MAX_DOCUMENT_BYTES, Plan, parse};

use crate::batch::{self, Cluster, ClusterJobs, JobDir, Meta, Wish};
use crate::cli::{BatchAction, Global, SubmitArgs, Target};
use crate::config::Config;

/// How often a job is looked at that somebody waits for: its process tells nobody.
const INTERVAL: Duration = Duration::from_millis(100);
/// The same of a job on a cluster, whose server has others to answer.
const CLUSTER_INTERVAL: Duration = Duration::from_secs(1);

/// One of the commands; its exit code.
pub(crate) async fn batch(config: &Arc<Config>, global: &Global, action: BatchAction) -> Result<ExitCode> {
    match action {
        BatchAction::Validate { file, relaxed } => {
            let job = parse(&read_document(&file)?)?;
            let plan = check(&job, relaxed)?;
            say!("valid: {} tasks, {} at once", plan.task_count, plan.parallelism);
        }
        BatchAction::Submit(args) => return submit(config, global, args).await,
        BatchAction::List { json } => show::list(config, json).await?,
        BatchAction::Describe { job, json } => show::describe(&JobDir::open(config, &job)?, json).await?,
        BatchAction::Logs { job, task, json, follow } => {
            logs::logs(&JobDir::open(config, &job)?, task, json, follow).await?;
        }
        BatchAction::Cancel { job } => cancel(&JobDir::open(config, &job)?).await?,
        BatchAction::Delete { job } => delete(&JobDir::open(config, &job)?).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a job in this process, until it is over or this process is told to leave it to another.
pub(crate) async fn run(config: Arc<Config>, job: &str) -> Result<()> {
    let stopped = super::interrupted()?;
    let dir = JobDir::open(&config, job)?;
    let announce = || {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "ready").and_then(|()| stdout.flush()).context("nobody listens to the announcement")
    };
    batch::run(config, dir, stopped, announce).await
}

fn read_document(file: &Path) -> Result<Vec<u8>> {
    let mut document = Vec::new();
    // One byte more than is allowed is enough to refuse it.
    let most = MAX_DOCUMENT_BYTES as u64 + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(most).read_to_end(&mut document)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(most).read_to_end(&mut document))
    };
    read.with_context(|| format!("cannot read {}", file.display()))?;
    Ok(document)
}

/// Checks the rules and says what is not applied.
fn check(job: &Job, relaxed: bool) -> Result<Plan> {
    for note in job.check(relaxed)?.notes {
        eprintln!("sluice: {note}");
    }
    Plan::of(job, batch::processors()).context("the job has no task specification")
}

async fn submit(config: &Arc<Config>, global: &Global, args: SubmitArgs) -> Result<ExitCode> {
    let mut document = read_document(&args.file)?;
    let mut job = parse(&document)?;
    if args.cpus.is_some() || args.memory.is_some() {
        document = with_limits(&document, &args)?;
        job = parse(&document)?;
    }
    let plan = check(&job, args.relaxed)?;
    let uuid = uuid()?;
    let id = args.job_id.clone().unwrap_or_else(|| format!("job-{uuid}"));
    let mut meta = Meta {
        uid: format!("{id}-{uuid}"),
        created: batch::now(),
        relaxed: args.relaxed,
        options: options(config, global),
        cluster: None,
    };
    let dir = match args.target {
        Target::Kubernetes => {
            let objects = sluice_batch::to_kubernetes(&job, &id)?;
            if args.dry_run {
                say!("{}", serde_json::to_string_pretty(&objects)?);
                return Ok(ExitCode::SUCCESS);
            }
            let mut cluster = Cluster {
                kubeconfig: args.kubeconfig.as_deref().map(std::path::absolute).transpose()?,
                context: args.context.clone(),
                namespace: args.namespace.clone(),
            };
            let jobs = ClusterJobs::connect(&id, &cluster).await?;
            cluster.namespace = Some(jobs.namespace.clone());
            meta.cluster = Some(cluster);
            let dir = JobDir::create(config, &id, &document, &meta)?;
            undo_unless(jobs.create(&objects).await, &dir)?;
            dir
        }
        Target::Local => {
            refuse_cluster_options(&args)?;
            let dir = JobDir::create(config, &id, &document, &meta)?;
            let started = batch::queue(&dir, plan.task_count).and_then(|()| batch::start_runner(&dir));
            undo_unless(started.map(drop), &dir)?;
            dir
        }
    };
    say!("{id}");
    if args.wait { wait(&dir).await } else { Ok(ExitCode::SUCCESS) }
}

/// Forgets a job that nobody runs.
fn undo_unless(begun: Result<()>, dir: &JobDir) -> Result<()> {
    if begun.is_err() {
        dir.remove()?;
    }
    begun
}

fn refuse_cluster_options(args: &SubmitArgs) -> Result<()> {
    for (option, given) in [
        ("--dry-run", args.dry_run),
        ("--namespace", args.namespace.is_some()),
        ("--kubeconfig", args.kubeconfig.is_some()),
        ("--context", args.context.is_some()),
    ] {
        if given {
            bail!("{option} is for --target kubernetes; `sluice batch validate` checks a job");
        }
    }
    Ok(())
}

/// What the command line says about resources comes over the document.
fn with_limits(document: &[u8], args: &SubmitArgs) -> Result<Vec<u8>> {
    let mut document: Value = serde_json::from_slice(document)?;
    let spec = document.pointer_mut("/taskGroups/0/taskSpec").and_then(Value::as_object_mut);
    let resource = spec.context("the job has no task specification")?.entry("computeResource");
    let resource = resource.or_insert_with(|| json!({})).as_object_mut();
    let resource = resource.context("taskGroups[0].taskSpec.computeResource is null")?;
    if let Some(cpus) = args.cpus {
        resource.insert("cpuMilli".to_owned(), json!((cpus * 1000.0).round() as i64));
    }
    if let Some(memory) = args.memory {
        resource.insert("memoryMib".to_owned(), json!(memory));
    }
    Ok(serde_json::to_vec_pretty(&document)?)
}

/// What of the command line the job's process needs too.
fn options(config: &Config, global: &Global) -> Vec<String> {
    let mut options = Vec::new();
    for (name, path) in [("--root", &config.root), ("--state", &config.state)] {
        options.extend([name.to_owned(), path.display().to_string()]);
    }
    if let Some(path) = &global.config {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        options.extend(["--config".to_owned(), path.display().to_string()]);
    }
    options.extend(global.plain_http.iter().map(|host| format!("--plain-http={host}")));
    options.extend((0..global.verbose).map(|_| "--verbose".to_owned()));
    options
}

fn uuid() -> Result<String> {
    const SOURCE: &str = "/proc/sys/kernel/random/uuid";
    let uuid = std::fs::read_to_string(SOURCE).with_context(|| format!("cannot read {SOURCE}"))?;
    // Eight hexadecimal digits: identifiers have at most 63 characters, and these are easily typed.
    Ok(uuid.chars().take(8).collect())
}

/// Waits until nothing follows any more.
async fn wait(dir: &JobDir) -> Result<ExitCode> {
    loop {
        let state = batch::status(dir).await?.state;
        if state.is_final() {
            say!("{}", state.name());
            return Ok(ExitCode::from(u8::from(state != JobState::Succeeded)));
        }
        if state == JobState::DeletionInProgress {
            bail!("the job was deleted");
        }
        tokio::time::sleep(interval(dir)?).await;
    }
}

fn interval(dir: &JobDir) -> Result<Duration> {
    Ok(if dir.meta()?.cluster.is_some() { CLUSTER_INTERVAL } else { INTERVAL })
}

/// Writes the wish down and sees to it that somebody fulfils it.
async fn ask(dir: &JobDir, wish: Wish) -> Result<()> {
    dir.wish_for(wish)?;
    if !dir.signal_runner()? && !batch::status(dir).await?.state.is_final() {
        batch::start_runner(dir)?;
    }
    Ok(())
}

async fn cancel(dir: &JobDir) -> Result<()> {
    let state = batch::status(dir).await?.state;
    if state.is_final() {
        bail!("job `{}` is over: {}", dir.id(), state.name());
    }
    match dir.meta()?.cluster {
        Some(cluster) => {
            dir.wish_for(Wish::Cancel)?;
            ClusterJobs::connect(dir.id(), &cluster).await?.suspend().await?;
        }
        None => ask(dir, Wish::Cancel).await?,
    }
    wait(dir).await.map(drop)
}

async fn delete(dir: &JobDir) -> Result<()> {
    if let Some(cluster) = dir.meta()?.cluster {
        ClusterJobs::connect(dir.id(), &cluster).await?.delete().await?;
        return dir.remove();
    }
    ask(dir, Wish::Delete).await?;
    while dir.runner()?.is_some() {
        tokio::time::sleep(INTERVAL).await;
    }
    dir.remove()
}
