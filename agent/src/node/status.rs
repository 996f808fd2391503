//! What `sluice status` shows.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use sluice_store::ImageRecord;
use sluice_stream::Lane;

use super::Node;
use crate::api::{BlockServerStatus, ImageStatus, LayerStatus, ReadCounters, Status};

impl Node {
    /// The node, or one image of it.
    pub(crate) async fn status(self: &Arc<Self>, reference: Option<&str>) -> Result<Status> {
        let only = match reference {
            Some(reference) => self.find_record(reference)?.map(|record| record.manifest_digest),
            None => None,
        };
        if let (Some(reference), None) = (reference, &only) {
            anyhow::bail!("there is no image `{reference}` here");
        }
        let mut images = Vec::new();
        for record in self.store.images()? {
            if only.as_ref().is_none_or(|only| *only == record.manifest_digest) {
                images.push(self.image_status(record)?);
            }
        }
        let (resident_bytes, resident_peak_bytes) = resident_bytes_of(std::process::id());
        let blocks = self.lock(&self.blockfs).as_ref().map(|blockfs| {
            let (pid, (way, reason)) = (blockfs.server(), blockfs.way());
            BlockServerStatus {
                pid,
                way: way.to_string(),
                reason: reason.to_owned(),
                resident_bytes: resident_bytes_of(pid).0,
            }
        });
        let counters = self.scheduler.counters();
        let disk_full = self.lock(&self.layers).values().any(|layer| layer.layer().disk_full());
        Ok(Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            program: crate::program::place()?,
            since_ms: self.since_ms,
            resident_bytes,
            resident_peak_bytes,
            disk_bytes: self.store.disk_bytes()?,
            disk_full,
            reads: ReadCounters {
                from_disk: counters.from_disk.load(Ordering::Relaxed),
                from_registry: counters.from_registry.load(Ordering::Relaxed),
                waiting: counters.waiting.load(Ordering::Relaxed),
                bytes_demand: counters.bytes(Lane::Demand),
                bytes_prefetch: counters.bytes(Lane::Prefetch),
                bytes_fill: counters.bytes(Lane::Fill),
            },
            blocks,
            indexes_quarantined: self.trust.lies.load(Ordering::Relaxed),
            images,
        })
    }

    /// What is counted, for Prometheus.
    pub(crate) async fn metrics_text(self: &Arc<Self>) -> Result<String> {
        let status = self.status(None).await?;
        let levels = self.probing.levels().cloned().unwrap_or_default();
        Ok(self.reads.metrics.text(&status, &levels))
    }

    fn image_status(&self, record: ImageRecord) -> Result<ImageStatus> {
        let unpacked = record.layer_blocks.is_empty();
        let mut layers = Vec::new();
        for digest in &record.layers {
            let failed = self.lock(&self.layers).get(digest).and_then(|layer| layer.failure());
            let (state, bytes_local, bytes_total) = match self.store.layer(digest)? {
                _ if unpacked => ("unpacked".to_owned(), 0, 0),
                Some(layer) if layer.is_complete() => ("complete".to_owned(), layer.size(), layer.size()),
                Some(layer) => {
                    let state =
                        failed.map_or_else(|| "streaming".to_owned(), |reason| format!("failed: {reason}"));
                    (state, layer.local_bytes(), layer.size())
                }
                None => ("missing".to_owned(), 0, 0),
            };
            layers.push(LayerStatus { digest: digest.clone(), state, bytes_local, bytes_total });
        }
        let complete = layers.iter().all(|layer| layer.state == "complete");
        let users =
            self.lock(&self.images).get(&record.manifest_digest).map_or(0, |image| image.holders.len());
        Ok(ImageStatus {
            reference: record.references.last().cloned().unwrap_or_default(),
            manifest_digest: record.manifest_digest,
            state: if unpacked {
                "unpacked"
            } else if complete {
                "local"
            } else {
                "streaming"
            }
            .to_owned(),
            users,
            bytes_local: layers.iter().map(|layer| layer.bytes_local).sum(),
            bytes_total: layers.iter().map(|layer| layer.bytes_total).sum(),
            layers,
        })
    }
}

/// Resident bytes of a process, now and at its peak (proc_pid_status(5)).
pub(super) fn resident_bytes_of(pid: u32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        kib.unwrap_or(0) * 1024
    };
    (field("VmRSS:"), field("VmHWM:"))
}
