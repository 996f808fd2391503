//! One script or container of a task: started, watched, ended.
//!
//! A container is `sluice run` in a process of its own, so that it is had, held and released as any other; a script is a process
//! of the machine. Both are in a control group below the task's.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_batch::{
    Container, ImageReport, RunKind, Step, TIMED_OUT, UNKNOWN_FAILURE, Variables, docker_options,
};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::runner::Context as JobContext;
use super::task::Ending;
use crate::api::{RunReport, Served};

/// Between the request to end and the end by force.
const GRACE: Duration = Duration::from_secs(5);
/// Joins the groups whose entrances come before `--`.
const JOIN: &str = r#"while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@""#;
/// Binds what comes in pairs before `--`; run in a mount namespace of its own.
const BIND: &str =
    r#"while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 125; shift 2; done; shift; exec "$@""#;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StepEnd {
    /// By itself.
    Exited(i32, Option<String>),
    /// It took longer than it may.
    TimedOut,
    /// It was ended, since the task is over.
    Ended,
}

impl StepEnd {
    /// What a step that failed says of it; none: it did well, or nobody asks.
    pub(super) fn failure(&self, step: &Step) -> Option<(i32, String)> {
        match self {
            Self::Exited(code, reason) if *code != 0 && !step.ignore_exit_status => {
                let because = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
                Some((*code, format!("runnable {} ended with exit code {code}{because}", step.name)))
            }
            Self::TimedOut => {
                Some((TIMED_OUT, format!("runnable {} ran longer than its timeout", step.name)))
            }
            _ => None,
        }
    }
}

/// What is started.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) job: Arc<JobContext>,
    pub(super) task: usize,
    pub(super) attempt: u32,
    /// Number of the runnable.
    pub(super) number: usize,
    pub(super) ending: watch::Receiver<Ending>,
}

/// Copies of a step's output, which go on while something it left behind runs.
pub(super) type Copies = Vec<JoinHandle<Result<()>>>;

impl Start {
    fn group(&self) -> PathBuf {
        self.job.task_group(self.task).join(self.number.to_string())
    }

    fn report(&self) -> PathBuf {
        self.job.dir.path(&format!("report-{}-{}", self.task, self.number))
    }

    /// Starts it; its end is to be awaited.
    pub(super) fn begin(self, step: &Step) -> Result<(JoinHandle<Result<StepEnd>>, Copies)> {
        let variables = self.job.plan.variables(step, self.task, self.attempt, &self.job.around);
        let mut command = match &step.kind {
            RunKind::Container(container) => self.container(container, &variables)?,
            RunKind::Text(text) => {
                self.script(&self.job.script_file(self.number), text.as_bytes(), &variables)?
            }
            RunKind::File(path) => {
                let head = std::fs::read(path).with_context(|| format!("cannot read the script {path}"))?;
                self.script(Path::new(path), &head, &variables)?
            }
            RunKind::Barrier => anyhow::bail!("a barrier is not started"),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("cannot start the runnable")?;
        let mut copies = Vec::new();
        let output = || self.job.output.of(self.task, self.attempt, &step.name);
        if let Some(from) = child.stdout.take() {
            let output = output()?;
            copies.push(tokio::spawn(async move { output.copy(from, "INFO").await }));
        }
        if let Some(from) = child.stderr.take() {
            let output = output()?;
            copies.push(tokio::spawn(async move { output.copy(from, "ERROR").await }));
        }
        let (timeout, container) = (step.timeout, matches!(step.kind, RunKind::Container(_)));
        Ok((tokio::spawn(self.watch(child, timeout, container)), copies))
    }

    async fn watch(self, mut child: Child, timeout: Option<Duration>, container: bool) -> Result<StepEnd> {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        let mut ending = self.ending.clone();
        let too_long = async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        let forced = tokio::select! {
            biased;
            status = child.wait() => {
                let status = status.context("cannot wait for the runnable")?;
                return self.ended(pid, status, container);
            }
            () = too_long => StepEnd::TimedOut,
            _ = ending.wait_for(|ending| *ending != Ending::No) => StepEnd::Ended,
        };
        // `sluice run` passes it on to the container; of a script the whole process group hears it.
        let asked =
            pid.map(|pid| kill(if container { pid } else { Pid::from_raw(-pid.as_raw()) }, Signal::SIGTERM));
        if let Some(Err(errno)) = asked.filter(|asked| !matches!(asked, Ok(()) | Err(Errno::ESRCH))) {
            return Err(errno).context("cannot end the runnable");
        }
        let status = match tokio::time::timeout(GRACE, child.wait()).await {
            Ok(status) => status,
            Err(_elapsed) => {
                let (groups, group) = (self.job.groups.clone(), self.group());
                tokio::task::spawn_blocking(move || groups.kill(&group)).await??;
                child.wait().await
            }
        };
        let status = status.context("cannot wait for the runnable")?;
        self.ended(pid, status, container)?;
        Ok(forced)
    }

    /// Writes down how the image came, and takes away what a killed `sluice run` left.
    fn ended(&self, pid: Option<Pid>, status: ExitStatus, container: bool) -> Result<StepEnd> {
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        let mut reason = None;
        if container {
            if let (Some(pid), Some(_)) = (pid, status.signal()) {
                self.job.sweep(pid)?;
            }
            let report = self.read_report()?;
            reason = report.error;
            if let Some(served) = report.served {
                let report = ImageReport {
                    runnable: self.number,
                    served: match served {
                        Served::Streamed => "streamed",
                        Served::Local => "local",
                        Served::Unpacked => "unpacked",
                    }
                    .to_owned(),
                    fell_back: report.fell_back,
                    ready_ms: report.ready_ms,
                    bytes: report.bytes,
                    bytes_total: report.bytes_total,
                };
                self.job.journal.append([sluice_batch::Change::Image { task: self.task, report }])?;
            }
        }
        Ok(StepEnd::Exited(code.unwrap_or(UNKNOWN_FAILURE), reason))
    }

    /// What `sluice run` said; nothing if it was killed.
    fn read_report(&self) -> Result<RunReport> {
        let path = self.report();
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(RunReport::default()),
            bytes => bytes.with_context(|| format!("cannot read {}", path.display()))?,
        };
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }

