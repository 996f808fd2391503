//! Makes an image's root file system available: streamed, local, or pulled the ordinary way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use bytes::Bytes;
use sluice_blockfs::ImageMount;
use sluice_image::erofs::Form;
use sluice_kernel::process::{pidfd_open, wait_for_end};
use sluice_registry::artifact::ArtifactStore;
use sluice_registry::{Client, Observer, ResolvedImage, observed};
use sluice_store::ImageRecord;
use sluice_trace::Phase;

use super::ahead::{Lookup, looks_of};
use super::profiles::PROFILE_KIND;
use super::reads::Step;
use super::starts::Started;
use super::{INDEX_KIND, Image, Node};
use crate::api::{AcquireRequest, Acquired, Holder, Served};
use crate::daemon::EventSender;
use crate::journal::{Pull, Reason};

impl Node {
    /// See the module text. The image stays until `request.holder` releases it or ends.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        request: AcquireRequest,
        events: EventSender,
    ) -> Result<Acquired> {
        let asked = Instant::now();
        let looks = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&looks);
        let resolving = self.resolve(&request.reference, &events);
        let observer: Observer = Arc::new(move |began| {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.push((began, began.elapsed()));
        });
        let image = observed(observer, resolving).await?;
        let resolved = Step::since(Phase::Resolve, asked);
        let pull = Pull::begin(&image.reference.whole());
        let digest = image.manifest_digest.clone();
        let mut lookup =
            request.start.as_ref().map(|start| self.look_up(&image, &image.layers, Some(start), asked));
        if let Some(recording) = lookup.as_ref().and_then(|lookup| lookup.recording.as_ref()) {
            let looks = std::mem::take(&mut *self.lock(&looks));
            looks.into_iter().for_each(|(began, took)| recording.looked_up(began, took));
        }
        let _needed = self.need(&image).await;
        let _turn = self.turn(&digest).await;
        let fresh = !self.lock(&self.images).contains_key(&digest);
        if fresh {
            self.journal.pulling(&pull);
            let made = self.make(&image, request.stream, &events, lookup.as_mut()).await?;
            self.announce(&pull, &made)?;
            self.lock(&self.images).insert(digest.clone(), made);
            self.entered_use();
        }
        let (acquired, started) = {
            // Before a `gc` can see the holder.
            self.may_mount(&request.holder);
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
            let steps = if fresh { found.steps.clone() } else { Vec::new() };
            self.count_steps(found.served, &steps, asked);
            let started = Started::new(found, &request.holder, fresh);
            (acquired, started.map(|started| started.asked_at(asked, resolved, steps)))
        };
        if let (Some(lookup), Some(started)) = (lookup, started) {
            self.begin_start(lookup, started).await;
        }
        self.keep();
        self.watch_holder(&request.holder)?;
        if events.is_closed() {
            self.release(&request.holder).await?;
        }
        Ok(acquired)
    }

    /// The mount point of a holder may not be one yet.
    pub(super) fn may_mount(&self, holder: &Holder) {
        if let Holder::MountPoint(dir) = holder {
            self.lock(&self.mounting).insert(dir.clone(), std::time::Instant::now());
        }
    }

    fn count_steps(&self, served: Served, steps: &[Step], asked: Instant) {
        let metrics = &self.reads.metrics;
        metrics.pulled(served, asked.elapsed());
        let mounted = steps.iter().find(|step| step.phase == Phase::Mount);
        mounted.into_iter().for_each(|step| metrics.mount.observe(step.took));
    }

    /// Releases what a process holds when it ends, however it ends.
    pub(super) fn watch_holder(self: &Arc<Self>, holder: &Holder) -> Result<()> {
        let Holder::Process(pid) = holder else { return Ok(()) };
        let pid = i32::try_from(*pid).context("not a process")?;
        let pidfd = pidfd_open(nix::unistd::Pid::from_raw(pid))
            .with_context(|| format!("process {pid}, which asked for the image, is gone"))?;
        let (node, holder) = (Arc::clone(self), holder.clone());
        tokio::spawn(async move {
            let waited = tokio::task::spawn_blocking(move || wait_for_end(&pidfd, None)).await;
            if let Err(error) = waited.map_err(anyhow::Error::from).and_then(|ended| Ok(ended?)) {
                tracing::warn!(error = format!("{error:#}"), "cannot wait for a process");
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
        // Of what is here nothing more is looked for.
        let beside: &[_] = match (&self.artifacts, &known) {
            (ArtifactStore::Referrers(_), None) if self.config.prefetch => &[INDEX_KIND, PROFILE_KIND],
            (ArtifactStore::Referrers(_), None) => &[INDEX_KIND],
            _ => &[],
        };
        match (self.registry.resolve_with(&parsed, beside).await, known) {
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
        ahead: Option<&mut Lookup>,
    ) -> Result<Image> {
        let why_not = match (self.refuses(&image.reference.whole()), stream) {
            (_, false) => None,
            (Some(reason), true) => Some(reason),
            (None, true) => match self.make_mounted(image, events, ahead).await {
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
        ahead: Option<&mut Lookup>,
    ) -> Result<Image> {
        let began = Instant::now();
        let looks = looks_of(ahead.as_ref().and_then(|lookup| lookup.recording.clone()));
        let record = observed(looks, self.prepare(image, events, ahead)).await?;
        let prepared = Step::since(Phase::Index, began);
        let digest = &image.manifest_digest;
        let mut made = self.mount_prepared(image, digest, &record.layers, &record.layer_blocks).await?;
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
        // A place of its own: the last mount of this image may still be on its way out.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let name = format!("{}-{:x}", key.trim_start_matches("sha256:"), now.as_nanos());
        let dir = self.config.state.join("images").join(name);
        let (node, named) = (Arc::clone(self), key.to_owned());
        let all: Vec<_> = layers.iter().map(|(layer, _)| Arc::clone(layer)).collect();
        let with_content: Vec<_> =
            layers.iter().filter(|(_, blocks)| *blocks > 0).map(|(layer, _)| Arc::clone(layer)).collect();
        let mount = tokio::task::spawn_blocking(move || -> Result<ImageMount> {
            if node.form == Form::OneDevice {
                return Ok(ImageMount::mount(&node.serve_whole(&named, &all)?, Vec::new(), &dir)?);
            }
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
}

fn resolved(reference: &sluice_registry::Reference, record: &ImageRecord) -> Result<ResolvedImage> {
    Ok(ResolvedImage::from_parts(
        reference.clone(),
        record.manifest_digest.clone(),
        Bytes::from(record.manifest.clone()),
        Bytes::from(record.config.clone()),
    )?)
}
