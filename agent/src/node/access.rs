//! Whether a repository gives the layers that are on this node already: what one tenant's pull brought is not handed to
//! another's that its registry would refuse.
//!
//! containerd itself asks the registry for the manifest with each pull's own credentials. But a manifest can name any layers:
//! so the repository must also have them, and one byte of each is asked for. What was granted is believed for a while.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use sluice_registry::{Layer, Reference, ResolvedImage};

use super::Node;

/// Layers asked for at once; the registry client bounds its connections besides.
const AT_ONCE: usize = 8;
/// Repositories with a layer each; the oldest answers go.
const MAX_KNOWN: usize = 100_000;

/// When a repository last gave a layer.
pub(super) type Granted = HashMap<(String, String), Instant>;

impl Node {
    /// Fails if the image's repository does not give one of its layers.
    pub(super) async fn check_access(&self, image: &ResolvedImage) -> Result<()> {
        let missing = image.layers.iter().filter(|layer| !self.is_granted(&image.reference, &layer.digest));
        let missing: Vec<Layer> = missing.cloned().collect();
        let checks = missing.into_iter().map(|layer| self.check_layer(&image.reference, layer));
        futures::stream::iter(checks).buffer_unordered(AT_ONCE).try_collect::<()>().await
    }

    /// Whether the repository gave the layer not long ago.
    pub(super) fn is_granted(&self, reference: &Reference, layer: &str) -> bool {
        let granted = self.lock(&self.granted);
        let when = granted.get(&(repository(reference), layer.to_owned()));
        when.is_some_and(|when| when.elapsed() < self.config.access_check)
    }

    async fn check_layer(&self, reference: &Reference, layer: Layer) -> Result<()> {
        let blob = self.registry.blob(reference, &layer.digest, layer.size);
        // The very request that fetching it would begin with: registries answer HEAD in ways of their own.
        let asked = blob.read_all(0..layer.size.min(1), false).await;
        asked.with_context(|| format!("{} does not give layer {}", repository(reference), layer.digest))?;
        let mut granted = self.lock(&self.granted);
        granted.retain(|_, when| when.elapsed() < self.config.access_check);
        if granted.len() >= MAX_KNOWN {
            granted.clear();
        }
        granted.insert((repository(reference), layer.digest), Instant::now());
        Ok(())
    }
}

fn repository(reference: &Reference) -> String {
    format!("{}/{}", reference.registry(), reference.repository())
}
