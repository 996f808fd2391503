//! `sluice profile`: what starts of an image read, kept, shown and published.

use std::sync::Arc;

use anyhow::Result;

use super::with_client;
use crate::api::{ProfileRequest, StartRequest};
use crate::cli::{Global, ProfileAction};
use crate::config::Config;

/// Asks the daemon, and prints what it says.
pub(crate) async fn profile(config: &Arc<Config>, global: &Global, action: ProfileAction) -> Result<()> {
    let request = match action {
        ProfileAction::List { image } => ProfileRequest::List { reference: image },
        ProfileAction::Show { image } => ProfileRequest::Show { reference: image },
        ProfileAction::Push { image, pack } => ProfileRequest::Push { reference: image, pack },
        ProfileAction::Pull { image, entrypoint, command } => ProfileRequest::Pull {
            reference: image,
            start: StartRequest { entrypoint, command, window_ms: None },
        },
        ProfileAction::Rm { image } => ProfileRequest::Remove { reference: image },
    };
    let lines: Vec<String> =
        with_client(config, global, async |client| client.ask("profiles", &request).await).await?;
    for line in lines {
        say!("{line}");
    }
    Ok(())
}
