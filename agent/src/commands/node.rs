//! `sluice node`: the switch for new images, and the end of all.

use std::sync::Arc;

use anyhow::{Result, bail};

use crate::api::{NodeRequest, NodeStatus};
use crate::cli::{Global, NodeAction};
use crate::client::Client;
use crate::config::Config;

/// Asks the daemon, and prints what is so now.
pub(crate) async fn node(config: &Arc<Config>, global: &Global, action: NodeAction) -> Result<()> {
    if action == NodeAction::Drain {
        return super::daemon::drain(config, global).await;
    }
    let Some(client) = Client::connect_running(config).await? else {
        bail!("no daemon runs on {}; `sluice daemon` starts one", config.socket().display());
    };
    let request = match action {
        NodeAction::Enable => NodeRequest::Enable,
        NodeAction::Disable => NodeRequest::Disable,
        NodeAction::Status | NodeAction::Drain => NodeRequest::Status,
    };
    let status: NodeStatus = client.ask("node", &request).await?;
    match &status.reason {
        None => say!("streaming: on"),
        Some(reason) => say!("streaming: off ({reason})"),
    }
    say!("images in use: {}", status.images_in_use);
    say!("snapshotter: {}", status.snapshotter.display());
    if action == NodeAction::Enable && !status.streaming {
        bail!("new images are still pulled the ordinary way");
    }
    Ok(())
}
