//! `sluice pull`, `rm`, `gc` and `fsck`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;

use super::progress::Progress;
use super::with_client;
use crate::api::{FsckReport, GcReport, ImageRequest, PullReport};
use crate::cli::Global;
use crate::config::Config;

/// Brings all of an image to this node.
pub(crate) async fn pull(config: &Arc<Config>, global: &Global, image: String) -> Result<()> {
    let report: PullReport = with_client(config, global, async |client| {
        let progress = Progress::new(&image);
        let request = ImageRequest { reference: Some(image.clone()) };
        client.follow("pull", &request, |event| progress.show(event)).await
    })
    .await?;
    say!("{} {} ({} bytes local)", report.reference, report.manifest_digest, report.bytes_local);
    Ok(())
}

/// Forgets an image.
pub(crate) async fn remove(config: &Arc<Config>, global: &Global, image: String) -> Result<()> {
    with_client(config, global, async |client| {
        client.ask("remove", &ImageRequest { reference: Some(image.clone()) }).await
    })
    .await
}

/// Frees what nothing needs.
pub(crate) async fn gc(config: &Arc<Config>, global: &Global) -> Result<()> {
    let report: GcReport = with_client(config, global, async |client| client.ask("gc", &()).await).await?;
    say!("{} layers removed, {} bytes freed", report.layers_removed, report.bytes_freed);
    Ok(())
}

/// Checks the store; the exit code is 1 when something was wrong.
pub(crate) async fn fsck(config: &Arc<Config>, global: &Global) -> Result<ExitCode> {
    let report: FsckReport =
        with_client(config, global, async |client| client.ask("fsck", &()).await).await?;
    for problem in &report.problems {
        say!("{problem}");
    }
    say!(
        "{} layers, {} chunks checked, {} problems",
        report.layers,
        report.chunks_checked,
        report.problems.len()
    );
    Ok(ExitCode::from(u8::from(!report.problems.is_empty())))
}
