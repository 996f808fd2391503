//! `sluice daemon`, `sluice stop`, `sluice node drain`, and the server of block files.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::api::StopRequest;
use crate::cli::Global;
use crate::client::Client;
use crate::config::Config;
use crate::daemon::{self, Stop};

/// Serves until told to stop by a signal or by `sluice stop`.
pub(crate) async fn serve(config: Arc<Config>, announce: bool) -> Result<()> {
    // Before anybody is told that we run, and may want to end us.
    let interrupted = super::interrupted()?;
    let running = daemon::start(config).await?;
    notify_systemd()?;
    if announce {
        say_ready()?;
    }
    let how = tokio::select! {
        () = interrupted => Stop::Leave,
        how = running.asked_to_stop() => how,
    };
    tracing::info!(?how, "stopping");
    running.stop(how == Stop::Drain).await
}

/// Serves block files until their file system is unmounted.
pub(crate) fn serve_blocks(config: &Config) -> Result<()> {
    let socket = crate::node::block_socket(config);
    Ok(sluice_blockfs::serve(&config.state.join("blocks"), &socket, config.blocks, || {
        say_ready().map_err(std::io::Error::other)
    })?)
}

fn say_ready() -> Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "ready").and_then(|()| stdout.flush()).context("nobody listens to the announcement")
}

/// Tells systemd that the sockets are open, if it waits for that (sd_notify(3), `Type=notify`).
fn notify_systemd() -> Result<()> {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&socket),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    sent.map(|_| ()).with_context(|| format!("cannot tell systemd at {}", socket.display()))
}

/// Asks the daemon to stop. Images in use are left to the next one.
pub(crate) async fn stop(config: &Config) -> Result<()> {
    match Client::connect_running(config).await? {
        Some(client) => client.ask("stop", &StopRequest { drain: false }).await,
        None => nothing_runs(config),
    }
}

/// Has everything unmounted, also what a daemon left that was killed.
pub(crate) async fn drain(config: &Arc<Config>, global: &Global) -> Result<()> {
    if Client::connect_running(config).await?.is_none() && !crate::node::block_socket(config).exists() {
        return nothing_runs(config);
    }
    let request = StopRequest { drain: true };
    super::with_client(config, global, async |client| client.ask("stop", &request).await).await
}

fn nothing_runs(config: &Config) -> Result<()> {
    say!("no daemon runs on {}", config.socket().display());
    Ok(())
}
