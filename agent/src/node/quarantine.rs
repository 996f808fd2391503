//! A layer that cannot be completed: is the disk, the registry, or the stream index at fault?
//!
//! The judge is an ordinary pull, whose bytes must have the digest that the manifest and the diffID that the configuration says. What
//! it brings takes the layer's place; if it differs from what the index said, the index lied, and mounts made by it end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::FutureExt;
use sluice_image::index::LayerIndex;
use sluice_registry::ResolvedImage;
use sluice_store::Layer;
use sluice_stream::{StreamError, StreamedLayer, first_pull};

use super::Node;
use super::layers::NodeLayer;
use super::sources::RegistryBlob;
use crate::daemon::EventSender;
use crate::journal::Reason;

/// A layer that could not be completed is tried again after so long, then after twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Node {
    /// Completes a layer, however long it takes; says when it was tried once.
    pub(super) async fn complete_in_time(
        self: Arc<Self>,
        layer: Arc<NodeLayer>,
        tried: tokio::sync::oneshot::Sender<()>,
    ) {
        let mut tried = Some(tried);
        let mut pause = FIRST_PAUSE;
        while let Err(error) = self.complete(&layer).await {
            let current = self.lock(&self.layers).get(layer.layer().digest()).cloned();
            if current.is_some_and(|current| !Arc::ptr_eq(&current, &layer)) {
                // The layer began anew: others see to it.
                return;
            }
            let error = format!("{error:#}");
            tracing::error!(layer = layer.layer().digest(), error, "the layer cannot be completed yet");
            layer.fail(Some(error));
            drop(tried.take());
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        layer.fail(None);
    }

    /// Brings all of a layer, by its index or, if that does not lead there, the ordinary way.
    pub(super) async fn complete(self: &Arc<Self>, layer: &Arc<NodeLayer>) -> Result<()> {
        let Some(streamed) = layer.source() else { return Ok(()) };
        match streamed.fill().await {
            Ok(()) => Ok(()),
            Err(error) if error.is_of_the_layer() => self.examine(layer, streamed, error).await,
            Err(error) => Err(error.into()),
        }
    }

    /// The layer as an ordinary pull brought it, for a process whose read failed on the way by the index: if they say the same.
    pub(super) async fn come_whole(
        self: &Arc<Self>,
        streamed: &Arc<StreamedLayer>,
        error: &StreamError,
    ) -> Option<Arc<Layer>> {
        let digest = streamed.layer().digest();
        let layer = self.lock(&self.layers).get(digest).cloned();
        let layer = layer.filter(|layer| layer.source().is_some_and(|source| Arc::ptr_eq(source, streamed)));
        // Where the ordinary pull failed too, it is tried again in the background, not for each read.
        if let Some(layer) = layer.filter(|layer| layer.failure().is_none())
            && let Err(ordinary) = self.examine(&layer, streamed, error.clone()).await
        {
            layer.fail(Some(format!("{ordinary:#}")));
            return None;
        }
        let replaced = *streamed.completion().borrow();
        self.store.layer(digest).ok().flatten().filter(|layer| replaced && layer.is_complete())
    }

    /// A layer of which something on the disk was lost: fetched again, at once if an image in use has it. Blocks the thread.
    pub(super) fn fetch_again(self: &Arc<Self>, digest: &str) -> Result<()> {
        let used = self.lock(&self.images).values().any(|image| image.layers.iter().any(|one| one == digest));
        match self.image_with(digest)?.filter(|_| used) {
            None => drop(self.lock(&self.layers).remove(digest)),
            Some(image) => {
                if let Some(layer) = self.begin_again(&image, digest)? {
                    self.serve_whole_again(digest)?;
                    self.fill_in_background(&[layer]);
                }
            }
        }
        // In use or not, it begins anew; where that cannot be, nothing is known of it any more.
        if self.store.layer(digest)?.is_none() {
            for image in self.store.images()? {
                if !used && image.layers.iter().any(|one| one == digest) {
                    self.store.remove_image(&image.manifest_digest)?;
                }
            }
        }
        Ok(())
    }

    async fn examine(
        self: &Arc<Self>,
        layer: &Arc<NodeLayer>,
        streamed: &Arc<StreamedLayer>,
        error: StreamError,
    ) -> Result<()> {
        let digest = layer.layer().digest().to_owned();
        // One judgement at a time, and what it led to is there for the next.
        let _turn = self.turn(&digest).await;
        if self.store.layer(&digest)?.is_some_and(|layer| layer.is_complete()) {
            return Ok(());
        }
        if matches!(error, StreamError::DiffId { .. }) {
            let (store, on_disk) = (self.store.clone(), Arc::clone(streamed.layer()));
            let report = tokio::task::spawn_blocking(move || store.check(&on_disk)).await??;
            if !report.problems.is_empty() {
                tracing::error!(problems = ?report.problems, "the disk changed what was verified; it is fetched again");
                streamed.try_again();
                return streamed.fill().await.map_err(Into::into);
            }
        }
        let path = layer.layer().index_path();
        let blob = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let believed = LayerIndex::from_blob(blob)?;
        if !believed.has_own_tar() {
            // The layer's own table of contents: it is the image that is wrong.
            return Err(error.into());
        }
        let size = believed.header().layer_size.get();
        let blob = Arc::new(RegistryBlob(self.registry.blob(&layer.image().reference, &digest, size)));
        let named = (digest.as_str(), layer.layer().diff_id());
        let patience = self.config.outage_timeout;
        let pull = first_pull(&self.store, &self.scheduler, blob, named, patience, |_| {}).await;
        let pull = match pull {
            Ok(pull) => pull,
            Err(ordinary) => return Err(error).context(format!("the ordinary pull failed too: {ordinary}")),
        };
        self.trust.remember(&pull.index)?;
        // Now complete and in place: whoever asks for the layer gets a new handle.
        self.lock(&self.layers).retain(|_, other| !Arc::ptr_eq(other, layer));
        if same_contents(&believed, &pull.index)? {
            tracing::warn!(layer = digest, %error, "ranges of the layer were damaged, the whole is well");
            streamed.replaced();
            return Ok(());
        }
        self.condemn(layer, &believed, &error).await
    }

    /// Ends what was made by an index that lied, and makes its images anew.
    async fn condemn(
        self: &Arc<Self>,
        layer: &Arc<NodeLayer>,
        index: &LayerIndex,
        error: &StreamError,
    ) -> Result<()> {
        let digest = layer.layer().digest().to_owned();
        self.trust.condemn(index, &error.to_string())?;
        let (silent, _unheard) = tokio::sync::mpsc::channel(1);
        let events = EventSender::new(silent);
        for record in self.store.images()?.into_iter().filter(|record| record.layers.contains(&digest)) {
            let name = record.references.last().cloned().unwrap_or_default();
            let _turn = self.turn(&record.manifest_digest).await;
            let in_use = self.end_mounts(&digest).await?;
            let advice = if in_use { "; containers that run from it must be started again" } else { "" };
            let message = format!(
                "The stream index of layer {digest} lied and is in quarantine ({error}); the image was fetched the ordinary way{advice}"
            );
            self.journal.emit(Reason::IndexQuarantined, &name, message);
            self.store.remove_image(&record.manifest_digest)?;
            let image = ResolvedImage::from_parts(
                sluice_registry::Client::parse(&name)?,
                record.manifest_digest,
                record.manifest.into(),
                record.config.into(),
            )?;
            let _needed = self.need(&image).await;
            self.prepare(&image, &events, None).boxed().await?;
        }
        match self.lock(&self.blockfs).as_ref() {
            // From now on what still reads it gets errors instead of lies.
            Some(blockfs) => Ok(layer.served().iter().try_for_each(|path| blockfs.remove(path))?),
            None => Ok(()),
        }
    }

    /// Takes the mounts that have a layer out of the tree; whether there were any. Who uses one keeps it alive until done.
    async fn end_mounts(self: &Arc<Self>, layer: &str) -> Result<bool> {
        let mut ended = Vec::new();
        self.lock(&self.images).retain(|_, image| {
            let keeps = !image.layers.iter().any(|one| one == layer);
            if !keeps {
                ended.extend(image.mount.take());
            }
            keeps
        });
        self.keep();
        let any = !ended.is_empty();
        let unmounted = tokio::task::spawn_blocking(move || {
            ended.into_iter().try_for_each(sluice_blockfs::ImageMount::unmount)
        });
        unmounted.await??;
        Ok(any)
    }
}

/// Whether two indexes say the same of a layer: names, places and digests of contents.
fn same_contents(one: &LayerIndex, other: &LayerIndex) -> Result<bool> {
    let (mut ours, mut theirs) = (one.toc()?, other.toc()?);
    loop {
        match (ours.next().transpose(), theirs.next().transpose()) {
            (Ok(None), Ok(None)) => return Ok(true),
            (Ok(Some(one)), Ok(Some(other))) if one == other => {}
            _ => return Ok(false),
        }
    }
}
