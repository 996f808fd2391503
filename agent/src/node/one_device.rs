//! An image as one block device, for kernels whose EROFS knows no second one (before 5.16).
//!
//! A block file holds what [`Form::OneDevice`] describes: the metadata, then the layers' files one after another. It is served as
//! long as the image is in use, from local data once that is here: there is no hand-over, since no one file holds it all.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use sluice_blockfs::{BlockSource, Device, ReadError};
use sluice_image::erofs::Form;

use super::Node;
use super::layers::NodeLayer;
use super::sources::LayerBlocks;

/// How often a device is asked whether its last user is gone.
const INTERVAL: Duration = Duration::from_millis(200);

/// Metadata and layers, one after another.
#[derive(Debug)]
struct ImageBlocks {
    parts: Vec<Part>,
    size: u64,
}

#[derive(Debug)]
struct Part {
    start: u64,
    len: u64,
    bytes: PartBytes,
}

#[derive(Debug)]
enum PartBytes {
    Local(File),
    Streamed(Arc<LayerBlocks>),
}

impl ImageBlocks {
    fn push(&mut self, len: u64, bytes: PartBytes) {
        self.parts.push(Part { start: self.size, len, bytes });
        self.size += len;
    }

    /// The parts that hold `len` bytes from `offset`, each with the bytes of it that are meant.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = (&Part, Range<u64>)> {
        let end = offset.saturating_add(len as u64);
        self.parts.iter().filter_map(move |part| {
            let range = offset.max(part.start)..end.min(part.start + part.len);
            (range.start < range.end).then(|| (part, range.start - part.start..range.end - part.start))
        })
    }
}

impl BlockSource for ImageBlocks {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, mut buffer: &mut [u8]) -> std::io::Result<bool> {
        for (part, range) in self.pieces(offset, buffer.len()) {
            let len = (range.end - range.start) as usize;
            let Some((piece, rest)) = std::mem::take(&mut buffer).split_at_mut_checked(len) else {
                return Ok(false);
            };
            buffer = rest;
            match &part.bytes {
                PartBytes::Local(file) => file.read_exact_at(piece, range.start)?,
                PartBytes::Streamed(layer) if layer.try_read(range.start, piece)? => {}
                PartBytes::Streamed(_) => return Ok(false),
            }
        }
        Ok(buffer.is_empty())
    }

    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>> {
        async move {
            let mut whole = BytesMut::with_capacity(len);
            for (part, range) in self.pieces(offset, len) {
                let mut at = range.start;
                while at < range.end {
                    let left = (range.end - at) as usize;
                    let piece = match &part.bytes {
                        PartBytes::Local(file) => {
                            let mut piece = vec![0; left];
                            let read = file.read_exact_at(&mut piece, at);
                            read.map(|()| piece.into()).map_err(|error| ReadError {
                                errno: libc::EIO,
                                message: format!("cannot read the layer store: {error}"),
                            })?
                        }
                        PartBytes::Streamed(layer) => Arc::clone(layer).read(at, left).await?,
                    };
                    if piece.is_empty() {
                        return Err(ReadError {
                            errno: libc::EIO,
                            message: "a layer gave nothing".to_owned(),
                        });
                    }
                    at += piece.len() as u64;
                    whole.extend_from_slice(&piece);
                }
            }
            Ok(whole.freeze())
        }
        .boxed()
    }
}

impl Node {
    /// The block file of a whole image, whose metadata is in the store as `key`. Blocks the thread.
    pub(super) fn serve_whole(self: &Arc<Self>, key: &str, layers: &[Arc<NodeLayer>]) -> Result<PathBuf> {
        let mut whole = self.lock(&self.whole_images);
        if let Some(path) = whole.get(key) {
            return Ok(path.clone());
        }
        let blocks = Arc::new(self.whole(key, layers)?);
        let blockfs = self.lock(&self.blockfs);
        let blockfs = blockfs.as_ref().context("no block files are served here")?;
        let paths = blockfs.add(key.trim_start_matches("sha256:"), blocks)?;
        let path = paths.into_iter().next().context("no block file")?;
        whole.insert(key.to_owned(), path.clone());
        Ok(path)
    }

