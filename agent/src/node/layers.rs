//! A layer on the node: its bytes, its block device, its background fill and its hand-over to the kernel.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
use sluice_blockfs::Device;
use sluice_registry::ResolvedImage;
use sluice_store::Layer;
use sluice_stream::{BlobSource, LayerParts, MemorySource, StreamError, StreamedLayer};

use super::Node;
use super::sources::{IndexBlob, LayerBlocks, LocalIndex, RegistryBlob};
use crate::daemon::EventSender;

/// See the module text.
#[derive(Debug)]
pub(super) struct NodeLayer {
    layer: Arc<Layer>,
    /// An image that has it.
    image: ResolvedImage,
    /// None for a layer that is complete from the start.
    streamed: Option<Arc<StreamedLayer>>,
    /// The block files, until the layer is complete: one, and what earlier agents had for it.
    served: Vec<PathBuf>,
    device: Mutex<Weak<Device>>,
    /// Its block files are gone; changes while `device` is held.
    handed_over: AtomicBool,
    fill: Mutex<Option<tokio::task::JoinHandle<()>>>,
    failed: Mutex<Option<String>>,
}

impl NodeLayer {
    pub(super) fn size(&self) -> u64 {
        self.layer.size()
    }

    fn open_data(&self) -> Result<File> {
        self.layer.open_data().with_context(|| format!("the file of layer {}", self.layer.digest()))
    }

    /// Where its bytes come from, if it was not complete from the start.
    pub(super) fn source(&self) -> Option<&Arc<StreamedLayer>> {
        self.streamed.as_ref()
    }

    pub(super) fn image(&self) -> &ResolvedImage {
        &self.image
    }

    pub(super) fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Whether it was complete when it came here, or was handed over since.
    pub(super) fn is_read_by_kernel(&self) -> bool {
        self.streamed.is_none() || self.handed_over.load(Ordering::Acquire)
    }

    /// Why the layer cannot be completed, if so.
    pub(super) fn failure(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Files that loop devices of this layer may be on.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.served.iter().cloned().chain([self.layer.data_path()]).collect()
    }

    /// The files that blockfs serves for it, if any.
    pub(super) fn served(&self) -> &[PathBuf] {
        &self.served
    }

    /// The layer's block device, shared by all images that have the layer. Blocks the thread.
    pub(super) fn device(&self) -> Result<Arc<Device>> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = device.upgrade() {
            return Ok(device);
        }
        let attached = match self.served.first() {
            Some(path) if !self.layer.is_complete() => Device::attach(path)?,
            _ => Device::attach_file(&self.open_data()?)?,
        };
        let attached = Arc::new(attached);
        *device = Arc::downgrade(&attached);
        Ok(attached)
    }

    /// Takes over a device that is on a file of this layer.
    pub(super) fn adopt_device(&self, number: u32) -> Result<Arc<Device>> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = device.upgrade() {
            return Ok(device);
        }
        let adopted = Arc::new(Device::adopt(number)?);
        *device = Arc::downgrade(&adopted);
        Ok(adopted)
    }

    /// Brings everything that is missing, and waits for it.
    pub(super) async fn fill(self: &Arc<Self>, node: &Arc<Node>, events: &EventSender) -> Result<()> {
        let Some(streamed) = &self.streamed else { return Ok(()) };
        let mut completion = streamed.completion();
        let progress = async {
            loop {
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                events.progress(self.layer.local_bytes(), self.layer.size());
            }
        };
        tokio::select! {
            filled = node.complete(self) => filled,
            done = completion.wait_for(|complete| *complete) => done.map(|_| ()).context("the layer was dropped"),
            () = progress => Ok(()),
        }
    }

    /// Stops the fill and makes durable what came.
    pub(super) async fn stop(&self) -> Result<()> {
        if let Some(fill) = self.fill.lock().unwrap_or_else(PoisonError::into_inner).take() {
            fill.abort();
        }
        match &self.streamed {
            Some(streamed) => match streamed.flush().await {
                Err(error @ StreamError::Lost { .. }) => {
                    tracing::warn!(%error, "the next agent fetches it again");
                    Ok(())
                }
                other => Ok(other?),
            },
            None => Ok(()),
        }
    }

    pub(super) fn fail(&self, why: Option<String>) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

