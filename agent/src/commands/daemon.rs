//! `sluice daemon` and `sluice stop`.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::client::Client;
use crate::config::Config;
use crate::daemon;

/// Serves until told to stop by a signal or by `sluice stop`.
pub(crate) async fn serve(config: Arc<Config>, announce: bool) -> Result<()> {
    let running = daemon::start(config).await?;
    if announce {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "ready")
            .and_then(|()| stdout.flush())
            .context("nobody listens to the announcement")?;
    }
    tokio::select! {
        interrupted = super::interrupted() => interrupted?,
        () = running.asked_to_stop() => {}
    }
    tracing::info!("stopping");
    running.stop().await
}

/// Asks the daemon to stop and waits until its socket is closed.
pub(crate) async fn stop(config: &Config) -> Result<()> {
    let Some(client) = Client::connect_running(config).await? else {
        println!("no daemon runs on {}", config.socket().display());
        return Ok(());
    };
    client.ask("stop", &()).await
}
