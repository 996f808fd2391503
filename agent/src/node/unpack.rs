//! The ordinary pull: every layer downloaded, verified and unpacked to a directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use sluice_containerd::chain_ids;
use sluice_registry::{Layer, ResolvedImage};

use super::Node;
use super::prepare::unsupported;
use crate::daemon::EventSender;

impl Node {
    /// Every layer downloaded, verified and unpacked; the directories, topmost first. What a layer unpacks to depends on those below
    /// it, so there is one directory for each chain of layers.
    pub(super) async fn pull_ordinary(
        &self,
        image: &ResolvedImage,
        events: &EventSender,
    ) -> Result<Vec<PathBuf>> {
        let total = image.layers.iter().map(|layer| layer.size).sum();
        let mut done = 0;
        let mut dirs: Vec<PathBuf> = Vec::new();
        let chain = chain_ids(image.layers.iter().map(|layer| layer.diff_id.as_str()));
        for (layer, chain) in image.layers.iter().zip(chain) {
            let dir = self.store.unpacked_path(&layer.digest)?.join(chain.trim_start_matches("sha256:"));
            // Another image may have it, too. A layer's own turn is its judgement's, which waits for images.
            let _turn = self.turn(&format!("unpacked {chain}")).await;
            if !dir.exists() {
                let unpacked = self.unpack(image, layer, &dirs, &dir).await;
                unpacked.with_context(|| format!("layer {}", layer.digest))?;
            }
            done += layer.size;
            events.progress(done, total);
            dirs.insert(0, dir);
        }
        Ok(dirs)
    }

    async fn unpack(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        below: &[PathBuf],
        dir: &Path,
    ) -> Result<()> {
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("{reason}");
        }
        let blob = self.registry.blob(&image.reference, &layer.digest, layer.size);
        let mut body = blob.read(0..layer.size, false);
        let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(32);
        let (temporary, target) = (self.store.temporary(), dir.to_path_buf());
        let (digest, diff_id, below) = (layer.digest.clone(), layer.diff_id.clone(), below.to_vec());
        let unpacking = tokio::task::spawn_blocking(move || -> Result<()> {
            // Of its own for each attempt: what a failed one left goes with it.
            let staged = tempfile::tempdir_in(&temporary)
                .with_context(|| format!("cannot create a directory in {}", temporary.display()))?;
            let reader = ChannelReader { receiver, piece: Bytes::new() };
            sluice_container::unpack::unpack_layer(reader, staged.path(), &below, &digest, &diff_id)?;
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let moved = std::fs::rename(staged.path(), &target);
            moved.with_context(|| format!("cannot move {}", staged.path().display()))?;
            // Nothing is left to be removed.
            let _moved_away = staged.keep();
            Ok(())
        });
        while let Some(piece) = body.next().await {
            if sender.send(piece.map_err(std::io::Error::other)).await.is_err() {
                break; // The unpacking failed and says why.
            }
        }
        drop(sender);
        unpacking.await?
    }
}

/// A channel of pieces as a reader.
struct ChannelReader {
    receiver: tokio::sync::mpsc::Receiver<std::io::Result<Bytes>>,
    piece: Bytes,
}

impl std::io::Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.piece.len());
        let now = self.piece.split_to(len);
        if let Some(target) = buffer.get_mut(..len) {
            target.copy_from_slice(&now);
        }
        Ok(len)
    }
}
