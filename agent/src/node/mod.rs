//! The node: images in use, their layers, and everything the crates do for them, wired together.

mod access;
mod acquire;
mod ahead;
mod baseline;
mod block_server;
mod embedded;
mod faults;
mod files;
mod guess;
mod kept;
mod keys;
mod known;
mod layers;
mod merging;
mod metadata;
mod one_device;
mod pack;
mod pack_bytes;
mod prepare;
mod probing;
mod profiles;
mod quarantine;
mod reads;
mod recover;
mod room;
mod snapshots;
mod sources;
mod starts;
mod status;
mod switch;
mod trust;
mod unpack;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use sluice_blockfs::{BlockFs, ImageMount};
use sluice_image::erofs::Form;
use sluice_kernel::Abilities;
use sluice_kernel::mount::UnmountOptions;
use sluice_registry::artifact::{ArtifactStore, Kind};
use sluice_registry::{Client, Limits, RegistryConfig};
use sluice_store::Store;
use sluice_stream::Scheduler;

use crate::api::{FsckReport, GcReport, Holder, PullReport, Served};
use crate::config::Config;
use crate::credentials::{self, Learned};
use crate::daemon::EventSender;
use crate::doctor::{self, links::Links};
use crate::journal::Journal;
pub(crate) use block_server::socket as block_socket;
pub(crate) use embedded::embedded_index;
pub(crate) use guess::Guess;
pub(crate) use keys::{SigningKey, generate as generate_key};
use layers::NodeLayer;
pub(crate) use metadata::merge_for_agent;
pub(crate) use prepare::{read_index, unsupported};
pub(crate) use snapshots::NodeImages;
pub(crate) use starts::Over;
pub(crate) use trust::{HEADER_ANNOTATION, Mode, SIGNATURES_ANNOTATION, Trust, header_digest, sign};

/// Background fetches under way on a node at once.
pub(crate) const BACKGROUND_FETCHES: usize = 3;

/// `sluice mount` mounts what it was given within this time, or is gone.
const MOUNTED_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);
/// The end of a mount waits for reads that are under way: as long, and again as long once they fail.
const LAST_READS: std::time::Duration = std::time::Duration::from_secs(2);

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
    /// When this agent began, milliseconds since 1970.
    since_ms: u64,
    /// Why images cannot be streamed here, if so.
    cannot_stream: Option<String>,
    /// How images are attached on this kernel.
    form: Form,
    store: Store,
    registry: Client,
    /// Credentials that the CRI handed over.
    learned: Arc<Learned>,
    granted: Mutex<access::Granted>,
    artifacts: ArtifactStore,
    trust: Arc<Trust>,
    scheduler: Scheduler,
    blockfs: Mutex<Option<BlockFs>>,
    layers: Mutex<HashMap<String, Arc<NodeLayer>>>,
    images: Mutex<HashMap<String, Image>>,
    /// Block files of whole images, by the images' keys: see `one_device`.
    whole_images: Mutex<HashMap<String, PathBuf>>,
    /// One preparation of an image at a time.
    preparing: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// What is made ready at the moment.
    needed: room::Needs,
    /// Held by who removes layers, from finding what nobody needs until it is gone.
    removing: tokio::sync::Mutex<()>,
    /// One writer of what is kept for the next agent.
    keeping: Mutex<()>,
    /// What happened to images.
    pub(crate) journal: Journal,
    /// Whether new images are streamed.
    switch: switch::Switch,
    profiles: profiles::Profiles,
    /// Reads of starts that are being recorded.
    reads: Arc<reads::ReadLog>,
    windows: Mutex<Vec<(Holder, starts::Window)>>,
    /// Starts that the fill leaves the link to, and that are guessed about.
    starting: Mutex<Vec<(Holder, starts::UnderWay)>>,
    /// Who guesses is told of reads that must wait.
    misses: guess::Misses,
    /// Mount points whose image was asked for lately, or taken over: they may not be mounted yet.
    mounting: Mutex<HashMap<PathBuf, Instant>>,
    baselines: baseline::Baselines,
    probing: probing::Probing,
    faults: faults::Reported,
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
    /// How it came to be ready.
    steps: Vec<reads::Step>,
}

