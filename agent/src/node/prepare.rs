//! Sees to it that an image's layers are in the store, at least as tables of contents, and writes its EROFS metadata.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use futures::{FutureExt, StreamExt, TryStreamExt};
use sluice_image::index::LayerIndex;
use sluice_registry::artifact::{ArtifactBlob, ArtifactReader};
use sluice_registry::{Layer, ResolvedImage};
use sluice_store::ImageRecord;
use sluice_stream::first_pull;

use super::ahead::Lookup;
use super::embedded::embedded_index;
use super::merging::Merging;
use super::metadata::stored_header;
use super::pack_bytes::TablesAwaited;
use super::sources::RegistryBlob;
use super::trust::Found;
use super::{HEADER_ANNOTATION, INDEX_KIND, Node, SigningKey, TOC_ANNOTATION, header_digest, one_device};
use crate::daemon::EventSender;

/// Layers decoded at once during a first pull: each has two threads of work.
const LAYERS_AT_ONCE: usize = 3;

impl Node {
    /// Sees to it that every layer is in the store, at least as a table of contents, and that the image's EROFS metadata
    /// is written. What is known of the start is fetched `ahead`, as soon as the layers are there.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        image: &ResolvedImage,
        events: &EventSender,
        mut ahead: Option<&mut Lookup>,
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
        let found = match self.trust.find(&self.artifacts, image).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(image = image.reference.to_string(), %error, "cannot look for a stream index");
                Found::default()
            }
        };
        let total = image.layers.iter().map(|layer| layer.size).sum();
        let done = AtomicU64::new(0);
        let progress = |bytes: u64| {
            let before = done.fetch_add(bytes, Ordering::Relaxed);
            events.progress(before + bytes, total);
        };
        let mut pulled: Vec<String> = Vec::new();
        let mut distinct: Vec<&Layer> = Vec::new();
        for layer in &image.layers {
            if !distinct.iter().any(|one| one.digest == layer.digest) {
                distinct.push(layer);
            }
        }
        let at_once = if found.indexes.is_empty() { LAYERS_AT_ONCE } else { image.layers.len().max(1) };
        let merging = Merging::begin(&image.layers);
        let awaited = ahead.as_mut().and_then(|lookup| lookup.tables.take());
        let mut preparations = Vec::new();
        for layer in distinct {
            let (merging, awaited) = (merging.as_ref(), awaited.clone());
            preparations.push(
                self.prepare_layer(image, layer, &found, (merging, awaited), events, &progress).boxed(),
            );
        }
        drop(awaited);
        let mut work = futures::stream::iter(preparations).buffer_unordered(at_once);
        while let Some(done) = work.try_next().await? {
            pulled.extend(done);
        }
        drop(work);
        if let Some(lookup) = ahead {
            lookup.layers.iter().try_for_each(|digest| self.node_layer(image, digest).map(drop))?;
            self.layers_are_there(lookup);
        }
        let merged = match merging {
            Some(merging) => merging.tree().await?,
            None => None,
        };
        let metadata = self.write_metadata(image, merged).await?;
        for note in metadata.notes {
            events.note(note);
        }
        self.publish_later(image, pulled);
        self.record(image, metadata.layer_blocks)
    }

    /// One layer: from its index, or by a first pull, in which case its digest is returned. Its entries are given to the merge.
    async fn prepare_layer(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        found: &Found,
        (merging, awaited): (Option<&Merging>, Option<TablesAwaited>),
        events: &EventSender,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<String>> {
        if let Some(stored) = self.store.layer(&layer.digest)? {
            merge_stored(&stored, merging);
            progress(layer.size);
            return Ok(None);
        }
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("layer {}: {reason}", layer.digest);
        }
        let index = self.find_index(image, layer, found, events).await;
        drop(awaited);
        if let Some(index) = index {
            if !index.random_access() {
                tracing::info!(layer = layer.digest, "no random access: the layer is streamed in order");
            }
            let same = self.add_layer(index, merging).await?;
            merging.filter(|_| !same).into_iter().for_each(Merging::give_up);
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
        merge_stored(&pull.layer, merging);
        self.trust.remember(&pull.index)?;
        Ok(Some(layer.digest.clone()))
    }

    /// Puts a layer into the store, its entries on their way meanwhile. False: another index of it is there.
    async fn add_layer(&self, index: LayerIndex, merging: Option<&Merging>) -> Result<bool> {
        let header = index.header();
        let mut way =
            merging.and_then(|merging| merging.way(&header.layer_digest_text(), header.entry_count.get()));
        let store = self.store.clone();
        let added = tokio::task::spawn_blocking(move || -> Result<bool> {
            let added = store.add_layer_with(&index, move |entry| {
                if let Some(way) = &mut way {
                    way.push(entry);
                }
            })?;
            Ok(stored_header(&added.index_path())? == *index.header())
        });
        added.await?
    }

    /// A layer's index as published, else from the layer's own table of contents, else none.
    async fn find_index(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        found: &Found,
        events: &EventSender,
    ) -> Option<LayerIndex> {
        let refuse = |what: &str, error: &anyhow::Error| {
            events.note(format!("{what} of layer {} is not used: {error:#}", layer.digest));
            tracing::warn!(layer = layer.digest, error = format!("{error:#}"), "{what} refused");
        };
        if let Some(reason) = found.refused.get(&layer.digest) {
            refuse("the published index", &anyhow!("{reason}"));
        }
        if let Some((blob, reader)) = found.indexes.get(&layer.digest) {
            match read_index(layer, blob, reader).await {
                Ok(index) if self.trust.condemned(&header_digest(&index)) => {
                    refuse("the index", &anyhow!("it lied before"));
                }
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
    fn publish_later(self: &Arc<Self>, image: &ResolvedImage, pulled: Vec<String>) {
        let whole = image.layers.iter().all(|layer| pulled.contains(&layer.digest));
        if !self.config.publish_index || !whole || pulled.is_empty() {
            return;
        }
        let (node, image) = (Arc::clone(self), image.clone());
        tokio::spawn(async move {
            let publish = async {
                let key = node.config.sign_key.as_deref().map(SigningKey::read).transpose()?;
                let blob = |digest: &String| {
                    // Not kept meanwhile: it is some percent of the image.
                    let stored = node.store.layer(digest)?.context("a layer vanished")?;
                    let index = LayerIndex::from_blob(std::fs::read(stored.index_path())?)?;
                    if index.header().windows.end().is_none_or(|end| end > index.blob().len() as u64) {
                        bail!("layer {digest} was put into the store without its windows");
                    }
                    anyhow::Ok(crate::commands::index_blob(digest, &index, key.as_ref()))
                };
                let blobs = pulled.iter().map(blob).collect::<Result<_>>()?;
                anyhow::Ok(node.artifacts.publish(&image, INDEX_KIND, blobs).await?)
            };
            match publish.await {
                Ok(digest) => {
                    tracing::info!(image = image.reference.to_string(), digest, "stream index published")
                }
                Err(error) => {
                    let (image, error) = (image.reference.to_string(), format!("{error:#}"));
                    tracing::info!(image, error, "stream index not published")
                }
            }
        });
    }
}

/// Tells the merge of a layer that is in the store.
fn merge_stored(layer: &sluice_store::Layer, merging: Option<&Merging>) {
    let index = layer.index_path();
    let way = merging.and_then(|merging| {
        // One that cannot be read is met again, and told of, where its blocks are counted.
        merging.way(layer.digest(), stored_header(&index).ok()?.entry_count.get())
    });
    way.into_iter().for_each(|way| way.stored(index.clone()));
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
    let stated = blob.annotations.get(HEADER_ANNOTATION);
    if stated.is_some_and(|stated| *stated != header_digest(&index)) {
        bail!("it is not what its annotation {HEADER_ANNOTATION} says");
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
