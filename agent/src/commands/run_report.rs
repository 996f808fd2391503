//! What `sluice run --report` tells whoever started it: how the image came, how fast, and how much of it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::api::{Acquired, Event, ImageRequest, ImageStatus, RunReport, Served, Status};
use crate::client::Client;

/// Gathers the report, if there is to be one.
#[derive(Debug)]
pub(super) struct Reporter {
    path: Option<PathBuf>,
    image: String,
    started: Instant,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    report: RunReport,
    before: Option<ImageStatus>,
    /// Bytes of layers of an ordinary pull.
    pulled: u64,
}

impl Reporter {
    pub(super) fn new(path: Option<&Path>, image: &str) -> Self {
        Self {
            path: path.map(Path::to_path_buf),
            image: image.to_owned(),
            started: Instant::now(),
            known: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn status(&self, client: &Client) -> Option<ImageStatus> {
        self.path.as_ref()?;
        let request = ImageRequest { reference: Some(self.image.clone()) };
        match client.ask::<Status>("status", &request).await {
            Ok(status) => status.images.into_iter().next(),
            // It is not here yet, or there is no daemon to ask any more.
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "nothing is known of the image");
                None
            }
        }
    }

    /// What of the image is here already.
    pub(super) async fn before(&self, client: &Client) {
        let before = self.status(client).await;
        self.lock().before = before;
    }

    pub(super) fn hear(&self, event: &Event) {
        if let Event::Progress { bytes_done, bytes_total } = event {
            let mut known = self.lock();
            (known.pulled, known.report.bytes_total) = (*bytes_done, *bytes_total);
        }
    }

    pub(super) fn acquired(&self, acquired: &Acquired) {
        let mut known = self.lock();
        known.report.served = Some(acquired.served);
        known.report.fell_back = acquired.fell_back.clone();
    }

    /// The container's process is about to start.
    pub(super) fn ready(&self) {
        self.lock().report.ready_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    }

    /// What of the image is here when the container ended.
    pub(super) async fn after(&self, client: &Client) {
        let after = self.status(client).await;
        let mut known = self.lock();
        let before = known.before.take();
        if known.report.served == Some(Served::Unpacked) {
            let was_here = before.is_some_and(|before| before.state == "unpacked");
            known.report.bytes = if was_here { 0 } else { known.pulled };
        } else if let Some(after) = after {
            let local = before.map_or(0, |before| before.bytes_local);
            known.report.bytes = after.bytes_local.saturating_sub(local);
            known.report.bytes_total = after.bytes_total;
        }
    }

    pub(super) fn write(&self, error: Option<&anyhow::Error>) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut report = self.lock().report.clone();
        report.error = error.map(|error| format!("{error:#}"));
        std::fs::write(path, serde_json::to_vec(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}
