//! The node as containerd's snapshotter knows it: layers offered, images mounted for snapshots and given back.
//!
//! A snapshot may stand on an image's lower layers only (another image shares them and brings its own above): such a part
//! is an EROFS mount of its own, under the chain id of its topmost layer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use oci_spec::image::ImageConfiguration;
use sluice_containerd::{ImageMounts, Refusal, RemoteLayer, Usage, chain_ids};
use sluice_image::erofs::Form;
use sluice_registry::{Client, ResolvedImage};
use tokio::sync::mpsc;

use super::ahead::Lookup;
use super::starts::Started;
use super::{Image, Node};
use crate::api::{Holder, Served};
use crate::daemon::EventSender;
use crate::journal::{Pull, Reason};

/// A node, for the snapshotter.
#[derive(Debug)]
pub(crate) struct NodeImages(pub(crate) Arc<Node>);

/// The layers of an image up to some layer.
struct Part {
    image: ResolvedImage,
    /// The image's manifest digest, or the chain id if it is not the whole.
    key: String,
    /// How many layers.
    layers: usize,
}

#[tonic::async_trait]
impl ImageMounts for NodeImages {
    async fn offer(&self, layer: &RemoteLayer) -> Result<(), Refusal> {
        self.0.offer(layer).await.map_err(|error| refusal(&error))
    }

    async fn acquire(&self, layer: &RemoteLayer, holder: &str) -> Result<Vec<PathBuf>, Refusal> {
        let held = self.0.acquire_part(layer, holder).await;
        held.map_err(|error| refusal(&error))
    }

    async fn release(&self, holder: &str) {
        if let Err(error) = self.0.release(&Holder::Snapshot(holder.to_owned())).await {
            tracing::warn!(holder, error = format!("{error:#}"), "cannot release an image");
        }
    }

    async fn forget(&self, manifest_digest: &str) {
        self.release(&pulled(manifest_digest)).await;
        if let Err(error) = self.0.remove(manifest_digest).await {
            // Somebody else uses it (`sluice run`, say): it stays.
            tracing::info!(manifest = manifest_digest, error = format!("{error:#}"), "the image stays");
        }
    }

    async fn usage(&self, layer: &RemoteLayer) -> Usage {
        let (node, digest) = (Arc::clone(&self.0), layer.layer_digest.clone());
        let measured = tokio::task::spawn_blocking(move || -> Result<Usage> {
            let Some(stored) = node.store.layer(&digest)? else { return Ok(Usage::default()) };
            // All that the layer takes on the disk: its index and what is made of it, too.
            let dir = stored.data_path().with_file_name("");
            Usage::of(&dir).with_context(|| format!("cannot measure {}", dir.display()))
        });
        let measured = measured.await.map_err(anyhow::Error::from).flatten();
        measured.unwrap_or_else(|error| {
            tracing::warn!(layer = layer.layer_digest, error = format!("{error:#}"), "its size is not known");
            Usage::default()
        })
    }
}

fn refusal(error: &anyhow::Error) -> Refusal {
    Refusal(format!("{error:#}"))
}

/// Holds an image from its pull until its last snapshot is gone, so that its containers start at once.
fn pulled(manifest_digest: &str) -> String {
    format!("pulled-{manifest_digest}")
}

impl Node {
    /// Makes the whole image of `layer` ready for streaming, or says why it is to be pulled the ordinary way.
    async fn offer(self: &Arc<Self>, layer: &RemoteLayer) -> Result<()> {
        if self.is_held_for(layer)? {
            return Ok(());
        }
        let holder = Holder::Snapshot(pulled(&layer.manifest_digest));
        let pull = Pull::begin(&layer.image);
        let ready = async {
            if let Some(reason) = self.refuses(&layer.image) {
                bail!("{reason}");
            }
            let events = silent();
            let image = self.resolve_layer(layer, &events).await?;
            part_of(image.clone(), layer)?;
            // Before anything is recorded: lazy reads go to the repository of the last pull.
            self.check_access(&image).await?;
            let _needed = self.need(&image).await;
            let _turn = self.turn(&layer.manifest_digest).await;
            if !self.hold(&layer.manifest_digest, &holder)? {
                self.journal.pulling(&pull);
                let made = self.make_mounted(&image, &events, None).await?;
                self.announce(&pull, &made)?;
                self.put(&layer.manifest_digest, made, &holder);
            }
            Ok(())
        };
        let ready: Result<()> = ready.await;
        if let Err(error) = &ready {
            let reason = format!("{error:#}; containerd pulls it the ordinary way");
            self.journal.emit(Reason::StreamingFellBack, &layer.image, reason);
        }
        ready
    }

