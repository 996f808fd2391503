//! The node: images in use, their layers, and everything the crates do for them, wired together.

mod acquire;
mod embedded;
mod layers;
mod recover;
mod sources;
mod status;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use sluice_blockfs::{BlockFs, ImageMount};
use sluice_kernel::Abilities;
use sluice_registry::artifact::{ArtifactStore, Kind};
use sluice_registry::{Client, RegistryConfig};
use sluice_store::Store;
use sluice_stream::Scheduler;

use crate::api::{FsckReport, GcReport, Holder, PullReport, Served};
use crate::config::Config;
use crate::daemon::EventSender;
pub(crate) use acquire::{read_index, unsupported};
pub(crate) use embedded::embedded_index;
use layers::NodeLayer;

/// Background fetches under way on a node at once.
const BACKGROUND_FETCHES: usize = 3;

/// Stream indexes as artifacts.
pub(crate) const INDEX_KIND: Kind = Kind {
    artifact_type: sluice_image::index::ARTIFACT_TYPE,
    blob_type: sluice_image::index::BLOB_MEDIA_TYPE,
    name: "index",
};
/// Annotation of an index blob: digest of its layer.
pub(crate) const LAYER_ANNOTATION: &str = "dev.sluice.layer.digest";
/// Annotation of an index blob: bytes of its table of contents.
pub(crate) const TOC_ANNOTATION: &str = "dev.sluice.index.toc-length";

/// See the module text.
#[derive(Debug)]
pub(crate) struct Node {
    config: Arc<Config>,
    /// Why images cannot be streamed here, if so.
    cannot_stream: Option<String>,
    store: Store,
    registry: Client,
    artifacts: ArtifactStore,
    scheduler: Scheduler,
    blockfs: Mutex<Option<BlockFs>>,
    layers: Mutex<HashMap<String, Arc<NodeLayer>>>,
    images: Mutex<HashMap<String, Image>>,
    /// One preparation of an image at a time.
    preparing: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// An image in use.
#[derive(Debug)]
struct Image {
    reference: String,
    served: Served,
    fell_back: Option<String>,
    lower_dirs: Vec<PathBuf>,
    mount: Option<ImageMount>,
    config: String,
    layers: Vec<String>,
    holders: Vec<Holder>,
}

/// A registry client of this configuration.
pub(crate) fn registry_client(config: &Config) -> Result<Client> {
    Ok(Client::new(RegistryConfig {
        hosts_dir: config.hosts_dir.clone(),
        plain_http: config.plain_http.clone(),
        docker_config: config.docker_config.clone(),
        extra_ca: config.extra_ca.clone(),
        connections_per_host: config.connections_per_host,
    })?)
}

/// Where stream indexes are kept: at `url`, in the configured object store, or beside the images.
pub(crate) fn artifact_store(config: &Config, url: Option<&str>, registry: &Client) -> Result<ArtifactStore> {
    match url.or(config.index_store.as_deref()) {
        Some(url) => Ok(ArtifactStore::objects(url, std::env::vars())?),
        None => Ok(ArtifactStore::Referrers(registry.clone())),
    }
}

impl Node {
    /// Opens the store, mounts FUSE, and takes over or cleans what an earlier agent left.
    pub(crate) async fn start(config: Arc<Config>) -> Result<Arc<Self>> {
        for dir in [&config.root, &config.state] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let registry = registry_client(&config)?;
        let node = Arc::new(Self {
            store: Store::open(&config.root, config.memory_budget_bytes)?,
            artifacts: artifact_store(&config, None, &registry)?,
            registry,
            scheduler: Scheduler::new(BACKGROUND_FETCHES),
            blockfs: Mutex::new(None),
            layers: Mutex::default(),
            images: Mutex::default(),
            preparing: Mutex::default(),
            cannot_stream: cannot_stream(),
            config,
        });
        let starting = Arc::clone(&node);
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || starting.recover(runtime)).await??;
        node.resume_adopted();
        Ok(node)
    }