    /// Something of a layer was lost: the block files of whole images that have it do not read its file any more.
    pub(super) fn serve_whole_again(self: &Arc<Self>, layer: &str) -> Result<()> {
        let has_it = |image: &super::Image| image.layers.iter().any(|one| one == layer);
        let images = self.lock(&self.images);
        let images = images.iter().filter(|(_, image)| has_it(image));
        let images: Vec<_> = images.map(|(key, image)| (key.clone(), image.layers.clone())).collect();
        for (key, layers) in images {
            let Some(path) = self.lock(&self.whole_images).get(&key).cloned() else { continue };
            let layer = |digest: &String| {
                let image = self.image_with(digest)?.context("no image has one of its layers")?;
                self.node_layer(&image, digest)?.context("the store lacks one of its layers")
            };
            let layers = layers.iter().map(layer).collect::<Result<Vec<_>>>()?;
            let blocks = Arc::new(self.whole(&key, &layers)?);
            let blockfs = self.lock(&self.blockfs);
            blockfs.as_ref().map_or(Ok(()), |blockfs| blockfs.add_again(&path, blocks))?;
        }
        Ok(())
    }

    fn whole(self: &Arc<Self>, key: &str, layers: &[Arc<NodeLayer>]) -> Result<ImageBlocks> {
        let metadata = self.store.erofs_path(key)?;
        let metadata =
            File::open(&metadata).with_context(|| format!("cannot open {}", metadata.display()))?;
        let mut blocks = ImageBlocks { parts: Vec::new(), size: 0 };
        blocks.push(metadata.metadata()?.len(), PartBytes::Local(metadata));
        for layer in layers {
            let bytes = match layer.source() {
                Some(source) => PartBytes::Streamed(Arc::new(LayerBlocks::new(Arc::clone(source), self)?)),
                None => PartBytes::Local(layer.layer().open_data()?),
            };
            blocks.push(layer.size(), bytes);
        }
        Ok(blocks)
    }

    /// Stops serving an image's block file once nothing reads it any more: containers may outlive who held the image.
    pub(super) fn stop_serving_whole(self: &Arc<Self>, key: &str) {
        let Some(path) = self.lock(&self.whole_images).remove(key) else { return };
        let node = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let Some(node) = node.upgrade() else { return };
                let removed = match Device::all_on(&path) {
                    Ok(devices) if !devices.is_empty() => continue,
                    Ok(_) => {
                        node.lock(&node.blockfs).as_ref().map_or(Ok(()), |blockfs| blockfs.remove(&path))
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = removed {
                    tracing::warn!(%error, path = %path.display(), "a block file stays");
                }
                return;
            }
        });
    }
}

/// Whether metadata of a known image fits how this kernel mounts: a store may have come from another kernel.
pub(super) fn fits(form: Form, metadata: &std::path::Path, layer_blocks: &[u64]) -> Result<bool> {
    let several = sluice_image::erofs::has_devices(&File::open(metadata)?)?;
    Ok(several == (form == Form::Devices && layer_blocks.iter().any(|blocks| *blocks > 0)))
}

#[cfg(test)]
mod tests {
    use sluice_image::records::BLOCK_SIZE;

    use super::*;

    fn file(content: &[u8]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(content, 0).expect("written");
        file
    }

    #[tokio::test]
    async fn reads_cross_parts() {
        let block = BLOCK_SIZE as usize;
        let mut blocks = ImageBlocks { parts: Vec::new(), size: 0 };
        let contents = [vec![1; block], vec![2; 2 * block], vec![3; block]];
        for content in &contents {
            blocks.push(content.len() as u64, PartBytes::Local(file(content)));
        }
        let (whole, blocks) = (contents.concat(), Arc::new(blocks));
        assert_eq!(blocks.size(), whole.len() as u64);
        for (offset, len) in [(0, whole.len()), (block - 1, 2), (block, 2 * block), (3 * block - 512, 1024)] {
            let wanted = &whole[offset..offset + len];
            let mut found = vec![0; len];
            assert!(blocks.try_read(offset as u64, &mut found).expect("read"));
            assert_eq!(found, wanted);
            assert_eq!(Arc::clone(&blocks).read(offset as u64, len).await.expect("read"), wanted);
        }
        assert!(!blocks.try_read(3 * BLOCK_SIZE, &mut vec![0; 2 * block]).expect("beyond the end"));
    }
}
