//! Makes an image's root file system available: streamed, local, or pulled the ordinary way.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use sluice_blockfs::ImageMount;
use sluice_image::erofs::{self, Form};
use sluice_image::index::LayerIndex;
use sluice_image::merge::{Dropped, Tree};
use sluice_registry::artifact::{ArtifactBlob, ArtifactReader};
use sluice_registry::{Client, Layer, ResolvedImage};
use sluice_store::ImageRecord;
use sluice_stream::first_pull;
use sluice_trace::Phase;

use super::embedded::embedded_index;
use super::reads::Step;
use super::sources::RegistryBlob;
use super::{INDEX_KIND, Image, LAYER_ANNOTATION, Node, TOC_ANNOTATION};
use crate::api::{AcquireRequest, Acquired, Holder, Served};
use crate::daemon::EventSender;
use crate::journal::{Pull, Reason};

/// Layers decoded at once during a first pull: each has two threads of work.
const LAYERS_AT_ONCE: usize = 3;

/// Index blobs of an image, if there are any.
type Indexes = Vec<(ArtifactBlob, ArtifactReader)>;

impl Node {
    /// See the module text. The image stays until `request.holder` releases it or ends.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        request: AcquireRequest,
        events: EventSender,
    ) -> Result<Acquired> {
        let asked = Instant::now();
        let image = self.resolve(&request.reference, &events).await?;
        let resolved = Step::since(Phase::Resolve, asked);
        let pull = Pull::begin(&image.reference.whole());
        let digest = image.manifest_digest.clone();
        let lookup = request.start.as_ref().map(|start| self.look_up(&image, start));
        let turn = Arc::clone(self.lock(&self.preparing).entry(digest.clone()).or_default());
        let _turn = turn.lock().await;
        let fresh = !self.lock(&self.images).contains_key(&digest);
        if fresh {
            self.journal.pulling(&pull);
            let made = self.make(&image, request.stream, &events).await?;
            self.announce(&pull, &made)?;
            self.lock(&self.images).insert(digest.clone(), made);
        }
        let (acquired, layers, steps) = {
            let mut images = self.lock(&self.images);
            let found = images.get_mut(&digest).context("the image was released meanwhile; try again")?;
            found.holders.push(request.holder.clone());
            let acquired = Acquired {
                reference: found.reference.clone(),
                manifest_digest: digest,
                config: found.config.clone(),
                lower_dirs: found.lower_dirs.clone(),
                served: found.served,
                fell_back: found.fell_back.clone(),
            };
            (acquired, found.layers.clone(), found.steps.clone())
        };
        self.count_steps(acquired.served, fresh.then_some(steps.as_slice()), asked);
        if let Some(lookup) = lookup.filter(|_| acquired.served == Served::Streamed) {
            let mut all = vec![resolved];
            all.extend(steps);
            all.push(Step::since(Phase::Pull, asked));
            self.begin_start(lookup, layers, fresh.then_some((asked, all)), &request.holder);
        }
        self.keep();
        self.watch_holder(&request.holder)?;
        if events.is_closed() {
            self.release(&request.holder).await?;
        }
        Ok(acquired)
    }

    fn count_steps(&self, served: Served, steps: Option<&[Step]>, asked: Instant) {
        let metrics = &self.reads.metrics;
        metrics.pulled(served, asked.elapsed());
        let mounted = steps.into_iter().flatten().find(|step| step.phase == Phase::Mount);
        mounted.into_iter().for_each(|step| metrics.mount.observe(step.took));
    }

    /// Releases what a process holds when it ends, however it ends.
    pub(super) fn watch_holder(self: &Arc<Self>, holder: &Holder) -> Result<()> {
        let Holder::Process(pid) = holder else { return Ok(()) };
        let pid = i32::try_from(*pid).context("not a process")?;
        let pidfd = sluice_kernel::process::pidfd_open(nix::unistd::Pid::from_raw(pid))
            .with_context(|| format!("process {pid}, which asked for the image, is gone"))?;
        let (node, holder) = (Arc::clone(self), holder.clone());
        tokio::spawn(async move {
            let waited = tokio::task::spawn_blocking(move || {
                let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                while nix::poll::poll(&mut ended, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
            });
            if let Err(error) = waited.await {
                tracing::warn!(%error, "cannot wait for a process");
            }
            if let Err(error) = node.release(&holder).await {
                tracing::warn!(error = format!("{error:#}"), "cannot release an image");
            }
        });
        Ok(())
    }

    /// What a reference names: as the registry says, or as this node knows it when the registry is away.
    pub(super) async fn resolve(&self, reference: &str, events: &EventSender) -> Result<ResolvedImage> {
        let parsed = Client::parse(reference)?;
        let known = self.find_record(reference)?;
        if let Some(record) = &known
            && parsed.digest() == Some(&record.manifest_digest)
        {
            return resolved(&parsed, record);
        }
        match (self.registry.resolve(&parsed).await, known) {
            (Ok(image), _) => Ok(image),
            (Err(error), Some(record)) if error.is_transient() => {
                events.note(format!("{error}; the image of this name that is on this node is used"));
                resolved(&parsed, &record)
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    /// The record of an image by reference or digest.
    pub(super) fn find_record(&self, reference: &str) -> Result<Option<ImageRecord>> {
        let whole = Client::parse(reference).map(|parsed| parsed.whole()).unwrap_or_default();
        let named = |image: &ImageRecord| {
            image.manifest_digest == reference
                || whole.ends_with(&image.manifest_digest)
                || image.references.contains(&whole)
        };
        Ok(self.store.images()?.into_iter().filter(named).max_by_key(|image| image.last_used))
    }

    pub(super) async fn make(
        self: &Arc<Self>,
        image: &ResolvedImage,
        stream: bool,
        events: &EventSender,
    ) -> Result<Image> {
        let why_not = match (self.refuses(&image.reference.whole()), stream) {
            (_, false) => None,
            (Some(reason), true) => Some(reason),
            (None, true) => match self.make_mounted(image, events).await {
                Ok(made) => return Ok(made),
                Err(error) => Some(format!("{error:#}")),
            },
        };
        if let Some(reason) = &why_not {
            crate::metrics::count(&self.reads.metrics.fell_back);
            events
                .note(format!("{} is not streamed: {reason}; pulling it the ordinary way", image.reference));
            self.journal.emit(Reason::StreamingFellBack, &image.reference.whole(), reason.clone());
        }
        let lower_dirs = self.pull_ordinary(image, events).await?;
        self.record(image, Vec::new())?;
        Ok(Image {
            reference: image.reference.to_string(),
            served: Served::Unpacked,
            fell_back: why_not,
            lower_dirs,
            mount: None,
            config: String::from_utf8_lossy(&image.config).into_owned(),
            layers: image.layers.iter().map(|layer| layer.digest.clone()).collect(),
            holders: Vec::new(),
            steps: Vec::new(),
        })
    }

    /// The image as one EROFS mount.
    pub(super) async fn make_mounted(
        self: &Arc<Self>,
        image: &ResolvedImage,
        events: &EventSender,
    ) -> Result<Image> {
        let began = Instant::now();
        let record = self.prepare(image, events).await?;
        let prepared = Step::since(Phase::Index, began);
        let mut made =
            self.mount_prepared(image, &image.manifest_digest, &record.layers, &record.layer_blocks).await?;
        made.steps.insert(0, prepared);
        Ok(made)
    }

    /// Mounts `layers` of `image` (lowest first, with their blocks), whose merged metadata is in the store as `key`.
    pub(super) async fn mount_prepared(
        self: &Arc<Self>,
        image: &ResolvedImage,
        key: &str,
        digests: &[String],
        layer_blocks: &[u64],
    ) -> Result<Image> {
        let began = Instant::now();
        let mut layers = Vec::new();
        for (digest, blocks) in digests.iter().zip(layer_blocks) {
            let layer =
                self.node_layer(image, digest)?.with_context(|| format!("layer {digest} vanished"))?;
            layers.push((layer, *blocks));
        }
        let metadata = self.store.erofs_path(key)?;
        let dir = self.config.state.join("images").join(key.trim_start_matches("sha256:"));
        let with_content: Vec<_> =
            layers.iter().filter(|(_, blocks)| *blocks > 0).map(|(layer, _)| Arc::clone(layer)).collect();
        let mount = tokio::task::spawn_blocking(move || -> Result<ImageMount> {
            let devices = with_content.iter().map(|layer| layer.device()).collect::<Result<Vec<_>>>()?;
            Ok(ImageMount::mount(&metadata, devices, &dir)?)
        })
        .await??;
        let mounted = Step::since(Phase::Mount, began);
        let local = layers.iter().all(|(layer, _)| layer.layer().is_complete());
        let all: Vec<_> = layers.into_iter().map(|(layer, _)| layer).collect();
        self.fill_in_background(&all);
        Ok(Image {
            reference: image.reference.to_string(),
            served: if local { Served::Local } else { Served::Streamed },
            fell_back: None,
            lower_dirs: vec![mount.dir().to_path_buf()],
            mount: Some(mount),
            config: String::from_utf8_lossy(&image.config).into_owned(),
            layers: digests.to_vec(),
            holders: Vec::new(),
            steps: vec![mounted],
        })
    }

    /// Sees to it that every layer is in the store, at least as a table of contents, and that the image's EROFS metadata
    /// is written.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        image: &ResolvedImage,
        events: &EventSender,
    ) -> Result<ImageRecord> {
        let known =
            self.store.images()?.into_iter().find(|known| known.manifest_digest == image.manifest_digest);
        let metadata = self.store.erofs_path(&image.manifest_digest)?;
        if let Some(known) = known.filter(|known| !known.layer_blocks.is_empty())
            && metadata.exists()
            && known.layers.iter().all(|layer| self.store.layer(layer).is_ok_and(|layer| layer.is_some()))
        {
            return self.record(image, known.layer_blocks);
        }
        let indexes = match self.artifacts.find(image, INDEX_KIND).await {
            Ok(found) => found.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(image = image.reference.to_string(), %error, "cannot look for a stream index");
                Vec::new()
            }
        };
        let total = image.layers.iter().map(|layer| layer.size).sum();
        let done = std::sync::atomic::AtomicU64::new(0);
        let progress = |bytes: u64| {
            let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
            events.progress(before + bytes, total);
        };
        let mut pulled: Vec<(String, LayerIndex)> = Vec::new();
        let mut distinct: Vec<&Layer> = Vec::new();
        for layer in &image.layers {
            if !distinct.iter().any(|one| one.digest == layer.digest) {
                distinct.push(layer);
            }
        }
        let at_once = if indexes.is_empty() { LAYERS_AT_ONCE } else { image.layers.len().max(1) };
        let mut preparations = Vec::new();
        for layer in distinct {
            preparations.push(self.prepare_layer(image, layer, &indexes, events, &progress).boxed());
        }
        let mut work = futures::stream::iter(preparations).buffer_unordered(at_once);
        while let Some(done) = work.try_next().await? {
            pulled.extend(done);
        }
        drop(work);
        let (blocks, dropped) = self.write_metadata(image).await?;
        for note in dropped.notes() {
            events.note(note);
        }
        self.publish_later(image, pulled);
        self.record(image, blocks)
    }

    /// One layer: from its index, or by a first pull, whose index is returned.
    async fn prepare_layer(
        &self,
        image: &ResolvedImage,
        layer: &Layer,
        indexes: &Indexes,
        events: &EventSender,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<(String, LayerIndex)>> {
        if self.store.layer(&layer.digest)?.is_some() {
            progress(layer.size);
            return Ok(None);
        }
        let of_layer = |blob: &ArtifactBlob| blob.annotations.get(LAYER_ANNOTATION) == Some(&layer.digest);
        if let Some((blob, reader)) = indexes.iter().find(|(blob, _)| of_layer(blob)) {
            match read_index(layer, blob, reader).await {
                Ok(index) => {
                    if !index.random_access() {
                        tracing::info!(
                            layer = layer.digest,
                            "no random access: the layer is streamed in order"
                        );
                    }
                    let store = self.store.clone();
                    tokio::task::spawn_blocking(move || store.add_layer(&index)).await??;
                    progress(layer.size);
                    return Ok(None);
                }
                Err(error) => {
                    events.note(format!("the index of layer {} is not used: {error:#}", layer.digest));
                    tracing::warn!(layer = layer.digest, error = format!("{error:#}"), "index refused");
                }
            }
        }
        if let Some(reason) = unsupported(&layer.media_type) {
            bail!("layer {}: {reason}", layer.digest);
        }
        match embedded_index(&self.registry, image, layer).await {
            Ok(Some(index)) => {
                let store = self.store.clone();
                tokio::task::spawn_blocking(move || store.add_layer(&index)).await??;
                progress(layer.size);
                return Ok(None);
            }
            Ok(None) => {}
            Err(error) => {
                events.note(format!("layer {}'s own table of contents is not used: {error:#}", layer.digest));
                tracing::warn!(layer = layer.digest, error = format!("{error:#}"), "embedded table refused");
            }
        }
        let blob = Arc::new(RegistryBlob(self.registry.blob(&image.reference, &layer.digest, layer.size)));
        let pull = first_pull(
            &self.store,
            &self.scheduler,
            blob,
            (&layer.digest, &layer.diff_id),
            self.config.outage_timeout,
            progress,
        )
        .await?;
        Ok(Some((layer.digest.clone(), pull.index)))
    }

    /// Merges the layers' tables of contents and writes the image's EROFS metadata; blocks of each layer's file, and what
    /// the layers have that the image cannot.
    pub(super) async fn write_metadata(&self, image: &ResolvedImage) -> Result<(Vec<u64>, Dropped)> {
        let (store, layers) = (self.store.clone(), image.layers.clone());
        let target = self.store.erofs_path(&image.manifest_digest)?;
        tokio::task::spawn_blocking(move || -> Result<(Vec<u64>, Dropped)> {
            let mut tree = Tree::new();
            let mut blocks = Vec::new();
            for layer in &layers {
                let stored = store
                    .layer(&layer.digest)?
                    .with_context(|| format!("layer {} vanished", layer.digest))?;
                let index = LayerIndex::from_blob(std::fs::read(stored.index_path())?)
                    .with_context(|| format!("index of layer {}", layer.digest))?;
                tree.apply::<anyhow::Error>(index.entries()?.map(|entry| entry.map_err(Into::into)))
                    .with_context(|| format!("layer {}", layer.digest))?;
                blocks.push(stored.size() / sluice_image::records::BLOCK_SIZE);
            }
            let mut file = std::io::BufWriter::new(tempfile_in(&store.temporary())?);
            erofs::write(&tree, &blocks, Form::Devices, &mut file)?;
            let file = file.into_inner().map_err(|error| anyhow!("cannot write the EROFS image: {error}"))?;
            file.as_file().sync_data()?;
            file.persist(&target).with_context(|| format!("cannot write {}", target.display()))?;
            Ok((blocks, tree.dropped()))
        })
        .await?
    }

    fn record(&self, image: &ResolvedImage, layer_blocks: Vec<u64>) -> Result<ImageRecord> {
        let known =
            self.store.images()?.into_iter().find(|known| known.manifest_digest == image.manifest_digest);
        let mut references = known.map(|known| known.references).unwrap_or_default();
        let name = image.reference.whole();
        references.retain(|one| *one != name);
        references.push(name);
        let record = ImageRecord {
            manifest_digest: image.manifest_digest.clone(),
            references,
            manifest: String::from_utf8_lossy(&image.manifest).into_owned(),
            config: String::from_utf8_lossy(&image.config).into_owned(),
            layers: image.layers.iter().map(|layer| layer.digest.clone()).collect(),
            layer_blocks,
            last_used: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        };
        self.store.put_image(&record)?;
        Ok(record)
    }

    /// Publishes the index that a first pull made, if it made all of it and publishing is allowed.
    fn publish_later(self: &Arc<Self>, image: &ResolvedImage, pulled: Vec<(String, LayerIndex)>) {
        let whole = image.layers.iter().all(|layer| pulled.iter().any(|(digest, _)| *digest == layer.digest));
        if !self.config.publish_index || !whole || pulled.is_empty() {
            return;
        }
        let (node, image) = (Arc::clone(self), image.clone());
        tokio::spawn(async move {
            let blobs = pulled
                .into_iter()
                .map(|(digest, index)| crate::commands::index_blob(&digest, &index))
                .collect();
            match node.artifacts.publish(&image, INDEX_KIND, blobs).await {
                Ok(digest) => {
                    tracing::info!(image = image.reference.to_string(), digest, "stream index published")
                }
                Err(error) => {
                    tracing::info!(image = image.reference.to_string(), %error, "stream index not published")
                }
            }
        });
    }

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

    async fn unpack(&self, image: &ResolvedImage, layer: &Layer, dir: &std::path::Path) -> Result<()> {
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

/// Why a layer of this media type cannot be used.
pub(crate) fn unsupported(media_type: &str) -> Option<String> {
    if media_type.contains("+encrypted") {
        return Some("it is encrypted; decrypt the image in the registry".to_owned());
    }
    let known = media_type.contains("tar") || media_type.contains("rootfs.diff");
    (!known).then(|| format!("its media type {media_type} is not a layer's"))
}

/// Reads and checks a layer's table of contents.
pub(crate) async fn read_index(
    layer: &Layer,
    blob: &ArtifactBlob,
    reader: &ArtifactReader,
) -> Result<LayerIndex> {
    let toc_len: u64 = blob
        .annotations
        .get(TOC_ANNOTATION)
        .and_then(|text| text.parse().ok())
        .filter(|len| *len <= blob.size)
        .with_context(|| format!("its annotation {TOC_ANNOTATION} is missing or wrong"))?;
    let bytes = reader.read_all(0..toc_len).await?;
    let index = LayerIndex::from_blob(bytes.to_vec())?;
    if !index.has_own_tar() {
        bail!("it claims to come from the layer's own table of contents, which only this node may read");
    }
    let header = index.header();
    if header.layer_digest_text() != layer.digest {
        bail!("it is the index of layer {}", header.layer_digest_text());
    }
    if header.diff_id_text() != layer.diff_id || header.layer_size.get() != layer.size {
        bail!("it does not fit the image's configuration");
    }
    Ok(index)
}

fn resolved(reference: &sluice_registry::Reference, record: &ImageRecord) -> Result<ResolvedImage> {
    Ok(ResolvedImage::from_parts(
        reference.clone(),
        record.manifest_digest.clone(),
        Bytes::from(record.manifest.clone()),
        Bytes::from(record.config.clone()),
    )?)
}

fn tempfile_in(dir: &std::path::Path) -> Result<tempfile::NamedTempFile> {
    tempfile::NamedTempFile::new_in(dir).with_context(|| format!("cannot create a file in {}", dir.display()))
}