    /// Whether the image of `layer` was offered before, by another of its layers, has this one too, and its repository gave it.
    fn is_held_for(&self, layer: &RemoteLayer) -> Result<bool> {
        let holder = Holder::Snapshot(pulled(&layer.manifest_digest));
        let config = {
            let images = self.lock(&self.images);
            let image = images.get(&layer.manifest_digest);
            image.filter(|image| image.holders.contains(&holder)).map(|image| image.config.clone())
        };
        let Some(config) = config else { return Ok(false) };
        let config = ImageConfiguration::from_reader(config.as_bytes())?;
        let chain = chain_ids(config.rootfs().diff_ids().iter().map(String::as_str));
        let given = self.is_granted(&Client::parse(&layer.image)?, &layer.layer_digest);
        Ok(given && chain.contains(&layer.chain_id))
    }

    /// The lower directories of the layers up to `layer`. A container is to start: what cannot be streamed any more is
    /// pulled and unpacked here.
    async fn acquire_part(self: &Arc<Self>, layer: &RemoteLayer, holder: &str) -> Result<Vec<PathBuf>> {
        let events = silent();
        let holder = Holder::Snapshot(holder.to_owned());
        let part = part_of(self.resolve_layer(layer, &events).await?, layer)?;
        // Asked again for a container that was begun before: no start.
        let known = self.holds(&part.key, &holder);
        let asked = Instant::now();
        let mut lookup = (!known).then(|| self.look_up(&part.image, &part.truncated().layers, None, asked));
        let _needed = self.need(&part.image).await;
        let _turn = self.turn(&part.key).await;
        let fresh = !self.hold(&part.key, &holder)?;
        if fresh {
            let made = match self.make_part(&part, &events, lookup.as_mut()).await {
                Ok(made) => made,
                Err(error) => {
                    let reason = format!("{error:#}");
                    self.journal.emit(Reason::StreamingFellBack, &layer.image, reason.clone());
                    self.unpack_part(&part, &reason, &events).await.context(reason)?
                }
            };
            self.put(&part.key, made, &holder);
        }
        let (lower_dirs, started) = {
            let images = self.lock(&self.images);
            let image = images.get(&part.key).context("the image was released meanwhile; try again")?;
            (image.lower_dirs.clone(), Started::new(image, &holder, fresh))
        };
        if let (Some(lookup), Some(started)) = (lookup, started) {
            self.begin_start(lookup, started).await;
        }
        Ok(lower_dirs)
    }

    fn holds(&self, key: &str, holder: &Holder) -> bool {
        self.lock(&self.images).get(key).is_some_and(|image| image.holders.contains(holder))
    }

    async fn make_part(
        self: &Arc<Self>,
        part: &Part,
        events: &EventSender,
        ahead: Option<&mut Lookup>,
    ) -> Result<Image> {
        if let Some(reason) = &self.cannot_stream {
            bail!("{reason}");
        }
        if part.key == part.image.manifest_digest {
            return self.make_mounted(&part.image, events, ahead).await;
        }
        if self.form == Form::OneDevice {
            bail!(
                "parts of an image cannot be mounted on this kernel (EROFS with several devices is Linux 5.16)"
            );
        }
        self.prepare(&part.image, events, ahead).await?;
        let lower = part.truncated();
        let blocks = self.write_metadata(&lower, None).await?.layer_blocks;
        let digests: Vec<String> = lower.layers.iter().map(|layer| layer.digest.clone()).collect();
        let made = self.mount_prepared(&part.image, &part.key, &digests, &blocks).await?;
        // The kernel has it open; no image's record would ever remove it.
        let metadata = self.store.erofs_path(&part.key)?;
        std::fs::remove_file(&metadata).with_context(|| format!("cannot remove {}", metadata.display()))?;
        Ok(made)
    }