/// A registry client of this configuration; `learned` is the daemon's own.
pub(crate) fn registry_client(config: &Config, learned: Option<Arc<Learned>>) -> Result<Client> {
    let limits = Limits { longest_retry_after: config.longest_retry_after, ..Limits::default() };
    let config = RegistryConfig {
        hosts_dir: config.hosts_dir.clone(),
        plain_http: config.plain_http.clone(),
        docker_config: config.docker_config.clone(),
        extra_ca: config.extra_ca.clone(),
        credentials: credentials::source(config, learned)?,
        connections_per_host: config.connections_per_host,
    };
    Ok(Client::with_limits(config, limits)?)
}

/// Where stream indexes are kept: at `url`, in the configured object store, or beside the images.
pub(crate) fn artifact_store(config: &Config, url: Option<&str>, registry: &Client) -> Result<ArtifactStore> {
    match url.or(config.index_store.as_deref()) {
        Some(url) => Ok(ArtifactStore::objects(url, std::env::vars())?),
        None => Ok(ArtifactStore::Referrers(registry.clone())),
    }
}

/// Whose indexes are believed; those at `url` are the caller's own.
pub(crate) fn trust(config: &Config, url: Option<&str>) -> Result<Trust> {
    let own_store = url.or(config.index_store.as_deref()).is_some();
    Trust::open(config.trust, &config.keys, own_store, &config.root)
}

