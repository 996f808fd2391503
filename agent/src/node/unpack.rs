//! The ordinary pull: every layer downloaded, verified and unpacked to a directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use sluice_registry::{Layer, ResolvedImage};

use super::Node;
use super::prepare::unsupported;
use crate::daemon::EventSender;

impl Node {
    /// Every layer downloaded, verified and unpacked; the directories, topmost first.
    pub(super) async fn pull_ordinary(
        &self,
        image: &ResolvedImage,
        events: &EventSender,
    ) -> Result<Vec<PathBuf>> {
        let total = image.layers.iter().map(|layer| layer.size).sum();
        let mut done = 0;
        let mut dirs: Vec<PathBuf> = Vec::new();
        for layer in &image.layers {
            let dir = self.store.unpacked_path(&layer.digest)?;
            // Another image may have it, too. A layer's own turn is its judgement's, which waits for images.
            let _turn = self.turn(&format!("unpacked {}", layer.digest)).await;
            if !dir.exists() {
                self.unpack(image, layer, &dir).await.with_context(|| format!("layer {}", layer.digest))?;
            }
            done += layer.size;
            events.progress(done, total);
            dirs.retain(|other| *other != dir);
            dirs.insert(0, dir);
        }
        Ok(dirs)
    }

    async fn unpack(&self, image: &ResolvedImage, layer: &Layer, dir: &Path) -> Result<()> {
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("{reason}");
        }
        let blob = self.registry.blob(&image.reference, &layer.digest, layer.size);
        let mut body = blob.read(0..layer.size, false);
        let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(32);
        let (temporary, target) = (self.store.temporary(), dir.to_path_buf());
        let (digest, diff_id) = (layer.digest.clone(), layer.diff_id.clone());
        let unpacking = tokio::task::spawn_blocking(move || -> Result<()> {
            let staged = temporary.join(digest.trim_start_matches("sha256:"));
            std::fs::create_dir_all(&staged)?;
            let reader = ChannelReader { receiver, piece: Bytes::new() };
            sluice_container::unpack::unpack_layer(reader, &staged, &digest, &diff_id)?;
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::rename(&staged, &target).with_context(|| format!("cannot move {}", staged.display()))
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