    fn script(&self, file: &Path, head: &[u8], variables: &Variables) -> Result<Command> {
        let mut words = interpreter(head);
        words.push(file.display().to_string());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", JOIN, "sluice"]).args(self.job.groups.entrances(&self.group())?).arg("--");
        let devices = self.job.device_dirs()?;
        if !devices.is_empty() {
            command.args(["unshare", "--mount", "--propagation", "slave", "/bin/sh", "-c", BIND, "sluice"]);
            for (from, to) in devices {
                command.arg(from).arg(to);
            }
            command.arg("--");
        }
        command.args(words).current_dir("/").env_clear();
        command.env("PATH", PATH).env("HOME", "/root").envs(variables);
        Ok(command)
    }

    fn container(&self, container: &Container, variables: &Variables) -> Result<Command> {
        let mut command = self.job.sluice();
        command.arg("run").arg("--report").arg(self.report());
        command.arg("--cgroup-parent").arg(Path::new("/").join(self.group()));
        command.arg("--parent").arg(std::process::id().to_string());
        if !container.enable_image_streaming {
            command.arg("--no-stream");
        }
        for bind in self.job.plan.binds(container, &self.job.volumes_dir()) {
            command.arg("-v").arg(bind);
        }
        if let Some(file) = &self.job.around.hosts_file {
            command.arg("-v").arg(format!("{file}:{file}:ro"));
        }
        let options =
            docker_options(container.options.as_deref().unwrap_or("")).map_err(anyhow::Error::msg)?;
        // What is given to the runnable itself comes over what is given to docker.
        for variable in options.env {
            command.arg("-e").arg(variable);
        }
        for (key, value) in variables {
            command.arg("-e").arg(format!("{key}={value}"));
        }
        if container.block_external_network || options.network.as_deref() == Some("none") {
            command.args(["--network", "none"]);
        }
        for (option, value) in [("--user", options.user), ("--workdir", options.workdir)] {
            if let Some(value) = value {
                command.arg(option).arg(value);
            }
        }
        if let Some(entrypoint) = container.entrypoint.as_deref().filter(|entrypoint| !entrypoint.is_empty())
        {
            command.arg("--entrypoint").arg(entrypoint);
        }
        command.arg(&container.image_uri).args(&container.commands);
        Ok(command)
    }
}

/// What runs a script: what its first line says after `#!`, with one argument at most, as the kernel reads it; else a shell.
fn interpreter(script: &[u8]) -> Vec<String> {
    let line = script.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let said = line.strip_prefix("#!").map(str::trim).filter(|said| !said.is_empty());
    match said.map(|said| said.split_once([' ', '\t']).unwrap_or((said, ""))) {
        Some((program, "")) => vec![program.to_owned()],
        Some((program, argument)) => vec![program.to_owned(), argument.trim().to_owned()],
        None => vec!["/bin/sh".to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters() {
        for (script, wanted) in [
            ("echo hi\n", &["/bin/sh"][..]),
            ("#!/bin/bash\necho", &["/bin/bash"]),
            ("#! /usr/bin/env  python3 -u\n", &["/usr/bin/env", "python3 -u"]),
            ("#!\n", &["/bin/sh"]),
            ("", &["/bin/sh"]),
        ] {
            assert_eq!(interpreter(script.as_bytes()), wanted, "{script}");
        }
    }
}
