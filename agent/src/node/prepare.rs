//! Sees to it that an image's layers are in the store, at least as tables of contents, and writes its EROFS metadata.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use sluice_image::index::LayerIndex;
use sluice_registry::artifact::{ArtifactBlob, ArtifactReader};
use sluice_registry::{Layer, ResolvedImage};
use sluice_store::ImageRecord;
use sluice_stream::first_pull;

use super::embedded::embedded_index;
use super::sources::RegistryBlob;
use super::{INDEX_KIND, LAYER_ANNOTATION, Node, TOC_ANNOTATION, one_device};
use crate::daemon::EventSender;

/// Layers decoded at once during a first pull: each has two threads of work.
const LAYERS_AT_ONCE: usize = 3;

/// Index blobs of an image, if there are any.
type Indexes = Vec<(ArtifactBlob, ArtifactReader)>;

impl Node {
    /// Sees to it that every layer is in the store, at least as a table of contents, and that the image's EROFS metadata
    /// is written.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        image: &ResolvedImage,
        events: &EventSender,
    ) -> Result<ImageRecord> {
        let known = self.store.image(&image.manifest_digest)?;
        let metadata = self.store.erofs_path(&image.manifest_digest)?;
        if let Some(known) = known.filter(|known| !known.layer_blocks.is_empty())
            && metadata.exists()
            && one_device::fits(self.form, &metadata, &known.layer_blocks)?
            && known.layers.iter().all(|layer| self.store.layer(layer).is_ok_and(|layer| layer.is_some()))
        {
            return self.record(image, known.layer_blocks);
        }
        let indexes = match self.artifacts.find(image, INDEX_KIND).await {
            Ok(found) => found.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(image = image.reference.to_string(), %error, "cannot look for a stream index");
                Vec::new()
            }
        };
        let total = image.layers.iter().map(|layer| layer.size).sum();
        let done = AtomicU64::new(0);
        let progress = |bytes: u64| {
            let before = done.fetch_add(bytes, Ordering::Relaxed);
            events.progress(before + bytes, total);
        };
        let mut pulled: Vec<(String, LayerIndex)> = Vec::new();
        let mut distinct: Vec<&Layer> = Vec::new();
        for layer in &image.layers {
            if !distinct.iter().any(|one| one.digest == layer.digest) {
                distinct.push(layer);
            }
        }
        let at_once = if indexes.is_empty() { LAYERS_AT_ONCE } else { image.layers.len().max(1) };
        let mut preparations = Vec::new();
        for layer in distinct {
            preparations.push(self.prepare_layer(image, layer, &indexes, events, &progress).boxed());
        }
        let mut work = futures::stream::iter(preparations).buffer_unordered(at_once);
        while let Some(done) = work.try_next().await? {
            pulled.extend(done);
        }
        drop(work);
        let metadata = self.write_metadata(image).await?;
        for note in metadata.notes {
            events.note(note);
        }
        self.publish_later(image, pulled);
        self.record(image, metadata.layer_blocks)
    }

    /// One layer: from its index, or by a first pull, whose index is returned.
    async fn prepare_layer(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        indexes: &Indexes,
        events: &EventSender,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<(String, LayerIndex)>> {
        if self.store.layer(&layer.digest)?.is_some() {
            progress(layer.size);
            return Ok(None);
        }
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("layer {}: {reason}", layer.digest);
        }
        if let Some(index) = self.find_index(image, layer, indexes, events).await {
            if !index.random_access() {
                tracing::info!(layer = layer.digest, "no random access: the layer is streamed in order");
            }
            let store = self.store.clone();
            tokio::task::spawn_blocking(move || store.add_layer(&index)).await??;
            progress(layer.size);
            return Ok(None);
        }
        let blob = Arc::new(RegistryBlob(self.registry.blob(&image.reference, &layer.digest, layer.size)));
        let pull = first_pull(
            &self.store,
            &self.scheduler,
            blob,
            (&layer.digest, &layer.diff_id),
            self.config.outage_timeout,
            progress,
        )
        .await?;
        Ok(Some((layer.digest.clone(), pull.index)))
    }

    /// A layer's index as published, else from the layer's own table of contents, else none.
    async fn find_index(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        indexes: &Indexes,
        events: &EventSender,
    ) -> Option<LayerIndex> {
        let refuse = |what: &str, error: &anyhow::Error| {
            events.note(format!("{what} of layer {} is not used: {error:#}", layer.digest));
            tracing::warn!(layer = layer.digest, error = format!("{error:#}"), "{what} refused");
        };
        let of_layer = |blob: &ArtifactBlob| blob.annotations.get(LAYER_ANNOTATION) == Some(&layer.digest);
        if let Some((blob, reader)) = indexes.iter().find(|(blob, _)| of_layer(blob)) {
            match read_index(layer, blob, reader).await {
                Ok(index) => return Some(index),
                Err(error) => refuse("the index", &error),
            }
        }
        match embedded_index(&self.registry, image, layer).await {
            Ok(index) => index,
            Err(error) => {
                refuse("the own table of contents", &error);
                None
            }
        }
    }

    pub(super) fn record(&self, image: &ResolvedImage, layer_blocks: Vec<u64>) -> Result<ImageRecord> {
        let known = self.store.image(&image.manifest_digest)?;
        let mut references = known.map(|known| known.references).unwrap_or_default();
        let name = image.reference.whole();
        references.retain(|one| *one != name);
        references.push(name);
        let record = ImageRecord {
            manifest_digest: image.manifest_digest.clone(),
            references,
            manifest: String::from_utf8_lossy(&image.manifest).into_owned(),
            config: String::from_utf8_lossy(&image.config).into_owned(),
            layers: image.layers.iter().map(|layer| layer.digest.clone()).collect(),
            layer_blocks,
            last_used: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        };
        self.store.put_image(&record)?;
        Ok(record)
    }

    /// Publishes the index that a first pull made, if it made all of it and publishing is allowed.
    fn publish_later(self: &Arc<Self>, image: &ResolvedImage, pulled: Vec<(String, LayerIndex)>) {
        let whole = image.layers.iter().all(|layer| pulled.iter().any(|(digest, _)| *digest == layer.digest));
        if !self.config.publish_index || !whole || pulled.is_empty() {
            return;
        }
        let (node, image) = (Arc::clone(self), image.clone());
        tokio::spawn(async move {
            let blobs = pulled
                .into_iter()
                .map(|(digest, index)| crate::commands::index_blob(&digest, &index))
                .collect();
            match node.artifacts.publish(&image, INDEX_KIND, blobs).await {
                Ok(digest) => {
                    tracing::info!(image = image.reference.to_string(), digest, "stream index published")
                }
                Err(error) => {
                    tracing::info!(image = image.reference.to_string(), %error, "stream index not published")
                }
            }
        });
    }
}