    /// Gives an image back; the last holder's leave unmounts it.
    pub(crate) async fn release(self: &Arc<Self>, holder: &Holder) -> Result<()> {
        let mut unused = Vec::new();
        self.lock(&self.images).retain(|digest, image| {
            image.holders.retain(|one| one != holder);
            if image.holders.is_empty() {
                unused.extend(image.mount.take().map(|mount| (digest.clone(), mount)));
                return false;
            }
            true
        });
        tokio::task::spawn_blocking(move || {
            for (digest, mount) in unused {
                if let Err(error) = mount.unmount() {
                    tracing::warn!(%digest, %error, "cannot unmount");
                }
            }
        })
        .await
        .context("unmounting was cut short")
    }

    /// Brings all of an image here, and waits for it.
    pub(crate) async fn pull(self: &Arc<Self>, reference: &str, events: EventSender) -> Result<PullReport> {
        let image = self.resolve(reference, &events).await?;
        let record = self.prepare(&image, &events).await?;
        let mut total = 0;
        for digest in &record.layers {
            if let Some(layer) = self.node_layer(&image, digest)? {
                layer.fill(&events).await?;
                total += layer.size();
            }
        }
        Ok(PullReport {
            reference: image.reference.to_string(),
            manifest_digest: image.manifest_digest,
            bytes_local: total,
        })
    }

    /// Forgets an image that nobody holds.
    pub(crate) async fn remove(&self, reference: &str) -> Result<()> {
        let record =
            self.find_record(reference)?.with_context(|| format!("there is no image `{reference}` here"))?;
        if self.lock(&self.images).contains_key(&record.manifest_digest) {
            bail!("{reference} is in use; stop its containers and unmount it first");
        }
        self.store.remove_image(&record.manifest_digest)?;
        self.gc().await.map(|_| ())
    }

    /// Frees what no image needs.
    pub(crate) async fn gc(&self) -> Result<GcReport> {
        let records = self.store.images()?;
        let in_use: Vec<String> =
            self.lock(&self.images).values().flat_map(|image| image.layers.clone()).collect();
        let wanted = |digest: &str| {
            in_use.iter().any(|one| one == digest)
                || records.iter().any(|image| image.layers.iter().any(|one| one == digest))
        };
        // A container that outlived its holder may still read a layer through its device.
        let devices = sluice_kernel::loop_device::list()?;
        let attached = |layer: &NodeLayer| {
            layer.paths().iter().any(|path| devices.iter().any(|one| one.backing_file == *path))
        };
        self.lock(&self.layers).retain(|digest, layer| wanted(digest) || attached(layer));
        let kept: Vec<String> = self.lock(&self.layers).keys().cloned().collect();
        let freed = self.store.gc(&|digest| in_use.iter().chain(&kept).any(|one| one == digest))?;
        Ok(GcReport { layers_removed: freed.layers, bytes_freed: freed.bytes })
    }

    /// Reads everything in the store again.
    pub(crate) async fn fsck(&self) -> Result<FsckReport> {
        let store = self.store.clone();
        let report = tokio::task::spawn_blocking(move || store.fsck()).await??;
        Ok(FsckReport {
            layers: report.layers,
            chunks_checked: report.chunks_checked,
            problems: report.problems,
        })
    }

    /// Makes durable what came, and takes mounts out of the tree. Containers on complete layers go on.
    pub(crate) async fn shut_down(&self) -> Result<()> {
        let layers: Vec<Arc<NodeLayer>> = self.lock(&self.layers).values().cloned().collect();
        for layer in layers {
            layer.stop().await?;
        }
        let images: Vec<Image> = self.lock(&self.images).drain().map(|(_, image)| image).collect();
        let blockfs = self.lock(&self.blockfs).take();
        tokio::task::spawn_blocking(move || {
            for mount in images.into_iter().filter_map(|image| image.mount) {
                if let Err(error) = mount.unmount() {
                    tracing::warn!(%error, "cannot unmount");
                }
            }
            match blockfs {
                Some(blockfs) => blockfs.unmount(),
                None => Ok(()),
            }
        })
        .await??;
        Ok(())
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What this kernel lacks for streaming.
pub(crate) fn cannot_stream() -> Option<String> {
    let abilities = Abilities::probe();
    [
        ("FUSE", &abilities.fuse),
        ("loop devices", &abilities.loop_control),
        ("EROFS with several devices", &abilities.erofs_devices),
    ]
    .into_iter()
    .find(|(_, ability)| !ability.available)
    .map(|(name, ability)| format!("this node has no {name}: {}", ability.reason))
}
