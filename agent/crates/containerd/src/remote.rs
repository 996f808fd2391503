//! Layers that need not be downloaded: what containerd's labels say of them, and what the node does about them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::usage::Usage;

/// Labels that containerd's CRI plugin and image handlers put on snapshots (containerd 1.5 and later, with
/// `disable_snapshot_annotations = false`), and that `sluice ctr-pull` puts there itself.
pub mod labels {
    /// Chain id of the snapshot that the caller wants to have in the end.
    pub const TARGET: &str = "containerd.io/snapshot.ref";
    /// The image's reference, as asked.
    pub const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
    /// Digest of the manifest of this platform.
    pub const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
    /// Digest of the layer.
    pub const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
    /// Labels with this prefix go from a layer to its snapshot.
    pub const INHERITED_PREFIX: &str = "containerd.io/snapshot/";
}

/// A layer of an image in a registry, with all layers below it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteLayer {
    /// Reference of the image.
    pub image: String,
    /// Digest of its manifest, of this platform.
    pub manifest_digest: String,
    /// Digest of the layer.
    pub layer_digest: String,
    /// Chain id of this layer and all below it (OCI image specification).
    pub chain_id: String,
}

impl RemoteLayer {
    /// What the labels of a `Prepare` say, if they say everything.
    pub(crate) fn from_labels(labels: &BTreeMap<String, String>) -> Option<Self> {
        let get = |key: &str| labels.get(key).filter(|value| !value.is_empty()).cloned();
        Some(Self {
            image: get(labels::IMAGE)?,
            manifest_digest: get(labels::MANIFEST)?,
            layer_digest: get(labels::LAYER)?,
            chain_id: get(labels::TARGET)?,
        })
    }
}

/// Why something is not to be had, in words for the user.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// The node, as the snapshotter knows it: images come as mounted directories.
#[tonic::async_trait]
pub trait ImageMounts: Debug + Send + Sync + 'static {
    /// Makes ready what is needed to stream the image of `layer`. `Ok`: its layers up to this one need not be downloaded.
    async fn offer(&self, layer: &RemoteLayer) -> Result<(), Refusal>;

    /// Lower directories, topmost first, of the file system of all layers up to `layer`. They stay until `holder` is
    /// released; the same holder may ask again, and must after a restart of the node's agent.
    async fn acquire(&self, layer: &RemoteLayer, holder: &str) -> Result<Vec<PathBuf>, Refusal>;

    /// Gives back what `holder` has; nothing to do if it has nothing.
    async fn release(&self, holder: &str);

    /// No snapshot of the image with this manifest is left.
    async fn forget(&self, manifest_digest: &str);

    /// Disk space of the layer itself, as far as it is on this node now.
    async fn usage(&self, layer: &RemoteLayer) -> Usage;
}
