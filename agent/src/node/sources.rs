//! Adapters: registry blobs and index artifacts as byte sources, streamed layers as block sources.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use sluice_blockfs::{BlockSource, ReadError};
use sluice_registry::artifact::{ArtifactBlob, ArtifactReader, ArtifactStore};
use sluice_registry::{Blob, RegistryError, ResolvedImage};
use sluice_stream::{BlobSource, Lane, SourceError, StreamError, StreamedLayer};
use sluice_trace::Origin;

use super::reads::ReadLog;
use super::{HEADER_ANNOTATION, Node, Trust};

fn source_error(error: &RegistryError) -> SourceError {
    SourceError { message: error.to_string(), transient: error.may_pass() }
}

/// A layer blob in a registry.
#[derive(Debug)]
pub(super) struct RegistryBlob(pub(super) Blob);

impl BlobSource for RegistryBlob {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, range: Range<u64>, lane: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let body = self.0.read(range, lane != Lane::Demand);
        body.map(|piece| piece.map_err(|error| source_error(&error))).boxed()
    }
}

/// A layer's index blob, looked up when a window is first needed.
#[derive(Debug, Clone)]
pub(super) struct IndexBlob {
    pub(super) artifacts: ArtifactStore,
    pub(super) trust: Arc<Trust>,
    pub(super) image: ResolvedImage,
    pub(super) layer: String,
    /// Digest of the header of the index that is in use: windows of another one would not fit.
    pub(super) header: String,
    pub(super) found: Arc<tokio::sync::OnceCell<ArtifactReader>>,
}

impl BlobSource for IndexBlob {
    fn size(&self) -> u64 {
        self.found.get().map_or(0, ArtifactReader::size)
    }

    fn read(&self, range: Range<u64>, _: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let found = Arc::clone(&self.found);
        let this = self.clone();
        let read = async move {
            let reader = found.get_or_try_init(|| this.find()).await?;
            reader.read_all(range).await.map_err(|error| source_error(&error))
        };
        futures::stream::once(read).boxed()
    }
}

impl IndexBlob {
    async fn find(&self) -> Result<ArtifactReader, SourceError> {
        let found = self.trust.find(&self.artifacts, &self.image).await;
        let mut found = found.map_err(|error| source_error(&error))?;
        let fits = |blob: &ArtifactBlob| {
            blob.annotations.get(HEADER_ANNOTATION).is_none_or(|header| *header == self.header)
        };
        let found = found.indexes.remove(&self.layer).filter(|(blob, _)| fits(blob));
        let layer = &self.layer;
        found.map(|(_, reader)| reader).ok_or_else(|| SourceError {
            message: format!("the stream index of layer {layer} is not published any more; publish it again with `sluice index`"),
            transient: true,
        })
    }
}

/// An index blob that is all here, as a first pull left it: nothing needs to be published for it. What is damaged on the disk may be.
#[derive(Debug)]
pub(super) struct LocalIndex {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) published: IndexBlob,
}

impl BlobSource for LocalIndex {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: Range<u64>, lane: Lane) -> BoxStream<'static, Result<Bytes, SourceError>> {
        let (path, published) = (self.path.clone(), self.published.clone());
        let read = async move {
            let wanted = range.clone();
            let local = tokio::task::spawn_blocking(move || read_local(&path, &wanted)).await;
            match local.map_err(std::io::Error::other).flatten() {
                Ok(bytes) => futures::stream::once(std::future::ready(Ok(bytes))).boxed(),
                Err(error) => {
                    tracing::warn!(layer = published.layer, %error, "the layer's own index cannot be read");
                    published.read(range, lane)
                }
            }
        };
        futures::stream::once(read).flatten().boxed()
    }

    fn read_elsewhere(
        &self,
        range: Range<u64>,
        lane: Lane,
    ) -> BoxStream<'static, Result<Bytes, SourceError>> {
        self.published.read(range, lane)
    }
}

fn read_local(path: &Path, range: &Range<u64>) -> std::io::Result<Bytes> {
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(std::io::Error::other)?;
    let mut bytes = vec![0; len];
    File::open(path)?.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

/// A streamed layer as a block file.
#[derive(Debug)]
pub(super) struct LayerBlocks {
    layer: Arc<StreamedLayer>,
    local: Arc<File>,
    /// Told of every read that was answered.
    log: Arc<ReadLog>,
    node: Weak<Node>,
}

impl LayerBlocks {
    pub(super) fn new(layer: Arc<StreamedLayer>, node: &Arc<Node>) -> std::io::Result<Self> {
        let local = Arc::new(layer.layer().open_data()?);
        Ok(Self { layer, local, log: Arc::clone(&node.reads), node: Arc::downgrade(node) })
    }

    async fn read_by_any_way(&self, offset: u64, len: usize) -> Result<Bytes, StreamError> {
        let error = match self.layer.read(offset, len).await {
            Err(error) if error.is_of_the_layer() => error,
            other => return other,
        };
        let Some(node) = self.node.upgrade() else { return Err(error) };
        let Some(whole) = node.come_whole(&self.layer, &error).await else { return Err(error) };
        let mut buffer = vec![0; len];
        match whole.try_read(offset, &mut buffer) {
            Ok(true) => Ok(Bytes::from(buffer)),
            _ => Err(error),
        }
    }
}

impl BlockSource for LayerBlocks {
    fn size(&self) -> u64 {
        self.layer.layer().size()
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<bool> {
        let asked = Instant::now();
        let here = self.layer.try_read(offset, buffer)?;
        if here {
            self.log.served(self.layer.layer().digest(), offset, buffer.len(), asked, Origin::Disk);
        }
        Ok(here)
    }

    fn read(self: Arc<Self>, offset: u64, len: usize) -> BoxFuture<'static, Result<Bytes, ReadError>> {
        async move {
            let asked = Instant::now();
            if let Some(node) = self.node.upgrade() {
                node.misses.tell(self.layer.layer().digest(), offset..offset.saturating_add(len as u64));
            }
            let read = self.read_by_any_way(offset, len).await;
            if read.is_ok() {
                self.log.served(self.layer.layer().digest(), offset, len, asked, Origin::Registry);
            }
            read.inspect_err(|_| self.log.failed())
                .map_err(|error| ReadError { errno: libc::EIO, message: error.to_string() })
        }
        .boxed()
    }

    fn file(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.local))
    }

    fn on_disk(&self, range: Range<u64>) -> Range<u64> {
        // Not what is only written: a failed flush may take that back.
        self.layer.layer().durable_in(range)
    }

    fn unreadable(&self, offset: u64, len: usize) {
        if let Err(error) = self.layer.layer().reread(offset..offset + len as u64) {
            tracing::warn!(offset, size = len, %error, "what is lost of the layer cannot be found out");
        }
    }
}
