//! The snapshotter's socket for containerd, beside the daemon's own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_containerd::{BoundSocket, Snapshotter};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Stop;
use crate::config::Config;
use crate::node::{Node, NodeImages};

/// How long what containerd asked may still take when the daemon stops: a first pull would hold it up for minutes.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Serves snapshots until it is to stop. Images of snapshots that were there before are acquired again meanwhile.
pub(super) async fn start(
    config: &Config,
    node: &Arc<Node>,
    mut stop: watch::Receiver<Stop>,
) -> Result<JoinHandle<()>> {
    let images = Arc::new(NodeImages(Arc::clone(node)));
    let snapshotter = Snapshotter::open(&config.root.join("containerd"), images)
        .await
        .context("cannot open the snapshots of containerd")?;
    let socket = BoundSocket::bind(&config.snapshotter_socket())?;
    let restored = Arc::clone(&snapshotter);
    let restoring = tokio::spawn(async move {
        if let Err(error) = restored.restore().await {
            tracing::error!(%error, "cannot restore containerd's snapshots");
        }
    });
    Ok(tokio::spawn(async move {
        let mut also_stop = stop.clone();
        let stopped = async {
            if stop.wait_for(|stop| *stop != Stop::No).await.is_err() {
                tracing::debug!("the stop channel closed");
            }
        };
        let too_long = async {
            // A channel that closed says the same as a stop.
            drop(also_stop.wait_for(|stop| *stop != Stop::No).await);
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            served = socket.serve(snapshotter, stopped) => {
                if let Err(error) = served {
                    tracing::error!(error = format!("{:#}", anyhow::Error::from(error)), "no more snapshots");
                }
            }
            () = too_long => tracing::warn!("what containerd asked is cut short"),
        }
        restoring.abort();
    }))
}
