//! `sluice run`: a container from an image.

use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_container::{Bind, Bundle, BundleOptions, Network, SpecOptions, find_runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::progress::Progress;
use super::ready::{self, Output};
use super::run_report::Reporter;
use super::with_client;
use crate::api::{AcquireRequest, Acquired, Holder, ReleaseRequest, StartReport, StartRequest};
use crate::cli::{self, Global, ReadyArgs, RunArgs};
use crate::config::Config;

/// Signals that are meant for the container's process.
const FORWARDED: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// The exit code is the container's.
pub(crate) async fn run(
    config: &Arc<Config>,
    global: &Global,
    args: RunArgs,
    record: bool,
) -> Result<ExitCode> {
    if let Some(parent) = args.parent {
        end_with_parent(parent)?;
    }
    let reporter = Reporter::new(args.report.as_deref(), &args.image);
    let ran = run_reported(config, global, &args, record, &reporter).await;
    reporter.write(ran.as_ref().err())?;
    ran
}

/// This process is asked to end when `parent` ended, however that did.
fn end_with_parent(parent: i32) -> Result<()> {
    let parent = Pid::from_raw(parent);
    let pidfd = sluice_kernel::process::pidfd_open(parent).context("whoever started this is gone")?;
    if nix::unistd::getppid() != parent {
        anyhow::bail!("process {parent} did not start this, or is gone");
    }
    std::thread::spawn(move || {
        let ended = sluice_kernel::process::wait_for_end(&pidfd, None);
        if let Err(error) = ended.and_then(|_| kill(Pid::this(), Signal::SIGTERM)) {
            tracing::warn!(%error, "cannot end after the one that started this");
        }
    });
    Ok(())
}

async fn run_reported(
    config: &Arc<Config>,
    global: &Global,
    args: &RunArgs,
    record: bool,
    reporter: &Reporter,
) -> Result<ExitCode> {
    let runtime = find_runtime(args.runtime.as_deref())?;
    let spec = spec_options(args)?;
    let holder = Holder::Process(std::process::id());
    with_client(config, global, async |client| {
        let request = AcquireRequest {
            reference: args.image.clone(),
            stream: !args.no_stream,
            holder: holder.clone(),
            start: Some(StartRequest {
                entrypoint: args.entrypoint.clone(),
                command: args.command.clone(),
                window_ms: args.ready.ready_timeout.map(|time| time.as_millis() as u64),
            }),
        };
        reporter.before(client).await;
        let progress = Progress::new(&args.image);
        let acquired: Acquired = client
            .follow("acquire", &request, |event| {
                reporter.hear(event);
                progress.show(event);
            })
            .await?;
        drop(progress);
        reporter.acquired(&acquired);
        let ended = ReleaseRequest { holder: holder.clone() };
        let mut report: Option<StartReport> = None;
        let over = async {
            // Without a daemon nothing is recorded.
            report = client.ask("ready", &ended).await.unwrap_or_else(|error| {
                tracing::debug!(error = format!("{error:#}"), "the daemon is away");
                None
            });
        };
        let code = contain(config, args, &spec, runtime.clone(), &acquired, reporter, over).await;
        reporter.after(client).await;
        if record {
            if report.is_none() {
                report = client.ask("ready", &ended).await?;
            }
            say_recorded(report.as_ref());
        }
        // The image is released with this process anyway, by whatever daemon there is then.
        if let Err(error) = client.ask::<()>("release", &ReleaseRequest { holder: holder.clone() }).await {
            tracing::debug!(error = format!("{error:#}"), "the daemon is away");
        }
        code
    })
    .await
}

fn say_recorded(report: Option<&StartReport>) {
    match report {
        Some(report) => eprintln!(
            "sluice: recorded {} reads and {} records of `{}` (by {}, {} lost): {} ranges, {} bytes, {} ms blocked, of these {} ms for us{}; trace: {}",
            report.reads,
            report.probed,
            report.entry,
            report.level,
            report.lost,
            report.ranges,
            report.bytes,
            report.blocked_us / 1000,
            report.served_us / 1000,
            if report.learned { ", learned" } else { "; the profile stays as it was" },
            report.trace.display()
        ),
        None => eprintln!(
            "sluice: nothing was recorded: all of the image is local, it was in use, or its window was over"
        ),
    }
}

fn spec_options(args: &RunArgs) -> Result<SpecOptions> {
    Ok(SpecOptions {
        entrypoint: args.entrypoint.clone(),
        command: args.command.clone(),
        env: args.env.clone(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        binds: args.volumes.iter().map(|volume| Bind::parse(volume)).collect::<Result<_, _>>()?,
        network: match args.network {
            cli::Network::Host => Network::Host,
            cli::Network::None => Network::None,
        },
        // Output that is looked at goes through a pipe.
        terminal: args.ready.ready_log.is_none()
            && std::io::stdin().is_terminal()
            && std::io::stdout().is_terminal(),
        cgroup_parent: args.cgroup_parent.clone(),
    })
}

async fn contain(
    config: &Config,
    args: &RunArgs,
    spec: &SpecOptions,
    runtime: std::path::PathBuf,
    acquired: &Acquired,
    reporter: &Reporter,
    over: impl Future<Output = ()>,
) -> Result<ExitCode> {
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let options = BundleOptions {
        // The container's own files are on disk, beside the layer store: /run is memory on most nodes.
        dir: config.root.join("containers"),
        id: format!("sluice-{}-{nanoseconds:x}", std::process::id()),
        lower_dirs: acquired.lower_dirs.clone(),
        image_config: acquired.config.clone(),
        runtime,
    };
    let bundle = Bundle::create(options, spec)?;
    reporter.ready();
    let code = supervise(&bundle, &args.ready, over).await;
    bundle.remove(args.keep)?;
    if args.keep {
        eprintln!("sluice: what the container wrote is in {}", bundle.upper().display());
    }
    code
}

/// Runs the container and passes signals on to it; `over` is run when it is ready.
async fn supervise(bundle: &Bundle, args: &ReadyArgs, over: impl Future<Output = ()>) -> Result<ExitCode> {
    let (sender, mut signals) = mpsc::channel(16);
    for forwarded in FORWARDED {
        let mut stream =
            signal(SignalKind::from_raw(forwarded as i32)).context("cannot listen for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(forwarded).await.is_err() {
                    return;
                }
            }
        });
    }
    let mut command = tokio::process::Command::from(bundle.command());
    if args.ready_log.is_some() {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let mut child = command.spawn().context("cannot start the container runtime")?;
    let output = match &args.ready_log {
        Some(pattern) => Output::watch(&mut child, pattern)?,
        None => Output::default(),
    };
    let seen = output.seen();
    let started = async {
        ready::signalled(args, bundle, seen).await;
        over.await;
    };
    tokio::pin!(started);
    let mut is_over = false;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.context("cannot wait for the container")?;
                output.end().await?;
                let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(125);
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(125)));
            }
            () = &mut started, if !is_over => is_over = true,
            Some(received) = signals.recv() => {
                // The runtime passes it on to the container's first process.
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok())
                    && let Err(error) = kill(Pid::from_raw(pid), received)
                {
                    tracing::debug!(%error, %received, "the container is gone");
                }
            }
        }
    }
}
