//! The commands, each a thin translation between the terminal and the crates.
#![allow(clippy::print_stderr, reason = "commands speak to a terminal")]

/// Writes a line to standard output; returns early when nobody listens any more.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::commands::write_line(format_args!($($text)*))?
    };
}

mod batch;
mod check;
mod ctr_pull;
mod daemon;
mod doctor;
mod events;
mod images;
mod index;
mod mount;
mod node;
mod profile;
mod progress;
mod ready;
mod registry;
mod regress;
mod run;
mod run_report;
mod shell;
mod status;
mod trace;
mod upgrade;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use index::index_blob;
pub(crate) use status::size;

use crate::cli::{Cli, Command, IndexAction, KeyAction, TraceAction};
use crate::client::Client;
use crate::config::Config;

/// Standard output was closed: `sluice status | head` is no failure to speak of.
#[derive(Debug)]
pub(crate) struct Unheard;

impl std::fmt::Display for Unheard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for Unheard {}

fn write_line(text: std::fmt::Arguments<'_>) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Unheard.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// Runs one command; its exit code is the process's.
pub(crate) async fn execute(cli: Cli, config: Arc<Config>) -> Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Run(args) => return run::run(&config, &global, args, false).await,
        Command::Trace { action: TraceAction::Record(args) } => {
            return run::run(&config, &global, args, true).await;
        }
        Command::Trace { action } => trace::trace(&config, action).await?,
        Command::Regress(args) => return regress::regress(args),
        Command::Profile { action } => profile::profile(&config, &global, action).await?,
        Command::Mount { image, dir, no_stream } => {
            mount::mount(&config, &global, image, dir, !no_stream).await?;
        }
        Command::Umount { dir } => mount::umount(&config, &dir).await?,
        Command::Index { action: Some(IndexAction::Show { image, store }), .. } => {
            index::show(&config, &image, store).await?;
        }
        Command::Index { action: None, args } => index::build(&config, args).await?,
        Command::Check { image, store } => return check::check(&config, &image, store).await,
        Command::Pull { image } => images::pull(&config, &global, image).await?,
        Command::Status { image, watch, json } => status::status(&config, image, watch, json).await?,
        Command::Rm { image } => images::remove(&config, &global, image).await?,
        Command::Doctor { json } => return doctor::doctor(config, json).await,
        Command::Gc => images::gc(&config, &global).await?,
        Command::Fsck => return images::fsck(&config, &global).await,
        Command::CtrPull(args) => ctr_pull::pull(&config, args).await?,
        Command::Events { follow, json } => events::events(&config, follow, json).await?,
        Command::Kubernetes { node } => crate::kubernetes::report(&config, &node, interrupted()?).await?,
        Command::Node { action } => node::node(&config, &global, action).await?,
        Command::Key { action: KeyAction::Generate { name } } => {
            crate::node::generate_key(&name)?;
            say!("{}\n{}", name.with_extension("key").display(), name.with_extension("pub").display());
        }
        Command::Batch { action } => return batch::batch(&config, &global, action).await,
        Command::BatchRunner { job } => batch::run(config, &job).await?,
        Command::KeepDaemon => return crate::keeper::keep(&config),
        Command::Daemon { announce } => daemon::serve(config, announce).await?,
        Command::Stop => daemon::stop(&config).await?,
        Command::Upgrade { program } => upgrade::upgrade(&config, program).await?,
        Command::CanFollow { protocol } => upgrade::can_follow(protocol)?,
        Command::BlockServer => daemon::serve_blocks(&config)?,
        Command::WriteMetadata => crate::node::merge_for_agent()?,
        Command::Registry(args) => registry::serve(args).await?,
        Command::Man { dir } => shell::man(&dir)?,
        Command::Completions { shell } => shell::completions(shell),
    }
    Ok(ExitCode::SUCCESS)
}

/// Connects, does one thing, and ends an in-process daemon in good order whatever came out.
async fn with_client<T>(
    config: &Arc<Config>,
    global: &crate::cli::Global,
    work: impl AsyncFnOnce(&Client) -> Result<T>,
) -> Result<T> {
    let client = Client::connect(config, global).await?;
    let result = work(&client).await;
    let closed = client.close().await;
    let value = result?;
    closed?;
    Ok(value)
}

/// Resolves at SIGTERM or SIGINT, which are caught from this call on.
fn interrupted() -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
