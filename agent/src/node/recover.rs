//! Taking over from an earlier agent: its mounts, its devices, its reads that wait.
//!
//! The server of block files outlives agents, so an image in use notices nothing: its files are added again under their old
//! names, its mount and its holders are taken over from what was kept. If the server died as well, reads fail until a new one is
//! mounted and the devices in use are moved to its files (or to the local file of a layer that is complete). They are looked for
//! before the dead mount goes: afterwards their paths no longer tell our files from those of another node's agent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_blockfs::{Device, ImageMount};
use sluice_kernel::loop_device::LoopListing;
use sluice_kernel::mount::UnmountOptions;
use sluice_registry::{Client, ResolvedImage};
use sluice_store::{Store, StoreError};

use super::kept::{self, KeptImage};
use super::{Image, Node, block_server};
use crate::config::Config;

/// How long the last agent may take to write what it has.
const LAST_AGENT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(50);

/// Opens the store; an agent that was told to stop may still have it.
pub(super) async fn open_store(config: &Config) -> Result<Store> {
    let deadline = Instant::now() + LAST_AGENT;
    loop {
        match Store::open_with(&config.root, config.store_limits) {
            Err(StoreError::Locked(_)) if Instant::now() < deadline => {}
            opened => return Ok(opened?),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Node {
    /// Runs before anything is served. Blocks the thread.
    pub(super) fn recover(self: &Arc<Self>, runtime: tokio::runtime::Handle) -> Result<()> {
        self.sweep_containers();
        let images = self.config.state.join("images");
        std::fs::create_dir_all(&images).with_context(|| format!("cannot create {}", images.display()))?;
        private(&images)?;
        if self.cannot_stream.is_some() {
            return unmount_below(&images, &[]);
        }
        let _runtime = runtime.enter();
        let blocks = self.config.state.join("blocks");
        let found = sluice_kernel::loop_device::list()?;
        let (blockfs, started) = block_server::connect(&self.config, &blocks, runtime.clone())?;
        let left = blockfs.left();
        *self.lock(&self.blockfs) = Some(blockfs);
        for name in left {
            // Whoever waits for a byte of it goes on now.
            self.add_again(&name);
        }
        let devices = self.take_devices(&blocks, found, started);
        let adopted = self.adopt_images(&devices);
        unmount_below(&images, &adopted)
    }

    /// Goes on with what the last agent was at.
    pub(super) fn resume_adopted(self: &Arc<Self>) -> Result<()> {
        let holders: Vec<_> =
            self.lock(&self.images).values().flat_map(|image| image.holders.clone()).collect();
        for holder in &holders {
            self.may_mount(holder);
            self.watch_holder(holder)?;
        }
        let layers: Vec<_> = self.lock(&self.layers).values().cloned().collect();
        self.fill_in_background(&layers);
        self.entered_use();
        self.keep();
        Ok(())
    }

    /// Serves the block file of a layer, or of a whole image, again.
    fn add_again(self: &Arc<Self>, name: &str) {
        let added = match self.block_file(&format!("sha256:{name}")) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                tracing::warn!(name, "no image has this any more: reads of it fail");
                let blockfs = self.lock(&self.blockfs);
                blockfs.as_ref().map_or(Ok(()), |blockfs| blockfs.remove_left(name)).map_err(Into::into)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = added {
            tracing::error!(name, error = format!("{error:#}"), "reads of this wait in vain");
        }
    }

    /// The file that a device for a layer, or for a whole image, belongs on; `None`: it is known no more.
    fn block_file(self: &Arc<Self>, digest: &str) -> Result<Option<PathBuf>> {
        if let Some(image) = self.image_with(digest)? {
            let layer = self.node_layer(&image, digest)?;
            return Ok(layer.and_then(|layer| layer.paths().into_iter().next()));
        }
        let Some(record) = self.store.image(digest)? else { return Ok(None) };
        let image = resolved_by_last_name(&record)?;
        let layer = |digest| self.node_layer(&image, digest)?.context("the store lacks one of its layers");
        let layers = record.layers.iter().map(|digest| layer(digest)).collect::<Result<Vec<_>>>()?;
        self.serve_whole(digest, &layers).map(Some)
    }

    /// Sees to it that every device in use is on a file that is there and may be read; devices by their file. Those on block files must be
    /// moved (`started`) if a new server took the place of theirs: its files may have the same paths. Those on the local file of a
    /// layer of which something was lost since must be moved to a block file.
    fn take_devices(
        self: &Arc<Self>,
        blocks: &Path,
        found: Vec<LoopListing>,
        started: bool,
    ) -> HashMap<PathBuf, u32> {
        let mut devices = HashMap::new();
        for found in found {
            let served = layer_of(blocks, &found.backing_file).filter(|_| started);
            let Some(digest) = served.or_else(|| self.damaged_behind(&found.backing_file)) else {
                devices.insert(found.backing_file, found.number);
                continue;
            };
            match self.move_device(found.number, &digest) {
                Ok(path) => {
                    devices.insert(path, found.number);
                }
                Err(error) => tracing::warn!(
                    device = found.number,
                    digest,
                    error = format!("{error:#}"),
                    "a device of an earlier agent is lost"
                ),
            }
        }
        devices
    }

    /// The layer whose local file this is, if it is not complete: the last agent found damage, and did not come to move the device.
    fn damaged_behind(&self, backing: &Path) -> Option<String> {
        let digest = layer_stored(&self.config.root.join("layers"), backing)?;
        let layer = self.store.layer(&digest).ok().flatten()?;
        (!layer.is_complete()).then_some(digest)
    }

    fn move_device(self: &Arc<Self>, number: u32, digest: &str) -> Result<PathBuf> {
        let path = self.block_file(digest)?.context("no image has this any more")?;
        Device::adopt(number)?.hand_over(&path)?;
        tracing::info!(device = number, digest, path = %path.display(), "device moved");
        Ok(path)
    }

    /// Takes over the images that somebody still holds; their mounts.
    fn adopt_images(self: &Arc<Self>, devices: &HashMap<PathBuf, u32>) -> Vec<PathBuf> {
        let kept = kept::read(&self.config.state).unwrap_or_else(|error| {
            tracing::error!(error = format!("{error:#}"), "images in use are not known: their mounts end");
            Vec::new()
        });
        let mut mounts = Vec::new();
        for one in kept {
            let digest = one.manifest_digest.clone();
            match self.adopt_image(one, devices) {
                Ok(Some(image)) => {
                    mounts.extend(image.mount.as_ref().map(|mount| mount.dir().to_path_buf()));
                    self.lock(&self.images).insert(digest, image);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(image = digest, error = format!("{error:#}"), "the image's mount ends");
                }
            }
        }
        mounts
    }

    fn adopt_image(
        self: &Arc<Self>,
        kept: KeptImage,
        devices: &HashMap<PathBuf, u32>,
    ) -> Result<Option<Image>> {
        let holders: Vec<_> = kept.holders.iter().filter_map(kept::KeptHolder::alive).collect();
        if holders.is_empty() {
            return Ok(None);
        }
        // A part of an image, which containerd's snapshots may stand on, has a key of its own.
        let records = self.store.images()?;
        let record = records
            .iter()
            .find(|record| record.manifest_digest == kept.manifest_digest)
            .or_else(|| records.iter().find(|record| record.layers.starts_with(&kept.layers)))
            .context("the store does not know it")?;
        let mount = match &kept.mount {
            Some(dir) if sluice_kernel::mount::is_mount_point(dir)? => {
                let image = resolved_by_last_name(record)?;
                let mut adopted = Vec::new();
                for digest in &kept.layers {
                    let layer = self
                        .node_layer(&image, digest)?
                        .with_context(|| format!("layer {digest} vanished"))?;
                    let number = layer.paths().iter().find_map(|path| devices.get(path).copied());
                    adopted.extend(number.map(|number| layer.adopt_device(number)).transpose()?);
                }
                Some(ImageMount::adopt(dir, adopted))
            }
            Some(dir) => anyhow::bail!("{} is not mounted any more", dir.display()),
            None => None,
        };
        tracing::info!(image = kept.reference, holders = holders.len(), "image taken over");
        Ok(Some(Image {
            reference: kept.reference,
            served: kept.served,
            fell_back: kept.fell_back,
            lower_dirs: kept.lower_dirs,
            mount,
            config: record.config.clone(),
            layers: kept.layers,
            holders,
            steps: Vec::new(),
        }))
    }

    /// Containers whose `sluice run` was killed, and that ended since.
    fn sweep_containers(&self) {
        let gone = |id: &str| {
            let pid = id.strip_prefix("sluice-").and_then(|rest| rest.split('-').next());
            pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        };
        let swept = sluice_container::find_runtime(None).and_then(|runtime| {
            sluice_container::Bundle::sweep(&self.config.root.join("containers"), &runtime, gone)
        });
        match swept {
            Ok(swept) if swept.is_empty() => {}
            Ok(swept) => tracing::info!(?swept, "containers of killed commands were removed"),
            Err(error) => tracing::warn!(%error, "containers of killed commands stay behind"),
        }
    }

    pub(super) fn image_with(&self, layer: &str) -> Result<Option<ResolvedImage>> {
        for record in self.store.images()? {
            if record.layers.iter().any(|one| one == layer) {
                return Ok(Some(resolved_by_last_name(&record)?));
            }
        }
        Ok(None)
    }
}

fn resolved_by_last_name(record: &sluice_store::ImageRecord) -> Result<ResolvedImage> {
    let name = record.references.last().context("the image has no name")?;
    Ok(ResolvedImage::from_parts(
        Client::parse(name)?,
        record.manifest_digest.clone(),
        record.manifest.clone().into(),
        record.config.clone().into(),
    )?)
}

/// The layer behind a device whose backing file was in our FUSE mount.
fn layer_of(blocks: &Path, backing: &Path) -> Option<String> {
    // A mount that is gone from the tree leaves `/NAME`: it may have been anybody's, and names are the same on all nodes.
    let name = backing.strip_prefix(blocks).ok()?.to_str()?;
    let (inode, hex) = name.split_once('-')?;
    (inode.parse::<u64>().is_ok() && is_hex(hex)).then(|| format!("sha256:{hex}"))
}

/// The layer behind a device on a block file that is served, or on a layer's local file.
pub(super) fn layer_behind(blocks: &Path, layers: &Path, backing: &Path) -> Option<String> {
    layer_of(blocks, backing).or_else(|| layer_stored(layers, backing))
}

/// The layer whose local file this is, by its path.
fn layer_stored(layers: &Path, backing: &Path) -> Option<String> {
    let hex = backing.strip_prefix(layers).ok()?.parent()?.to_str()?;
    is_hex(hex).then(|| format!("sha256:{hex}"))
}

fn is_hex(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Takes everything mounted at or below `dir` out of the tree, but for `kept`.
pub(super) fn unmount_below(dir: &Path, kept: &[PathBuf]) -> Result<()> {
    let mut targets: Vec<_> = sluice_kernel::mounts()?
        .into_iter()
        .map(|mount| mount.target)
        .filter(|target| target.starts_with(dir) && !kept.contains(target))
        .collect();
    targets.reverse();
    for target in targets {
        tracing::info!(target = %target.display(), "unmounting what an earlier agent left");
        sluice_kernel::unmount(&target, UnmountOptions { lazy: true, force: false })?;
    }
    Ok(())
}

pub(super) fn private(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot protect {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_their_files_names() {
        let hex = "ab".repeat(32);
        let blocks = Path::new("/run/sluice/blocks");
        let name = format!("7-{hex}");
        assert_eq!(layer_of(blocks, &blocks.join(&name)), Some(format!("sha256:{hex}")));
        assert_eq!(layer_of(blocks, &Path::new("/").join(&name)), None);
        assert_eq!(layer_of(blocks, &Path::new("/elsewhere").join(&name)), None);
        assert_eq!(layer_of(blocks, Path::new("/run/sluice/blocks/x-y")), None);
        let layers = Path::new("/var/lib/sluice/layers");
        for (backing, known) in [
            (layers.join(&hex).join("data"), true),
            (blocks.join(&name), true),
            // Of a mount that is gone, which may have been another node's.
            (Path::new("/").join(&name), false),
            (layers.join("elsewhere").join("data"), false),
            (Path::new("/var/lib/images").join(&hex), false),
        ] {
            let expected = known.then(|| format!("sha256:{hex}"));
            assert_eq!(layer_behind(blocks, layers, &backing), expected, "{}", backing.display());
        }
    }
}
