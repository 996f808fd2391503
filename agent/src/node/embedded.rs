//! Layers that bring a table of contents of their own (eStargz, zstd:chunked): indexed by it, without reading the layer.

use anyhow::{Context, Result, bail};
use sluice_image::index::LayerIndex;
use sluice_image::index::embedded::{EmbeddedToc, TAIL_LEN};
use sluice_registry::{Client, Layer, ResolvedImage};

/// The index of a layer by its own table of contents; `None`: the manifest names none for it.
pub(crate) async fn embedded_index(
    registry: &Client,
    image: &ResolvedImage,
    layer: &Layer,
) -> Result<Option<LayerIndex>> {
    if layer.annotations.is_empty() {
        return Ok(None);
    }
    let annotation = |key: &str| layer.annotations.get(key).map(String::as_str);
    let blob = registry.blob(&image.reference, &layer.digest, layer.size);
    let tail_start = layer.size.saturating_sub(TAIL_LEN);
    // Without the tail only eStargz is not found: it costs a request only if there are other annotations.
    let found = match EmbeddedToc::find(annotation, layer.size, &[])? {
        Some(found) => Some(found),
        None => {
            let tail = blob.read_all(tail_start..layer.size, false).await?;
            EmbeddedToc::find(annotation, layer.size, &tail)?
        }
    };
    let Some(toc) = found else { return Ok(None) };
    let range = toc.range();
    let want = range.end - range.start;
    let bytes = blob.read_all(range, false).await?;
    if bytes.len() as u64 != want {
        bail!("the registry gave {} bytes of {want}", bytes.len());
    }
    let (digest, diff_id) = (layer.digest.clone(), layer.diff_id.clone());
    let made = tokio::task::spawn_blocking(move || toc.index(&bytes, &digest, &diff_id)).await;
    Ok(Some(made.context("reading a table of contents")??))
}