impl Node {
    /// Opens the store, mounts FUSE, and takes over or cleans what an earlier agent left.
    pub(crate) async fn start(config: Arc<Config>) -> Result<Arc<Self>> {
        raise_descriptor_limit();
        for dir in [&config.root, &config.state] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let learned = Arc::new(Learned::open(&config.state));
        let registry = registry_client(&config, Some(Arc::clone(&learned)))?;
        let abilities = Abilities::probe();
        let probed = Arc::clone(&config);
        let links = tokio::task::spawn_blocking(move || Links::probe(&doctor::rooms(&probed))).await?;
        let node = Arc::new(Self {
            store: recover::open_store(&config).await?,
            artifacts: artifact_store(&config, None, &registry)?,
            trust: Arc::new(trust(&config, None)?),
            registry,
            learned,
            granted: Mutex::default(),
            scheduler: Scheduler::with_demand(BACKGROUND_FETCHES, config.memory.transfers),
            blockfs: Mutex::new(None),
            layers: Mutex::default(),
            images: Mutex::default(),
            whole_images: Mutex::default(),
            preparing: Mutex::default(),
            needed: room::Needs::default(),
            removing: tokio::sync::Mutex::default(),
            keeping: Mutex::default(),
            cannot_stream: cannot_stream(&abilities).or_else(|| unsafe_links(&links)),
            form: if config.one_device || !abilities.erofs_devices.available {
                Form::OneDevice
            } else {
                Form::Devices
            },
            journal: Journal::default(),
            switch: switch::Switch::open(&config)?,
            profiles: profiles::Profiles::new(config.root.join("profiles")),
            reads: Arc::default(),
            windows: Mutex::default(),
            starting: Mutex::default(),
            misses: guess::Misses::default(),
            mounting: Mutex::default(),
            baselines: baseline::Baselines::new(config.root.join("baselines")),
            probing: probing::Probing::default(),
            faults: faults::Reported::new(links.has_fault()),
            since_ms: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
            config,
        });
        let starting = Arc::clone(&node);
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || starting.recover(runtime)).await??;
        // To load them takes a processor for a while, and those whose reads wait come first.
        if node.config.probes {
            let watched = Arc::downgrade(&node);
            std::thread::Builder::new()
                .name("probes".to_owned())
                .spawn(move || probing::watch(&watched))
                .context("cannot start a thread")?;
        }
        node.scheduler.watch(Arc::clone(&node.reads) as Arc<dyn sluice_stream::Watcher>);
        node.resume_adopted()?;
        node.keep_room();
        node.keep_flushing();
        Ok(node)
    }

    /// Credentials that the CRI handed over.
    pub(crate) fn learned(&self) -> &Arc<Learned> {
        &self.learned
    }

    /// Ready when the server of block files died: reads of what is not local fail until another agent starts one.
    pub(crate) async fn server_lost(&self) {
        let lost = self.lock(&self.blockfs).as_ref().map(BlockFs::lost);
        match lost {
            Some(lost) => lost.await,
            None => std::future::pending().await,
        }
    }

    /// Gives an image back; the last holder's leave unmounts it.
    pub(crate) async fn release(self: &Arc<Self>, holder: &Holder) -> Result<()> {
        let (node, ended) = (Arc::clone(self), holder.clone());
        tokio::spawn(async move { node.end_start(&ended, starts::Over::Ended).await });
        let (node, holder) = (Arc::clone(self), holder.clone());
        tokio::task::spawn_blocking(move || {
            let mut ended = Vec::new();
            node.lock(&node.images).retain(|digest, image| {
                let held = image.holders.len();
                image.holders.retain(|one| *one != holder);
                if image.holders.len() == held {
                    // Not this one's: it may have none yet.
                    return true;
                }
                if let Err(error) = node.store.touch_image(digest) {
                    tracing::warn!(%digest, %error, "its last use is not recorded");
                }
                if !image.holders.is_empty() {
                    return true;
                }
                node.stop_serving_whole(digest);
                ended.extend(image.mount.take());
                false
            });
            node.keep();
            // This waits for reads that are under way, which may need all else of the node.
            for mount in ended {
                if let Err(error) = mount.unmount() {
                    tracing::warn!(%error, "cannot unmount");
                }
            }
        })
        .await
        .context("unmounting was cut short")
    }

    /// Brings all of an image here, and waits for it.
    pub(crate) async fn pull(self: &Arc<Self>, reference: &str, events: EventSender) -> Result<PullReport> {
        let image = self.resolve(reference, &events).await?;
        let _needed = self.need(&image).await;
        let record = self.prepare(&image, &events, None).await?;
        let mut total = 0;
        for digest in &record.layers {
            if let Some(layer) = self.node_layer(&image, digest)? {
                layer.fill(self, &events).await?;
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
    pub(crate) async fn remove(self: &Arc<Self>, reference: &str) -> Result<()> {
        let record =
            self.find_record(reference)?.with_context(|| format!("there is no image `{reference}` here"))?;
        let removing = self.removing.lock().await;
        if self.needed.has(&record.manifest_digest) {
            bail!("{reference} is being made ready for somebody; try again");
        }
        if self.lock(&self.images).contains_key(&record.manifest_digest) {
            bail!("{reference} is in use; stop its containers and unmount it first");
        }
        self.store.remove_image(&record.manifest_digest)?;
        drop(removing);
        self.gc().await.map(|_| ())
    }

    /// Frees what no image needs.
    pub(crate) async fn gc(self: &Arc<Self>) -> Result<GcReport> {
        for holder in self.unmounted_holders() {
            // A release may take long, and the next one may hold something again.
            if self.unmounted_holders().contains(&holder) {
                self.release(&holder).await?;
            }
        }
        self.settle().await?;
        let _removing = self.removing.lock().await;
        let in_use = self.in_use_now()?;
        let recorded: Vec<String> = self.store.images()?.into_iter().flat_map(|image| image.layers).collect();
        self.forget_layers(|digest| {
            in_use.layers.contains(digest) || recorded.iter().any(|one| one == digest)
        })
        .await;
        let store = self.store.clone();
        let freed = tokio::task::spawn_blocking(move || store.gc(&|digest| in_use.layers.contains(digest)));
        let freed = freed.await??;
        Ok(GcReport { layers_removed: freed.layers, bytes_freed: freed.bytes })
    }

    /// Mount points that were unmounted by others than `sluice umount`; not those that may be about to be mounted.
    fn unmounted_holders(&self) -> Vec<Holder> {
        let mut mounting = self.lock(&self.mounting);
        mounting.retain(|_, asked| asked.elapsed() < MOUNTED_WITHIN);
        let unmounted = |holder: &&Holder| matches!(holder, Holder::MountPoint(dir) if !mounting.contains_key(dir) && !sluice_kernel::mount::is_mount_point(dir).unwrap_or(true));
        self.lock(&self.images).values().flat_map(|image| &image.holders).filter(unmounted).cloned().collect()
    }

    /// Reads everything in the store again.
    pub(crate) async fn fsck(self: &Arc<Self>) -> Result<FsckReport> {
        let node = Arc::clone(self);
        let checked = tokio::task::spawn_blocking(move || -> Result<_> {
            let report = node.store.fsck()?;
            report.damaged.iter().try_for_each(|digest| node.fetch_again(digest))?;
            Ok(report)
        });
        let report = checked.await??;
        Ok(FsckReport {
            layers: report.layers,
            chunks_checked: report.chunks_checked,
            problems: report.problems,
        })
    }

    /// Makes durable what came, and leaves images in use to the next agent. Nothing is left where nothing is used.
    pub(crate) async fn leave(&self) -> Result<()> {
        if self.lock(&self.images).is_empty() {
            return self.drain().await;
        }
        self.stop_layers().await?;
        self.keep();
        Ok(())
    }

    /// Makes durable what came, and takes all mounts out of the tree. Containers on complete layers go on.
    pub(crate) async fn drain(&self) -> Result<()> {
        self.stop_layers().await?;
        let images: Vec<Image> = self.lock(&self.images).drain().map(|(_, image)| image).collect();
        self.keep();
        let blockfs = self.lock(&self.blockfs).take();
        tokio::task::spawn_blocking(move || {
            let (unmounting, unmounted) = channel::<()>();
            std::thread::spawn(move || {
                for image in images {
                    image.holders.iter().for_each(unmount_holder);
                    if let Some(Err(error)) = image.mount.map(ImageMount::unmount) {
                        tracing::warn!(%error, "cannot unmount");
                    }
                }
                drop(unmounting);
            });
            // What was read ahead may never come: that ends with the server, or with this process if that serves within.
            let late = || unmounted.recv_timeout(LAST_READS) == Err(RecvTimeoutError::Timeout);
            if late() {
                tracing::info!("images are still read");
            }
            blockfs.map_or(Ok(()), BlockFs::unmount)?;
            if late() {
                tracing::warn!("a mount is still on its way out");
            }
            Ok(())
        })
        .await?
    }

    async fn stop_layers(&self) -> Result<()> {
        let layers: Vec<Arc<NodeLayer>> = self.lock(&self.layers).values().cloned().collect();
        for layer in layers {
            layer.stop().await?;
        }
        Ok(())
    }

    /// Writes down for the next agent what is in use. Without it containers go on, but the next agent takes their images for unused.
    fn keep(&self) {
        let _turn = self.lock(&self.keeping);
        let images: Vec<_> = self
            .lock(&self.images)
            .iter()
            .map(|(digest, image)| kept::KeptImage {
                manifest_digest: digest.clone(),
                reference: image.reference.clone(),
                served: image.served,
                fell_back: image.fell_back.clone(),
                lower_dirs: image.lower_dirs.clone(),
                mount: image.mount.as_ref().map(|mount| mount.dir().to_path_buf()),
                layers: image.layers.clone(),
                holders: image.holders.iter().map(kept::KeptHolder::new).collect(),
            })
            .collect();
        if let Err(error) = kept::write(&self.config.state, &images) {
            tracing::error!(error = format!("{error:#}"), "the next agent will not know what is in use");
        }
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a mount of `sluice mount` out of the tree.
fn unmount_holder(holder: &Holder) {
    let Holder::MountPoint(dir) = holder else { return };
    let options = UnmountOptions { lazy: true, force: false };
    match sluice_kernel::unmount(dir, options) {
        Ok(()) => tracing::info!(dir = %dir.display(), "unmounted"),
        Err(error) => tracing::debug!(%error, dir = %dir.display(), "nothing was mounted any more"),
    }
}

/// Each layer in use takes descriptors: 500 images took 1542.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays; many images may exceed it");
    }
}

/// Why containers on streamed images are not safe with this kernel, if so: operations on symbolic links that fail on our mounts.
fn unsafe_links(links: &Links) -> Option<String> {
    let broken = links.broken_on_ours();
    match links.has_fault() {
        Some(true) => tracing::warn!(
            noatime = ?links.on_noatime,
            ours_broken = !broken.is_empty(),
            "this kernel fails operations on symbolic links of FUSE and NFS lower directories, mended in {}",
            doctor::fault::FIXED_TEXT
        ),
        found => {
            tracing::info!(fault = ?found, erofs = ?links.on_erofs.is_ok(), "operations on symbolic links were tried")
        }
    }
    let first = broken.first()?;
    let failure = first.failure.as_deref().unwrap_or_default();
    Some(format!(
        "this kernel fails {} on symbolic links of EROFS lower directories: {failure}",
        first.operation
    ))
}

/// What this kernel lacks for streaming.
pub(crate) fn cannot_stream(abilities: &Abilities) -> Option<String> {
    [("FUSE", &abilities.fuse), ("loop devices", &abilities.loop_control), ("EROFS", &abilities.erofs)]
        .into_iter()
        .find(|(_, ability)| !ability.available)
        .map(|(name, ability)| format!("this node has no {name}: {}", ability.reason))
}
