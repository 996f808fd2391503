//! The snapshotter's socket for containerd, beside the daemon's own.

use std::sync::Arc;

use anyhow::{Context, Result};
use sluice_containerd::{BoundSocket, Snapshotter};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Stop;
use crate::config::Config;
use crate::node::{Node, NodeImages};

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
        let stopped = async {
            if stop.wait_for(|stop| *stop != Stop::No).await.is_err() {
                tracing::debug!("the stop channel closed");
            }
        };
        if let Err(error) = socket.serve(snapshotter, stopped).await {
            tracing::error!(error = format!("{:#}", anyhow::Error::from(error)), "no more snapshots");
        }
        restoring.abort();
    }))
}
