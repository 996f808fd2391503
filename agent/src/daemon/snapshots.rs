//! The snapshotter's socket for containerd, beside the daemon's own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_containerd::{BoundSocket, Snapshotter};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Stop;
use super::sockets::Inherited;
use crate::config::Config;
use crate::credentials;
use crate::node::{Node, NodeImages};

/// How long what containerd asked may still take when the daemon stops: a first pull would hold it up for minutes.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Serves snapshots until it is to stop. Images of snapshots that were there before are acquired again meanwhile.
pub(super) async fn start(
    config: &Config,
    node: &Arc<Node>,
    inherited: &Inherited,
    mut stop: watch::Receiver<Stop>,
) -> Result<JoinHandle<()>> {
    let images = Arc::new(NodeImages(Arc::clone(node)));
    let snapshotter = Snapshotter::open(&config.root.join("containerd"), images)
        .await
        .context("cannot open the snapshots of containerd")?;
    let socket = socket(inherited, &config.snapshotter_socket())?;
    let cri = cri_proxy(config, node, inherited, stop.clone())?;
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
        if let Some(cri) = cri {
            cri.abort();
        }
    }))
}

/// systemd's socket, or one of our own.
fn socket(inherited: &Inherited, path: &Path) -> Result<BoundSocket> {
    Ok(match inherited.get(path)? {
        Some(listener) => BoundSocket::inherited(listener, path)?,
        None => BoundSocket::bind(path)?,
    })
}

/// Serves the CRI image service that learns credentials, if it is wanted. Pulls under way end with the snapshots' socket.
fn cri_proxy(
    config: &Config,
    node: &Arc<Node>,
    inherited: &Inherited,
    mut stop: watch::Receiver<Stop>,
) -> Result<Option<JoinHandle<()>>> {
    if !config.cri_proxy {
        return Ok(None);
    }
    let socket = socket(inherited, &config.cri_socket())?;
    let (containerd, learned) = (config.containerd.clone(), Arc::clone(node.learned()));
    Ok(Some(tokio::spawn(async move {
        // A channel that closed says the same as a stop.
        let stopped = async { drop(stop.wait_for(|stop| *stop != Stop::No).await) };
        if let Err(error) = credentials::serve_cri(socket, &containerd, learned, stopped).await {
            tracing::error!(error = format!("{error:#}"), "no more image service");
        }
    })))
}
