//! `sluice daemon`, `sluice stop`, `sluice node drain`, and the server of block files.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::unistd::Pid;
use sluice_kernel::process::{pidfd_open, wait_for_end};

use crate::api::StopRequest;
use crate::cli::Global;
use crate::client::Client;
use crate::config::Config;
use crate::daemon::{self, Stop};
use crate::program;

/// Serves until told to stop by a signal or by `sluice stop`.
pub(crate) async fn serve(config: Arc<Config>, announce: bool) -> Result<()> {
    // Before anybody is told that we run, and may want to end us.
    let mut interrupted = pin!(super::interrupted()?);
    let running = tokio::select! {
        running = daemon::start(Arc::clone(&config)) => running?,
        // What was begun is left as by one that was killed.
        () = &mut interrupted => return Ok(()),
    };
    // Whoever waits for the daemon does not wait for jobs.
    tokio::task::spawn_blocking(move || {
        if let Err(error) = crate::batch::resume(&config) {
            tracing::error!(error = format!("{error:#}"), "batch jobs do not go on");
        }
    });
    notify_systemd()?;
    if announce {
        say_ready()?;
    }
    let how = tokio::select! {
        () = interrupted => Stop::Leave,
        how = running.asked_to_stop() => how,
        () = running.needs_another() => return start_over(),
    };
    tracing::info!(?how, "stopping");
    end_by_all_means()?;
    running.stop(how == Stop::Drain).await?;
    if let Stop::Follow(program) = how {
        match daemon::become_successor(&program) {
            Err(error) => tracing::error!(error = format!("{error:#}"), "this program goes on"),
        }
        return start_over();
    }
    Ok(())
}

/// The next daemon waits for this one's end, and no read that hangs in the kernel may keep it from that. What is lost by it is what is
/// lost with one that is killed: contents that were not flushed are fetched again.
fn end_by_all_means() -> Result<()> {
    let watch = || {
        std::thread::sleep(LONGEST_END);
        tracing::error!("the daemon does not come to an end: it is cut off");
        // As one that was told to stop: its keeper starts no other.
        std::process::exit(0);
    };
    std::thread::Builder::new().name("end".to_owned()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}

/// Serves block files until their file system is unmounted.
pub(crate) fn serve_blocks(config: &Config) -> Result<()> {
    let socket = crate::node::block_socket(config);
    Ok(sluice_blockfs::serve(&config.state.join("blocks"), &socket, config.blocks, || {
        say_ready().map_err(std::io::Error::other)
    })?)
}

/// The server of block files died. This process becomes a new daemon, which starts another one and moves the devices in use to it:
/// what a daemon does that was killed, so nothing is put in order before.
fn start_over() -> Result<()> {
    if daemon::has_inherited_sockets() {
        bail!("the server of block files died: the service manager starts the next daemon");
    }
    tracing::error!("the server of block files died: the daemon starts over");
    Err(std::process::Command::new(program::own()?).args(daemon::own_arguments()).exec())
        .context("cannot start over")
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

/// Longer than a full disk cache takes to reach a slow disk.
const LONGEST_END: Duration = Duration::from_secs(50);
/// How long `sluice stop` waits for that.
const LONGEST_STOP: Duration = Duration::from_secs(60);

/// Asks the daemon to stop. Images in use are left to the next one.
pub(crate) async fn stop(config: &Arc<Config>) -> Result<()> {
    match Client::connect_running(config).await? {
        Some(client) => ask_to_stop(config, &client, false).await,
        None => nothing_runs(config),
    }
}

/// Has everything unmounted, also what a daemon left that was killed.
pub(crate) async fn drain(config: &Arc<Config>, global: &Global) -> Result<()> {
    if Client::connect_running(config).await?.is_none() && !crate::node::block_socket(config).exists() {
        return nothing_runs(config);
    }
    super::with_client(config, global, async |client| ask_to_stop(config, client, true).await).await
}

/// Returns when the daemon is gone: what follows may start the next one.
async fn ask_to_stop(config: &Config, client: &Client, drain: bool) -> Result<()> {
    let peer = tokio::net::UnixStream::connect(config.socket()).await.and_then(|stream| stream.peer_cred());
    // Of whoever listened first, which may be the service manager; none: in another namespace.
    let listener =
        peer.context("cannot ask whose socket it is")?.pid().context("the daemon has no number here")?;
    let request = StopRequest { drain };
    let said = tokio::time::timeout(LONGEST_STOP, client.ask::<Option<i32>>("stop", &request)).await;
    let said = said.context("the daemon does not answer; see its log in the state directory")??;
    let pid = said.unwrap_or(listener);
    if pid.cast_unsigned() == std::process::id() {
        return Ok(());
    }
    let pidfd = match pidfd_open(Pid::from_raw(pid)) {
        Err(Errno::ESRCH) => return Ok(()),
        opened => opened.context("cannot wait for the daemon's end")?,
    };
    let ended = tokio::task::spawn_blocking(move || wait_for_end(&pidfd, Some(LONGEST_STOP))).await??;
    anyhow::ensure!(ended, "the daemon (process {pid}) still writes what it has; see its log");
    Ok(())
}

fn nothing_runs(config: &Config) -> Result<()> {
    say!("no daemon runs on {}", config.socket().display());
    Ok(())
}