/// Why a layer of this media type cannot be used.
pub(crate) fn unsupported(media_type: &str) -> Option<String> {
    if media_type.contains("+encrypted") {
        return Some("it is encrypted; decrypt the image in the registry".to_owned());
    }
    let known = media_type.contains("tar") || media_type.contains("rootfs.diff");
    (!known).then(|| format!("its media type {media_type} is not a layer's"))
}

/// Reads and checks a layer's table of contents.
pub(crate) async fn read_index(
    layer: &Layer,
    blob: &ArtifactBlob,
    reader: &ArtifactReader,
) -> Result<LayerIndex> {
    let toc_len: u64 = blob
        .annotations
        .get(TOC_ANNOTATION)
        .and_then(|text| text.parse().ok())
        .filter(|len| *len <= blob.size)
        .with_context(|| format!("its annotation {TOC_ANNOTATION} is missing or wrong"))?;
    let bytes = reader.read_all(0..toc_len).await?;
    let index = LayerIndex::from_blob(bytes.to_vec())?;
    if !index.has_own_tar() {
        bail!("it claims to come from the layer's own table of contents, which only this node may read");
    }
    let header = index.header();
    if header.layer_digest_text() != layer.digest {
        bail!("it is the index of layer {}", header.layer_digest_text());
    }
    if header.diff_id_text() != layer.diff_id || header.layer_size.get() != layer.size {
        bail!("it does not fit the image's configuration");
    }
    Ok(index)
}
