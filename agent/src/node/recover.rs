//! What an earlier agent left: mounts and loop devices, taken over or cleaned.
//!
//! A mount that a container or a user still has stays alive without its place in the tree, so image mounts are simply
//! taken out of it. Loop devices in use are moved to where their bytes are now: to the local file of a complete layer, or
//! to a file of the new FUSE mount; until then their reads fail.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use sluice_blockfs::{BlockFs, Device, Options};
use sluice_kernel::mount::UnmountOptions;
use sluice_registry::{Client, ResolvedImage};

use super::Node;

impl Node {
    /// Runs before anything is served. Blocks the thread.
    pub(super) fn recover(self: &Arc<Self>, runtime: tokio::runtime::Handle) -> Result<()> {
        let images = self.config.state.join("images");
        let blocks = self.config.state.join("blocks");
        for dir in [&images, &blocks] {
            // A dead FUSE mount answers even `stat` with an error: it goes first.
            unmount_below(dir)?;
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            private(dir)?;
        }
        if self.cannot_stream.is_some() {
            return Ok(());
        }
        let _runtime = runtime.enter();
        *self.lock(&self.blockfs) = Some(BlockFs::mount(&blocks, Options::default(), runtime.clone())?);
        for found in sluice_kernel::loop_device::list()? {
            if let Some(digest) = layer_of(&blocks, &found.backing_file)
                && let Err(error) = self.move_device(found.number, &digest)
            {
                tracing::warn!(
                    device = found.number,
                    layer = digest,
                    error = format!("{error:#}"),
                    "a device of an earlier agent is lost"
                );
            }
        }
        Ok(())
    }

    /// Goes on filling the layers that containers still use.
    pub(super) fn resume_adopted(self: &Arc<Self>) {
        let layers: Vec<_> = self.lock(&self.layers).values().cloned().collect();
        self.fill_in_background(&layers);
    }

    fn move_device(self: &Arc<Self>, number: u32, digest: &str) -> Result<()> {
        let image = self.image_with(digest)?.context("no image has this layer any more")?;
        let layer =
            self.node_layer(&image, digest)?.context("the store does not have this layer any more")?;
        let path = layer.paths().into_iter().next().context("the layer has no file")?;
        Device::adopt(number)?.hand_over(&path)?;
        tracing::info!(device = number, layer = digest, path = %path.display(), "device taken over");
        Ok(())
    }

    fn image_with(&self, layer: &str) -> Result<Option<ResolvedImage>> {
        for record in self.store.images()? {
            if record.layers.iter().any(|one| one == layer)
                && let Some(name) = record.references.last()
            {
                let reference = Client::parse(name)?;
                let (manifest, config) = (record.manifest.clone().into(), record.config.clone().into());
                return Ok(Some(ResolvedImage::from_parts(
                    reference,
                    record.manifest_digest,
                    manifest,
                    config,
                )?));
            }
        }
        Ok(None)
    }
}

/// The layer behind a device whose backing file was in our FUSE mount.
fn layer_of(blocks: &Path, backing: &Path) -> Option<String> {
    // Once its mount is gone the kernel prints the path from the mount's root: the name alone decides then.
    let name = backing.file_name()?.to_str()?;
    let (inode, hex) = name.split_once('-')?;
    let ours = backing.starts_with(blocks) || backing.parent() == Some(Path::new("/"));
    let well_formed =
        inode.parse::<u64>().is_ok() && hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    (ours && well_formed).then(|| format!("sha256:{hex}"))
}

/// Takes everything mounted at or below `dir` out of the tree.
fn unmount_below(dir: &Path) -> Result<()> {
    let mut targets: Vec<_> = sluice_kernel::mounts()?
        .into_iter()
        .map(|mount| mount.target)
        .filter(|target| target.starts_with(dir))
        .collect();
    targets.reverse();
    for target in targets {
        tracing::info!(target = %target.display(), "unmounting what an earlier agent left");
        sluice_kernel::unmount(&target, UnmountOptions { lazy: true, force: false })?;
    }
    Ok(())
}

fn private(dir: &Path) -> Result<()> {
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
        assert_eq!(layer_of(blocks, &Path::new("/").join(&name)), Some(format!("sha256:{hex}")));
        assert_eq!(layer_of(blocks, &Path::new("/elsewhere").join(&name)), None);
        assert_eq!(layer_of(blocks, Path::new("/run/sluice/blocks/x-y")), None);
    }
}
