//! `sluice upgrade`: another version of the program takes the daemon's place.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::api::{ImageRequest, Status, UpgradeRequest};
use crate::client::Client;
use crate::config::Config;
use crate::daemon::CAN_FOLLOW;

/// How long the new daemon may take until it answers.
const LONGEST: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(50);

/// Returns when the new daemon answers.
pub(crate) async fn upgrade(config: &Arc<Config>, program: Option<PathBuf>) -> Result<()> {
    let program = program
        .map(|path| std::fs::canonicalize(&path).with_context(|| format!("cannot find {}", path.display())));
    let program = program.transpose()?;
    let Some(client) = Client::connect_running(config).await? else {
        bail!("no daemon runs on {}", config.socket().display());
    };
    let before: Status = client.ask("status", &ImageRequest::default()).await?;
    let program: PathBuf = client.ask("upgrade", &UpgradeRequest { program }).await?;
    let after = follower(config, before.since_ms).await?;
    ensure!(
        after.program == program,
        "{} did not get ready, and {} runs: see the log in the state directory",
        program.display(),
        after.program.display()
    );
    say!("daemon {} is followed by {} (pid {})", before.version, after.version, after.pid);
    Ok(())
}

/// What the daemon says that is not the one that began at `since_ms`.
async fn follower(config: &Arc<Config>, since_ms: u64) -> Result<Status> {
    let deadline = Instant::now() + LONGEST;
    loop {
        if let Some(client) = Client::connect_running(config).await? {
            let request = ImageRequest::default();
            let answer = client.ask::<Status>("status", &request);
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, answer).await {
                Ok(Ok(status)) if status.since_ms != since_ms => return Ok(status),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(error = format!("{error:#}"), "the daemon is away"),
                Err(_elapsed) => {}
            }
        }
        ensure!(
            Instant::now() < deadline,
            "the new daemon does not answer; see its log in the state directory"
        );
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether this program can take the place of a daemon whose server of block files speaks `protocol`. That it takes the daemon's
/// configuration is shown by its having come so far.
pub(crate) fn can_follow(protocol: u64) -> Result<()> {
    let own = sluice_blockfs::PROTOCOL_VERSION;
    ensure!(
        protocol == own,
        "the server of block files that runs speaks version {protocol}, this program {own}: `sluice node drain` ends it, with all mounts"
    );
    say!("{CAN_FOLLOW}");
    Ok(())
}
