//! `sluice index`: makes an image's stream index and publishes it, or shows the one that is published.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_registry::{Client, Layer, ResolvedImage};

use super::progress::Progress;
use super::status::size;
use crate::api::Event;
use crate::cli::IndexArgs;
use crate::config::Config;
use crate::node::{
    HEADER_ANNOTATION, INDEX_KIND, LAYER_ANNOTATION, SIGNATURES_ANNOTATION, SigningKey, TOC_ANNOTATION,
    artifact_store, header_digest, read_index, registry_client, sign, trust, unsupported,
};

/// Layers indexed at once: each has two threads of work.
const LAYERS_AT_ONCE: usize = 2;

/// Makes and publishes.
pub(crate) async fn build(config: &Arc<Config>, args: IndexArgs) -> Result<()> {
    let name = args.image.context("no image is given")?;
    let registry = registry_client(config, None)?;
    let image = registry.resolve(&Client::parse(&name)?).await?;
    let store = artifact_store(config, args.store.as_deref(), &registry)?;
    // Before the work, so that a key that cannot be used is told at once.
    let key = args.sign.as_deref().or(config.sign_key.as_deref()).map(SigningKey::read).transpose()?;
    let total: u64 = image.layers.iter().map(|layer| layer.size).sum();
    let progress = Progress::new(&name);
    let done = std::sync::atomic::AtomicU64::new(0);
    let start = Instant::now();
    let mut distinct: Vec<&Layer> = Vec::new();
    for layer in &image.layers {
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("layer {}: {reason}", layer.digest);
        }
        if !distinct.iter().any(|one| one.digest == layer.digest) {
            distinct.push(layer);
        }
    }
    let report = |bytes: u64| {
        let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        progress.show(&Event::Progress { bytes_done: before + bytes, bytes_total: total });
    };
    let indexes: Vec<(String, LayerIndex)> = futures::stream::iter(distinct)
        .map(|layer| index_layer(&registry, &image, layer, &report))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    drop(progress);
    print_indexes(&indexes)?;
    let bytes: u64 = indexes.iter().map(|(_, index)| index.blob().len() as u64).sum();
    say!(
        "{} of layers indexed in {:.1} s; index {} ({:.2} %)",
        size(total),
        start.elapsed().as_secs_f64(),
        size(bytes),
        bytes as f64 * 100.0 / total.max(1) as f64
    );
    if args.dry_run {
        say!("dry run: nothing published");
        return Ok(());
    }
    let blobs = indexes.iter().map(|(digest, index)| index_blob(digest, index, key.as_ref())).collect();
    let digest = store.publish(&image, INDEX_KIND, blobs).await?;
    say!("published {digest} for {}{}", image.manifest_digest, if key.is_some() { ", signed" } else { "" });
    let trust = trust(config, args.store.as_deref())?;
    if let Err(error) = indexes.iter().try_for_each(|(_, index)| trust.remember(index)) {
        // As in a pipeline, where there is no node.
        tracing::info!(error = format!("{error:#}"), "this node does not remember that it made the index");
    }
    Ok(())
}

/// What is published of a layer's index.
pub(crate) fn index_blob(
    layer: &str,
    index: &LayerIndex,
    key: Option<&SigningKey>,
) -> (HashMap<String, String>, Bytes) {
    let mut annotations = HashMap::from([
        (LAYER_ANNOTATION.to_owned(), layer.to_owned()),
        (TOC_ANNOTATION.to_owned(), index.header().toc_len().to_string()),
        (HEADER_ANNOTATION.to_owned(), header_digest(index)),
    ]);
    let bytes = Bytes::copy_from_slice(index.blob());
    if let Some(key) = key {
        let signature = sign(key, layer, &sluice_registry::artifact::digest(&bytes), index);
        annotations.insert(SIGNATURES_ANNOTATION.to_owned(), signature);
    }
    (annotations, bytes)
}

async fn index_layer(
    registry: &Client,
    image: &ResolvedImage,
    layer: &Layer,
    report: &impl Fn(u64),
) -> Result<(String, LayerIndex)> {
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(32);
    let digest = layer.digest.clone();
    let indexing = tokio::task::spawn_blocking(move || -> Result<LayerIndex> {
        let mut indexer = LayerIndexer::new(IndexOptions::default(), NoSink)?;
        while let Some(piece) = receiver.blocking_recv() {
            indexer.push(&piece)?;
        }
        Ok(indexer.finish(&digest)?.0)
    });
    let mut body = registry.blob(&image.reference, &layer.digest, layer.size).read(0..layer.size, false);
    let mut failed = None;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(piece) => {
                report(piece.len() as u64);
                if sender.send(piece).await.is_err() {
                    break; // The indexer failed and says why.
                }
            }
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    drop(sender);
    let index = match (indexing.await?, failed) {
        (_, Some(error)) => return Err(error.into()),
        (index, None) => index.with_context(|| format!("layer {}", layer.digest))?,
    };
    if index.header().diff_id_text() != layer.diff_id {
        bail!("layer {}: its contents are not what the image's configuration says (diffID)", layer.digest);
    }
    Ok((layer.digest.clone(), index))
}

/// Shows what is published.
pub(crate) async fn show(config: &Arc<Config>, name: &str, store: Option<String>) -> Result<()> {
    let registry = registry_client(config, None)?;
    let image = registry.resolve(&Client::parse(name)?).await?;
    let store = artifact_store(config, store.as_deref(), &registry)?;
    let Some(blobs) = store.find(&image, INDEX_KIND).await? else {
        bail!("{name} has no stream index; make one with `sluice index {name}`");
    };
    let mut indexes = Vec::new();
    for layer in &image.layers {
        let of_layer =
            blobs.iter().find(|(blob, _)| blob.annotations.get(LAYER_ANNOTATION) == Some(&layer.digest));
        match of_layer {
            Some((blob, reader)) => {
                indexes.push((layer.digest.clone(), read_index(layer, blob, reader).await?))
            }
            None => say!("layer {}: not in the index", layer.digest),
        }
    }
    print_indexes(&indexes)
}

fn print_indexes(indexes: &[(String, LayerIndex)]) -> Result<()> {
    say!(
        "{:<20} {:>10} {:>10} {:>8} {:>8} {:>7} {:>10}  RANDOM",
        "LAYER",
        "SIZE",
        "TAR",
        "ENTRIES",
        "CHUNKS",
        "SPANS",
        "INDEX"
    );
    for (digest, index) in indexes {
        let header = index.header();
        say!(
            "{:<20} {:>10} {:>10} {:>8} {:>8} {:>7} {:>10}  {}",
            digest.get(..20).unwrap_or(digest),
            size(header.layer_size.get()),
            size(header.tar_size.get()),
            header.entry_count.get(),
            header.chunk_count.get(),
            index.spans().len(),
            size(header.windows.end().unwrap_or(0)),
            if index.random_access() { "yes" } else { "no" }
        );
    }
    Ok(())
}