    async fn unpack_part(&self, part: &Part, reason: &str, events: &EventSender) -> Result<Image> {
        let lower = part.truncated();
        Ok(Image {
            reference: lower.reference.to_string(),
            served: Served::Unpacked,
            fell_back: Some(reason.to_owned()),
            lower_dirs: self.pull_ordinary(&lower, events).await?,
            mount: None,
            config: String::from_utf8_lossy(&lower.config).into_owned(),
            layers: lower.layers.iter().map(|layer| layer.digest.clone()).collect(),
            holders: Vec::new(),
            steps: Vec::new(),
        })
    }

    /// The image that a layer's labels speak of, pinned to the manifest that containerd resolved.
    async fn resolve_layer(&self, layer: &RemoteLayer, events: &EventSender) -> Result<ResolvedImage> {
        let named = Client::parse(&layer.image)?;
        let pinned = sluice_registry::Reference::with_digest(
            named.registry().to_owned(),
            named.repository().to_owned(),
            layer.manifest_digest.clone(),
        );
        let mut image = self.resolve(&pinned.whole(), events).await?;
        if image.manifest_digest != layer.manifest_digest {
            bail!("{} is not the manifest of an image for this platform", layer.manifest_digest);
        }
        image.reference = named;
        Ok(image)
    }

    pub(super) async fn turn(&self, key: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = Arc::clone(self.lock(&self.preparing).entry(key.to_owned()).or_default());
        turn.lock_owned().await
    }

    /// Adds a holder to an image in use; false if it is not in use.
    fn hold(&self, key: &str, holder: &Holder) -> Result<bool> {
        let mut images = self.lock(&self.images);
        let Some(image) = images.get_mut(key) else { return Ok(false) };
        if !image.holders.contains(holder) {
            image.holders.push(holder.clone());
            drop(images);
            self.keep();
        }
        Ok(true)
    }

    fn put(self: &Arc<Self>, key: &str, mut image: Image, holder: &Holder) {
        image.holders.push(holder.clone());
        self.lock(&self.images).insert(key.to_owned(), image);
        self.entered_use();
        self.keep();
    }

    /// Says that an image is ready, and how it is served.
    pub(super) fn announce(&self, pull: &Pull, made: &Image) -> Result<()> {
        let (mut local, mut total) = (0, 0);
        for digest in &made.layers {
            if let Some(layer) = self.store.layer(digest)? {
                local += layer.local_bytes();
                total += layer.size();
            }
        }
        self.journal.pulled(pull, local, total);
        let image = &pull.image;
        match made.served {
            Served::Streamed => {
                let message = format!("Image {image} is backed by image streaming.");
                self.journal.emit(Reason::ImageStreaming, image, message);
            }
            Served::Local => {
                let message = format!("Image {image} is on this node; nothing is streamed.");
                self.journal.emit(Reason::ImageLocal, image, message);
            }
            Served::Unpacked => {}
        }
        Ok(())
    }
}

impl Part {
    fn truncated(&self) -> ResolvedImage {
        let mut lower = self.image.clone();
        lower.layers.truncate(self.layers);
        lower.manifest_digest.clone_from(&self.key);
        lower
    }
}

/// Finds the layer in its image by its chain id, which speaks for its content and for all below it.
fn part_of(image: ResolvedImage, layer: &RemoteLayer) -> Result<Part> {
    let chain = chain_ids(image.layers.iter().map(|layer| layer.diff_id.as_str()));
    let place = chain.iter().position(|id| *id == layer.chain_id);
    let place = place.ok_or_else(|| {
        anyhow!("{} has no layers with the chain id {}", layer.manifest_digest, layer.chain_id)
    })?;
    let whole = place + 1 == chain.len();
    let key = if whole { image.manifest_digest.clone() } else { layer.chain_id.clone() };
    Ok(Part { image, key, layers: place + 1 })
}

/// For work that nobody at a terminal waits for.
fn silent() -> EventSender {
    EventSender::new(mpsc::channel(1).0)
}
