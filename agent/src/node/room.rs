//! Room in the layer store, and in memory: what is in use is known here, so here images are evicted when the disk or the quota is full.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_kernel::loop_device::LoopListing;
use sluice_registry::ResolvedImage;
use sluice_store::InUse;

use super::layers::NodeLayer;
use super::{Node, recover, status};

/// How often the store is asked whether it found no space, unless it tells of something else.
const INTERVAL: Duration = Duration::from_secs(2);
/// Memory is given back when so much more is resident than at the least since the last time.
const MUCH_BYTES: u64 = 4 << 20;
/// What is made free at once, so that not every chunk needs an eviction.
const ROOM_BYTES: u64 = 64 << 20;
/// How long devices that nobody's image needs are waited for.
const SETTLE: Duration = Duration::from_secs(1);

/// What is being made ready, and is not in use yet.
#[derive(Debug, Default)]
pub(super) struct Needs {
    listed: Arc<Mutex<HashMap<u64, Need>>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Need {
    image: String,
    layers: Vec<String>,
}

/// See [`Node::need`].
#[derive(Debug)]
pub(super) struct Needed {
    listed: Arc<Mutex<HashMap<u64, Need>>>,
    number: u64,
}

impl Needs {
    fn add(&self, image: String, layers: Vec<String>) -> Needed {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.listed).insert(number, Need { image, layers });
        Needed { listed: Arc::clone(&self.listed), number }
    }

    fn all(&self) -> InUse {
        let mut all = InUse::default();
        for need in lock(&self.listed).values() {
            all.images.insert(need.image.clone());
            all.layers.extend(need.layers.iter().cloned());
        }
        all
    }

    /// Whether an image is being made ready.
    pub(super) fn has(&self, manifest_digest: &str) -> bool {
        lock(&self.listed).values().any(|need| need.image == manifest_digest)
    }
}

impl Drop for Needed {
    fn drop(&mut self) {
        lock(&self.listed).remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Says what `image` needs while it is made, pulled or given to somebody: until the answer is dropped none of it is removed. A
    /// removal that is under way is waited for.
    pub(super) async fn need(&self, image: &ResolvedImage) -> Needed {
        let layers = image.layers.iter().map(|layer| layer.digest.clone()).collect();
        let _over = self.removing.lock().await;
        self.needed.add(image.manifest_digest.clone(), layers)
    }

    /// What must stay: images and layers that somebody holds, or is about to.
    fn in_use(&self) -> InUse {
        let mut in_use = self.needed.all();
        for (digest, image) in self.lock(&self.images).iter() {
            in_use.images.insert(digest.clone());
            in_use.layers.extend(image.layers.iter().cloned());
        }
        in_use
    }

    /// What is in use now, and what is behind devices. Asked with `removing` held, so that it stays true.
    pub(super) fn in_use_now(&self) -> Result<InUse> {
        let mut in_use = self.in_use();
        in_use.layers.extend(self.layers_behind_devices()?);
        Ok(in_use)
    }

    /// Containers that outlived their holders may still read layers through devices. Those of a container that just ended go a
    /// moment after it, with its mount namespace: they are waited for.
    pub(super) async fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let held = self.in_use().layers.len();
            let in_use = self.in_use_now()?;
            if in_use.layers.len() <= held {
                return Ok(());
            }
            if Instant::now() > deadline {
                tracing::info!(
                    layers = in_use.layers.len() - held,
                    "layers that nobody holds stay: their devices are in use"
                );
                return Ok(());
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

    /// Evicts images when the store finds no space, and takes back layers that lost something, as long as this node lives.
    pub(super) fn keep_room(self: &Arc<Self>) {
        let (node, lost): (Weak<Self>, _) = (Arc::downgrade(self), self.store.lost());
        tokio::spawn(async move {
            let mut kept = u64::MAX;
            loop {
                let told = tokio::time::timeout(INTERVAL, lost.notified()).await.is_ok();
                let Some(node) = node.upgrade() else { return };
                node.take_back_lost().await;
                if told {
                    continue;
                }
                if node.store.needs_room()
                    && let Err(error) = node.make_room().await
                {
                    tracing::warn!(error = format!("{error:#}"), "no room can be made");
                }
                node.give_memory_back(&mut kept);
            }
        });
    }

    /// Bytes that only memory has go to the disk as soon as it takes them. Who works on their layer does that too, but may be waiting just
    /// for somebody who waits for the memory that they take. And what came for reads is recorded though nobody works on its layer: the
    /// server of block files asks the agent for all that is not, and a crash loses it. While a start is recorded by what the agent is asked for
    /// that stays so.
    pub(super) fn keep_flushing(self: &Arc<Self>) {
        let node: Weak<Self> = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let Some(node) = node.upgrade() else { return };
                let seen = node.probing.sees_memory() || !node.reads.is_recording();
                let waits = |layer: &&Arc<NodeLayer>| {
                    layer.layer().memory_bytes() > 0 || seen && layer.layer().is_unrecorded()
                };
                let layers = node.lock(&node.layers).values().filter(waits).cloned().collect::<Vec<_>>();
                for layer in layers {
                    let (node, digest) = (Arc::clone(&node), layer.layer().digest().to_owned());
                    let flush = move || {
                        if seen { node.make_local(&layer) } else { Ok(node.store.flush(layer.layer())?) }
                    };
                    let flushed = tokio::task::spawn_blocking(flush).await;
                    if let Err(error) = flushed.map_err(anyhow::Error::from).flatten() {
                        tracing::debug!(
                            digest,
                            error = format!("{error:#}"),
                            "only memory has bytes of a layer"
                        );
                    }
                }
            }
        });
    }

    /// The kernel reads complete layers by itself. Who else reads one, to copy from it, may find that the disk does not give it any more.
    async fn take_back_lost(self: &Arc<Self>) {
        let lost = |layer: &&Arc<NodeLayer>| layer.is_read_by_kernel() && !layer.layer().is_complete();
        let layers = self.lock(&self.layers).values().filter(lost).cloned().collect::<Vec<_>>();
        for layer in layers {
            let node = Arc::clone(self);
            let taken = tokio::task::spawn_blocking(move || node.fetch_again(layer.layer().digest())).await;
            if let Err(error) = taken.map_err(anyhow::Error::from).flatten() {
                tracing::warn!(error = format!("{error:#}"), "a damaged layer is not taken back");
            }
        }
    }

    /// Gives back what the heap keeps of work that is done: above the limit, or if much more is resident than the `kept` least.
    fn give_memory_back(&self, kept: &mut u64) {
        let resident = || status::resident_bytes_of(std::process::id()).0;
        let limit = self.config.memory.limit_bytes;
        let before = resident();
        *kept = before.min(*kept);
        if before <= limit && before - *kept <= MUCH_BYTES {
            return;
        }
        sluice_kernel::process::trim_heap();
        *kept = resident();
        if *kept > limit {
            tracing::warn!(
                resident = *kept,
                limit,
                "the daemon takes more memory than memory_limit_mib says"
            );
        }
    }

    async fn make_room(self: &Arc<Self>) -> Result<()> {
        self.settle().await?;
        let _removing = self.removing.lock().await;
        let in_use = self.in_use_now()?;
        self.forget_layers(|digest| in_use.layers.contains(digest)).await;
        let store = self.store.clone();
        let freed = tokio::task::spawn_blocking(move || store.make_room(ROOM_BYTES, &in_use)).await??;
        self.reads.metrics.evicted.fetch_add(freed.images as u64, Ordering::Relaxed);
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
