//! `sluice node`: the switch for new images.

use anyhow::{Result, bail};

use crate::api::{NodeRequest, NodeStatus};
use crate::cli::NodeAction;
use crate::client::Client;
use crate::config::Config;

/// Asks the daemon, and prints what is so now.
pub(crate) async fn node(config: &Config, action: NodeAction) -> Result<()> {
    let Some(client) = Client::connect_running(config).await? else {
        bail!("no daemon runs on {}; `sluice daemon` starts one", config.socket().display());
    };
    let request = match action {
        NodeAction::Enable => NodeRequest::Enable,
        NodeAction::Disable => NodeRequest::Disable,
        NodeAction::Status => NodeRequest::Status,
    };
    let status: NodeStatus = client.ask("node", &request).await?;
    match &status.reason {
        None => println!("streaming: on"),
        Some(reason) => println!("streaming: off ({reason})"),
    }
    println!("images in use: {}", status.images_in_use);
    println!("snapshotter: {}", status.snapshotter.display());
    if action == NodeAction::Enable && !status.streaming {
        bail!("new images are still pulled the ordinary way");
    }
    Ok(())
}
