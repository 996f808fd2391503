//! Room in the layer store, and in memory: what is in use is known here, so here images are evicted when the disk or the quota is full.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_kernel::loop_device::LoopListing;
use sluice_store::InUse;

use super::{Node, recover, status};

/// How often the store is asked whether it found no space.
const INTERVAL: Duration = Duration::from_secs(2);
/// What is made free at once, so that not every chunk needs an eviction.
const ROOM_BYTES: u64 = 64 << 20;
/// How long devices that nobody's image needs are waited for.
const SETTLE: Duration = Duration::from_secs(1);

impl Node {
    /// What must stay: images and layers that somebody holds, or is about to.
    fn in_use(&self) -> Result<InUse> {
        let mut in_use = InUse::default();
        for (digest, image) in self.lock(&self.images).iter() {
            in_use.images.insert(digest.clone());
            in_use.layers.extend(image.layers.iter().cloned());
        }
        // An image that is being made has a turn that somebody has.
        let mut preparing: Vec<String> = self
            .lock(&self.preparing)
            .iter()
            .filter(|(_, turn)| turn.try_lock().is_err())
            .map(|(digest, _)| digest.clone())
            .collect();
        let mut named = HashSet::new();
        for image in self.store.images()? {
            if let Some(at) = preparing.iter().position(|digest| *digest == image.manifest_digest) {
                preparing.swap_remove(at);
                in_use.images.insert(image.manifest_digest);
                in_use.layers.extend(image.layers.iter().cloned());
            }
            named.extend(image.layers);
        }
        if !preparing.is_empty() {
            // The layers of an image that is not recorded yet are those that no other names.
            let all = self.store.layers()?.into_iter().chain(self.store.unpacked()?);
            in_use.layers.extend(all.filter(|digest| !named.contains(digest)));
        }
        Ok(in_use)
    }

    /// What is in use, and what containers that outlived their holders may still read through devices. Those of a container
    /// that just ended go a moment after it, with its mount namespace: they are waited for.
    pub(super) async fn in_use_when_settled(&self) -> Result<InUse> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let mut in_use = self.in_use()?;
            let held = in_use.layers.len();
            in_use.layers.extend(self.layers_behind_devices()?);
            if in_use.layers.len() == held {
                return Ok(in_use);
            }
            if Instant::now() > deadline {
                tracing::info!(
                    layers = in_use.layers.len() - held,
                    "layers that nobody holds stay: their devices are in use"
                );
                return Ok(in_use);
            }
            tokio::time::sleep(SETTLE / 50).await;
        }
    }

    fn layers_behind_devices(&self) -> Result<Vec<String>> {
        let (blocks, layers) = (self.config.state.join("blocks"), self.config.root.join("layers"));
        let devices = sluice_kernel::loop_device::list()?;
        let behind = |device: &LoopListing| recover::layer_behind(&blocks, &layers, &device.backing_file);
        Ok(devices.iter().filter_map(behind).collect())
    }

    /// Drops layers that are not to be kept, and stops what fills them.
    pub(super) async fn forget_layers(&self, keep: impl Fn(&str) -> bool) {
        let mut gone = Vec::new();
        self.lock(&self.layers).retain(|digest, layer| {
            let kept = keep(digest);
            if !kept {
                gone.push(Arc::clone(layer));
            }
            kept
        });
        for layer in gone {
            for path in layer.served() {
                if let Some(blockfs) = self.lock(&self.blockfs).as_ref()
                    && let Err(error) = blockfs.remove(path)
                {
                    tracing::warn!(%error, path = %path.display(), "a block file stays");
                }
            }
            if let Err(error) = layer.stop().await {
                tracing::debug!(error = format!("{error:#}"), "a layer that goes was not flushed");
            }
        }
    }

    /// Evicts images when the store finds no space, as long as this node lives.
    pub(super) fn keep_room(self: &Arc<Self>) {
        let node: Weak<Self> = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let Some(node) = node.upgrade() else { return };
                if node.store.needs_room()
                    && let Err(error) = node.make_room().await
                {
                    tracing::warn!(error = format!("{error:#}"), "no room can be made");
                }
                node.keep_below_memory_limit();
            }
        });
    }

    /// The limit bounds what is under way; what the heap keeps of work that is done is given back here.
    fn keep_below_memory_limit(&self) {
        let limit = self.config.memory.limit_bytes;
        let resident = || status::resident_bytes_of(std::process::id()).0;
        if resident() <= limit {
            return;
        }
        sluice_kernel::process::trim_heap();
        let resident = resident();
        if resident > limit {
            tracing::warn!(resident, limit, "the daemon takes more memory than memory_limit_mib says");
        }
    }

    async fn make_room(self: &Arc<Self>) -> Result<()> {
        let in_use = self.in_use_when_settled().await?;
        self.forget_layers(|digest| in_use.layers.contains(digest)).await;
        let store = self.store.clone();
        let freed = tokio::task::spawn_blocking(move || store.make_room(ROOM_BYTES, &in_use)).await??;
        self.reads.metrics.evicted.fetch_add(freed.images as u64, std::sync::atomic::Ordering::Relaxed);
        if freed.bytes > 0 {
            tracing::info!(
                images = freed.images,
                layers = freed.layers,
                bytes = freed.bytes,
                "room was made"
            );
        }
        Ok(())
    }
}
