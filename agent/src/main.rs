//! The `sluice` binary: command line, daemon, and the wiring of the crates.

mod api;
mod batch;
mod cli;
mod client;
mod commands;
mod config;
mod credentials;
mod daemon;
mod doctor;
mod journal;
mod keeper;
mod kubernetes;
mod logging;
mod metrics;
mod node;
mod pattern;
mod program;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;

use crate::cli::{Cli, Command};
use crate::config::Config;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What is wrong with it is said below, as all that goes wrong.
    let config = Config::resolve(&cli.global);
    let format = config.as_ref().map_or(cli.global.log_format, |config| Some(config.log_format));
    logging::start(&cli, format.unwrap_or_default());
    if matches!(cli.command, Command::Daemon { .. }) {
        sluice_kernel::process::return_freed_memory();
    }
    if let Err(error) = confine(&cli.command) {
        anstream_error(&error);
        return ExitCode::from(125);
    }
    match config.and_then(|config| run(cli, config)) {
        Ok(code) => code,
        // As a shell reports SIGPIPE.
        Err(error) if error.is::<commands::Unheard>() => ExitCode::from(141),
        Err(error) => {
            tracing::debug!(?error, "command failed");
            anstream_error(&error);
            ExitCode::from(125)
        }
    }
}

/// What runs for long gives up what it does not need, before it has threads. The other commands do what their caller may.
fn confine(command: &Command) -> anyhow::Result<()> {
    let kept: &[u8] = match command {
        Command::Daemon { .. } | Command::KeepDaemon => &sluice_kernel::confine::NODE,
        Command::BlockServer => &sluice_kernel::confine::SERVER,
        _ => return Ok(()),
    };
    sluice_kernel::confine::keep_capabilities(kept).context("cannot give capabilities up")?;
    sluice_kernel::confine::deny_system_calls().context("cannot deny system calls")
}

/// One line per failure, causes included, on standard error.
#[allow(clippy::print_stderr, reason = "the command's own last word")]
fn anstream_error(error: &anyhow::Error) {
    eprintln!("sluice: {error:#}");
}

fn run(cli: Cli, config: Config) -> anyhow::Result<ExitCode> {
    sluice_registry::install_crypto();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(commands::execute(cli, Arc::new(config)));
    // A read that still waits for a registry must not keep the command from ending.
    runtime.shutdown_background();
    code
}
