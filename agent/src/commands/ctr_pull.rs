//! `sluice ctr-pull`: an image into containerd, streamed by the snapshotter where it can be.

use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use oci_spec::image::ImageManifest;
use sluice_containerd::{Containerd, LayerSource, PlannedLayer, PullPlan};
use sluice_registry::{Client, Reference, ResolvedImage};

use crate::cli::CtrPullArgs;
use crate::config::Config;
use crate::node::registry_client;

/// Layers from the image's registry.
struct Registry {
    client: Client,
    reference: Reference,
}

impl LayerSource for Registry {
    fn read(&self, layer: &PlannedLayer) -> BoxStream<'static, Result<Bytes, String>> {
        let blob = self.client.blob(&self.reference, &layer.digest, layer.size);
        let pieces = blob.read(0..layer.size, false);
        pieces.map(|piece| piece.map_err(|error| error.to_string())).boxed()
    }
}

/// Pulls and prints what was done.
pub(crate) async fn pull(config: &Arc<Config>, args: CtrPullArgs) -> Result<()> {
    let client = registry_client(config, None)?;
    let image = client.resolve(&Client::parse(&args.image)?).await?;
    let plan = plan(&image, args.snapshotter)?;
    let socket = args.address.unwrap_or_else(|| config.containerd.clone());
    let containerd = Containerd::connect(&socket, &args.namespace).await?;
    let source = Registry { client, reference: image.reference.clone() };
    let report = containerd
        .pull(&plan, &source, &mut |text| eprintln!("sluice: {text}"))
        .await
        .with_context(|| format!("cannot pull {} into containerd", plan.reference))?;
    say!("{} {}", plan.reference, plan.manifest_digest);
    say!(
        "{} layers: {} streamed, {} there before, {} downloaded",
        plan.layers.len(),
        report.served,
        report.present,
        report.unpacked
    );
    Ok(())
}

fn plan(image: &ResolvedImage, snapshotter: String) -> Result<PullPlan> {
    let manifest: ImageManifest =
        serde_json::from_slice(&image.manifest).context("the image's manifest is not valid")?;
    let layers = image.layers.iter().map(|layer| PlannedLayer {
        digest: layer.digest.clone(),
        size: layer.size,
        media_type: layer.media_type.clone(),
        diff_id: layer.diff_id.clone(),
    });
    Ok(PullPlan {
        reference: image.reference.whole(),
        registry: image.reference.registry().to_owned(),
        repository: image.reference.repository().to_owned(),
        manifest_digest: image.manifest_digest.clone(),
        media_type: image.media_type.clone(),
        manifest: image.manifest.clone(),
        config_digest: manifest.config().digest().to_string(),
        config: image.config.clone(),
        layers: layers.collect(),
        snapshotter,
    })
}