impl Node {
    /// The layer of an image, streamed if it is not complete; `None` if the store does not have it.
    pub(super) fn node_layer(
        self: &Arc<Self>,
        image: &ResolvedImage,
        digest: &str,
    ) -> Result<Option<Arc<NodeLayer>>> {
        let mut layers = self.lock(&self.layers);
        // One that was evicted, and maybe came anew for another image, must not be taken for what is in the store now.
        if let Some(layer) = layers.get(digest).filter(|layer| layer.layer.open_data().is_ok()) {
            return Ok(Some(Arc::clone(layer)));
        }
        self.begin_layer(&mut layers, image, digest, (Weak::new(), &[]))
    }

    /// A layer of which something was lost after it was verified. What reads its file by itself, the kernel or the server of block
    /// files, does so no longer.
    pub(super) fn begin_again(
        self: &Arc<Self>,
        image: &ResolvedImage,
        digest: &str,
    ) -> Result<Option<Arc<NodeLayer>>> {
        let before = self.lock(&self.layers).get(digest).cloned();
        // Not while it is handed over.
        let device = before.as_ref().map(|layer| layer.device.lock().unwrap_or_else(PoisonError::into_inner));
        let served = before.as_ref().filter(|layer| !layer.handed_over.load(Ordering::Acquire));
        let served = served.map_or(&[][..], |layer| layer.served());
        let device = device.as_deref().cloned().unwrap_or_default();
        let mut layers = self.lock(&self.layers);
        layers.remove(digest);
        let layer = self.begin_layer(&mut layers, image, digest, (device, served))?;
        drop(layers);
        if let Some((layer, path)) = layer.as_ref().and_then(|layer| Some((layer, layer.served.first()?))) {
            for device in Device::all_on(&layer.layer.data_path())? {
                device.hand_over(path)?;
                tracing::info!(layer = digest, device = %device.path().display(), "the kernel does not read the layer's file any more");
            }
        }
        Ok(layer)
    }

    /// `before`: its device, and block files that are served.
    fn begin_layer(
        self: &Arc<Self>,
        layers: &mut HashMap<String, Arc<NodeLayer>>,
        image: &ResolvedImage,
        digest: &str,
        before: (Weak<Device>, &[PathBuf]),
    ) -> Result<Option<Arc<NodeLayer>>> {
        let Some(layer) = self.store.layer(digest)? else { return Ok(None) };
        let name = digest.trim_start_matches("sha256:");
        // A complete layer whose file is still served was to be handed over when the last agent ended.
        let served = self
            .lock(&self.blockfs)
            .as_ref()
            .is_some_and(|blockfs| blockfs.left().iter().any(|left| left == name));
        let (streamed, served) = if layer.is_complete() && !served {
            (None, Vec::new())
        } else {
            let streamed = self.streamed(image, &layer)?;
            let blocks = Arc::new(LayerBlocks::new(Arc::clone(&streamed), self)?);
            let paths = match (self.lock(&self.blockfs).as_ref(), before.1) {
                (Some(blockfs), []) => blockfs.add(name, blocks)?,
                (Some(blockfs), before) => {
                    before
                        .iter()
                        .try_for_each(|path| blockfs.add_again(path, Arc::<LayerBlocks>::clone(&blocks)))?;
                    before.to_vec()
                }
                (None, _) => Vec::new(),
            };
            (Some(streamed), paths)
        };
        let node_layer = Arc::new(NodeLayer {
            layer,
            image: image.clone(),
            streamed,
            served,
            device: Mutex::new(before.0),
            handed_over: AtomicBool::new(false),
            fill: Mutex::default(),
            failed: Mutex::default(),
        });
        layers.insert(digest.to_owned(), Arc::clone(&node_layer));
        self.watch(&node_layer);
        Ok(Some(node_layer))
    }

    fn streamed(&self, image: &ResolvedImage, layer: &Arc<Layer>) -> Result<Arc<StreamedLayer>> {
        let digest = layer.digest();
        let path = layer.index_path();
        let blob = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let index = sluice_image::index::LayerIndex::from_blob(blob)?;
        let size = index.header().layer_size.get();
        let published = || IndexBlob {
            artifacts: self.artifacts.clone(),
            trust: Arc::clone(&self.trust),
            header: super::header_digest(&index),
            image: image.clone(),
            layer: digest.to_owned(),
            found: Arc::default(),
        };
        let windows = &index.header().windows;
        let whole = windows.offset.get().saturating_add(windows.len.get());
        let index_blob: Arc<dyn BlobSource> = if index.has_own_tar() && index.blob().len() as u64 >= whole {
            Arc::new(LocalIndex { path, size: whole, published: published() })
        } else if index.has_own_tar() {
            Arc::new(published())
        } else {
            // Made here from the layer's own table of contents: nobody else has it.
            Arc::new(MemorySource(bytes::Bytes::copy_from_slice(index.blob())))
        };
        let parts = LayerParts {
            layer: Arc::clone(layer),
            store: self.store.clone(),
            blob: Arc::new(RegistryBlob(self.registry.blob(&image.reference, digest, size))),
            index_blob,
            scheduler: self.scheduler.clone(),
            outage_timeout: self.config.outage_timeout,
        };
        Ok(StreamedLayer::new(parts, &index))
    }

    /// Hands the layer over to the kernel when it is complete.
    fn watch(self: &Arc<Self>, layer: &Arc<NodeLayer>) {
        let Some(streamed) = &layer.streamed else { return };
        let mut completion = streamed.completion();
        let (node, layer) = (Arc::clone(self), Arc::clone(layer));
        tokio::spawn(async move {
            if completion.wait_for(|complete| *complete).await.is_err() {
                return;
            }
            let handing = tokio::task::spawn_blocking(move || {
                node.read_local_far_ahead();
                node.hand_over(&layer)
            });
            let handing = handing.await;
            match handing.map_err(anyhow::Error::from).flatten() {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "a complete layer stays with the agent")
                }
            }
        });
    }

    /// Makes durable what came of a layer; the server of block files reads that by itself from then on. Blocks the thread.
    pub(super) fn make_local(&self, layer: &NodeLayer) -> Result<()> {
        self.store.flush(layer.layer())?;
        let Some(blockfs) = &*self.lock(&self.blockfs) else { return Ok(()) };
        Ok(layer.served.iter().try_for_each(|path| blockfs.is_local(path))?)
    }

    fn hand_over(&self, layer: &NodeLayer) -> Result<()> {
        if layer.served.is_empty() {
            return Ok(());
        }
        for path in &layer.served {
            Device::all_on(path)?.iter().for_each(Device::wait_for_rest);
        }
        // Held while devices are switched, so that no new one appears on a block file.
        let _device = layer.device.lock().unwrap_or_else(PoisonError::into_inner);
        if !layer.layer.is_complete() {
            // Something of it was lost meanwhile.
            return Ok(());
        }
        for path in &layer.served {
            if let Some(blockfs) = self.lock(&self.blockfs).as_ref() {
                blockfs.all_is_local(path)?;
            }
            for device in Device::all_on(path)? {
                device.hand_over_to(&layer.open_data()?)?;
            }
            if let Some(blockfs) = self.lock(&self.blockfs).as_ref() {
                blockfs.remove(path)?;
            }
        }
        layer.handed_over.store(true, Ordering::Release);
        tracing::info!(layer = layer.layer.digest(), "complete: the kernel reads it from now on");
        Ok(())
    }

    /// Lets the kernel read far ahead in images whose layers are all local: nothing is fetched for it. Blocks the thread.
    fn read_local_far_ahead(&self) {
        let mounted = |image: &super::Image| {
            let metadata = image.mount.as_ref()?.metadata()?;
            Some((image.layers.clone(), Arc::clone(metadata)))
        };
        let mounts: Vec<_> = self.lock(&self.images).values().filter_map(mounted).collect();
        for (layers, metadata) in mounts {
            if self.complete_layers(&layers) == layers.len() {
                metadata.read_far_ahead();
            }
        }
    }

    /// An image is among those in use from now on. Its last layer may have become complete just before, when nobody found the image.
    pub(super) fn entered_use(self: &Arc<Self>) {
        let node = Arc::clone(self);
        tokio::task::spawn_blocking(move || node.read_local_far_ahead());
    }

    /// Fetches what is missing of `layers` in the background, one after another.
    pub(super) fn fill_in_background(self: &Arc<Self>, layers: &[Arc<NodeLayer>]) {
        if !self.config.fill {
            return;
        }
        let mut before = None;
        for layer in layers {
            if layer.streamed.is_none() || layer.layer.is_complete() {
                continue;
            }
            let mut slot = layer.fill.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.as_ref().is_some_and(|fill| !fill.is_finished()) {
                continue;
            }
            let (node, this, previous) = (Arc::clone(self), Arc::clone(layer), before.take());
            let (tried, wait) = tokio::sync::oneshot::channel::<()>();
            before = Some(wait);
            *slot = Some(tokio::spawn(async move {
                if let Some(previous) = previous {
                    // Its end, not its result, is what matters.
                    drop(previous.await);
                }
                node.complete_in_time(this, tried).await;
            }));
        }
    }
}
