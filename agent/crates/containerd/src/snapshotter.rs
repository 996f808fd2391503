//! The snapshotter: the database and the directories behind it, with images that the node serves as lower directories.
//!
//! One directory per snapshot that has files of its own: `snapshots/ID/fs`, and `work` beside it for an active one. A
//! snapshot's root file system is an overlay on the directories of its parents, down to the first layer that the node serves:
//! that one stands for itself and all below it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use thiserror::Error;

use crate::filter::{FilterError, Filters};
use crate::remote::{ImageMounts, Refusal, RemoteLayer};
use crate::state::{Kind, NewSnapshot, SnapshotInfo, Stack, State, StateError};
use crate::usage::Usage;

/// How long the layers of an image that was refused are not offered again, unless a new pull begins.
const REFUSAL_HOLDS: Duration = Duration::from_secs(600);
/// Images acquired at once after a restart.
const RESTORED_AT_ONCE: usize = 4;

/// What can go wrong with a snapshot.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The question does not fit what is there.
    #[error(transparent)]
    State(#[from] StateError),
    /// The layer is there: it need not be downloaded.
    #[error("snapshot {0} is there: the node streams it")]
    Served(String),
    /// The file system below a snapshot is not to be had.
    #[error("image {image} is not to be had")]
    Image {
        /// Its reference.
        image: String,
        /// Why.
        #[source]
        source: Refusal,
    },
    /// Directories cannot be made or read.
    #[error("cannot {action} {}", path.display())]
    Files {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A filter cannot be understood.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The directory's name cannot stand in overlay options.
    #[error("the snapshotter's directory {} may not contain a colon, a comma or a backslash", .0.display())]
    Root(PathBuf),
    /// The work was cut short.
    #[error("the work was cut short")]
    Cut(#[from] tokio::task::JoinError),
}

/// A mount as containerd makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `overlay` or `bind`.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options of mount(8).
    pub options: Vec<String>,
}

/// See the module text.
#[derive(Debug)]
pub struct Snapshotter {
    dir: PathBuf,
    state: Arc<State>,
    images: Arc<dyn ImageMounts>,
    /// Images that were refused, by reference and manifest, and when.
    refused: Mutex<HashMap<(String, String), Instant>>,
    /// Directories are made under a shared lock and swept under an exclusive one.
    sweeping: tokio::sync::RwLock<()>,
    /// The kernel has overlay's inode index (Linux 4.13): containerd switches it off, lower directories being shared.
    has_index: bool,
}

impl Snapshotter {
    /// Opens or makes the snapshots of `dir`, and removes directories that no snapshot has.
    pub async fn open(dir: &Path, images: Arc<dyn ImageMounts>) -> Result<Arc<Self>, SnapshotError> {
        if dir.to_string_lossy().contains([':', ',', '\\']) {
            return Err(SnapshotError::Root(dir.into()));
        }
        let snapshots = dir.join("snapshots");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&snapshots)
            .map_err(|source| SnapshotError::Files { action: "create", path: snapshots.clone(), source })?;
        let path = dir.join("snapshots.redb");
        let state = blocking(move || Ok(State::open(&path)?)).await?;
        let this = Arc::new(Self {
            dir: dir.into(),
            state: Arc::new(state),
            images,
            refused: Mutex::default(),
            sweeping: tokio::sync::RwLock::default(),
            has_index: Path::new("/sys/module/overlay/parameters/index").exists(),
        });
        this.cleanup().await?;
        Ok(this)
    }

    /// Acquires the images below active snapshots and views again, after a restart. What fails is logged, and tried again
    /// when the snapshot is asked for.
    pub async fn restore(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let state = Arc::clone(&self.state);
        let wanted = blocking(move || {
            let all = state.all()?;
            let open = all.into_iter().filter(|(_, record)| record.kind != Kind::Committed);
            let stacks = open.map(|(name, _)| state.stack(&name));
            Ok(stacks.collect::<Result<Vec<_>, _>>()?)
        })
        .await?;
        let acquiring = wanted.into_iter().map(|stack| async move {
            if let Err(error) = self.base_dirs(&stack).await {
                tracing::warn!(snapshot = stack.id, error = words(&error), "its image is not to be had now");
            }
        });
        futures::stream::iter(acquiring).buffer_unordered(RESTORED_AT_ONCE).collect::<()>().await;
        Ok(())
    }

    /// A writable snapshot on `parent` (empty for none), or [`SnapshotError::Served`] when its labels name a layer that the
    /// node can serve.
    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        if let Some(layer) = RemoteLayer::from_labels(&labels)
            && self.serves(&layer, parent, &labels).await?
        {
            return Err(SnapshotError::Served(layer.chain_id));
        }
        self.create(Kind::Active, key, parent, labels).await
    }

    /// A read-only snapshot of `parent`.
    pub async fn view(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.create(Kind::View, key, parent, labels).await
    }

    /// The mounts of an active snapshot or a view.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let stack = self.stack(key).await?;
        let base = self.base_dirs(&stack).await?;
        Ok(self.mounts_of(&stack, base))
    }

    /// Makes an active snapshot a committed one.
    pub async fn commit(
        &self,
        key: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), SnapshotError> {
        let stack = self.stack(key).await?;
        let (state, fs) = (Arc::clone(&self.state), self.fs_dir(stack.id));
        let (key, name) = (key.to_owned(), name.to_owned());
        blocking(move || {
            let usage = used(&fs)?;
            Ok(state.commit(&key, &name, &labels, usage)?)
        })
        .await?;
        // Committed layers do not need their image mounted; who stands on them does.
        self.images.release(&holder(stack.id)).await;
        Ok(())
    }

    /// Removes a snapshot without children.
    pub async fn remove(&self, key: &str) -> Result<(), SnapshotError> {
        let (state, name) = (Arc::clone(&self.state), key.to_owned());
        let removed = blocking(move || Ok(state.remove(&name)?)).await?;
        if removed.record.remote.is_none() {
            self.images.release(&holder(removed.record.id)).await;
            let dir = self.snapshot_dir(removed.record.id);
            blocking(move || {
                if let Err(error) = std::fs::remove_dir_all(&dir) {
                    // It has no record any more: the next cleanup takes it.
                    tracing::warn!(path = %dir.display(), %error, "cannot remove a snapshot's directory now");
                }
                Ok(())
            })
            .await?;
        }
        if let Some(manifest) = removed.last_of_image {
            let refused = &self.refused;
            refused.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, of), _| *of != manifest);
            self.images.forget(&manifest).await;
        }
        Ok(())
    }

    /// What is known of a snapshot.
    pub async fn stat(&self, key: &str) -> Result<SnapshotInfo, SnapshotError> {
        let (state, name) = (Arc::clone(&self.state), key.to_owned());
        blocking(move || Ok(state.get(&name)?.info(&name))).await
    }

    /// Changes labels; `paths` is a field mask, empty for all.
    pub async fn update(
        &self,
        key: &str,
        labels: BTreeMap<String, String>,
        paths: Vec<String>,
    ) -> Result<SnapshotInfo, SnapshotError> {
        let (state, name) = (Arc::clone(&self.state), key.to_owned());
        blocking(move || Ok(state.update(&name, &labels, &paths)?.info(&name))).await
    }

    /// Snapshots that any of `filters` admits; all if there are none.
    pub async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>, SnapshotError> {
        let (state, filters) = (Arc::clone(&self.state), Filters::parse(filters)?);
        blocking(move || {
            let all = state.all()?.into_iter().map(|(name, record)| record.info(&name));
            Ok(all.filter(|info| filters.admit(info)).collect())
        })
        .await
    }

    /// Disk space of a snapshot, without its parents. Layers that the node serves count what is local of them, once.
    pub async fn usage(&self, key: &str) -> Result<Usage, SnapshotError> {
        let (state, name) = (Arc::clone(&self.state), key.to_owned());
        let (record, counted) = blocking(move || {
            let record = state.get(&name)?;
            let counted = state.is_counted_elsewhere(&record)?;
            Ok((record, counted))
        })
        .await?;
        match (&record.remote, record.kind) {
            (Some(_), _) if counted => Ok(Usage::default()),
            (Some(layer), _) => Ok(self.images.usage(layer).await),
            (None, Kind::Active) => {
                let fs = self.fs_dir(record.id);
                blocking(move || used(&fs)).await
            }
            (None, _) => Ok(record.usage),
        }
    }

    /// Removes directories that no snapshot has.
    pub async fn cleanup(&self) -> Result<(), SnapshotError> {
        let _alone = self.sweeping.write().await;
        let (state, snapshots) = (Arc::clone(&self.state), self.dir.join("snapshots"));
        blocking(move || {
            let ids: Vec<String> =
                state.all()?.into_iter().map(|(_, record)| record.id.to_string()).collect();
            let failed = |path: &Path| {
                let path = path.to_path_buf();
                move |source| SnapshotError::Files { action: "clean up", path, source }
            };
            for entry in snapshots.read_dir().map_err(failed(&snapshots))? {
                let entry = entry.map_err(failed(&snapshots))?;
                if !ids.iter().any(|id| entry.file_name() == id.as_str()) {
                    std::fs::remove_dir_all(entry.path()).map_err(failed(&entry.path()))?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Whether the node serves `layer`; then its committed snapshot is there.
    async fn serves(
        &self,
        layer: &RemoteLayer,
        parent: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<bool, SnapshotError> {
        // The lowest layer begins a new pull: what was refused before may be possible now.
        if !parent.is_empty() && self.was_refused(layer) {
            return Ok(false);
        }
        if let Err(refusal) = self.images.offer(layer).await {
            tracing::debug!(image = layer.image, layer = layer.layer_digest, reason = %refusal, "not served");
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            refused.retain(|_, when| when.elapsed() < REFUSAL_HOLDS);
            refused.insert((layer.image.clone(), layer.manifest_digest.clone()), Instant::now());
            return Ok(false);
        }
        let (state, parent) = (Arc::clone(&self.state), parent.to_owned());
        let (labels, layer) = (labels.clone(), layer.clone());
        let added = blocking(move || Ok(state.create_remote(&parent, &labels, &layer)?)).await?;
        tracing::debug!(added, "a layer is served by the node");
        Ok(true)
    }

    fn was_refused(&self, layer: &RemoteLayer) -> bool {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let image = (layer.image.clone(), layer.manifest_digest.clone());
        refused.get(&image).is_some_and(|when| when.elapsed() < REFUSAL_HOLDS)
    }

    async fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let (state, below) = (Arc::clone(&self.state), parent.to_owned());
        let stack = blocking(move || {
            let (parents, base) = state.below(&below)?;
            Ok(Stack { id: state.next_id()?, kind, parents, base })
        })
        .await?;
        let base = self.base_dirs(&stack).await?;
        let created = self.create_files(&stack, &base, key, parent, labels).await;
        if created.is_err() && stack.base.is_some() {
            self.images.release(&holder(stack.id)).await;
        }
        created?;
        Ok(self.mounts_of(&stack, base))
    }

    /// The snapshot's directory and its record: both or, after a crash, a directory that `cleanup` takes.
    async fn create_files(
        &self,
        stack: &Stack,
        base: &[PathBuf],
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), SnapshotError> {
        let _not_swept = self.sweeping.read().await;
        let (state, id, kind) = (Arc::clone(&self.state), stack.id, stack.kind);
        let dir = self.snapshot_dir(id);
        let template = stack.parents.first().map(|id| self.fs_dir(*id)).or_else(|| base.first().cloned());
        let (key, parent) = (key.to_owned(), parent.to_owned());
        blocking(move || {
            let new = NewSnapshot { id, kind, name: &key, parent: &parent, labels: &labels };
            let made = state.create(&new, || make_dirs(&dir, kind, template.as_deref()));
            match made {
                Ok(Ok(())) => Ok(()),
                Ok(Err(source)) => {
                    remove_half_made(&dir);
                    Err(SnapshotError::Files { action: "create", path: dir, source })
                }
                Err(error) => {
                    remove_half_made(&dir);
                    Err(error.into())
                }
            }
        })
        .await
    }

    async fn stack(&self, key: &str) -> Result<Stack, SnapshotError> {
        let (state, name) = (Arc::clone(&self.state), key.to_owned());
        blocking(move || Ok(state.stack(&name)?)).await
    }

    async fn base_dirs(&self, stack: &Stack) -> Result<Vec<PathBuf>, SnapshotError> {
        let Some(layer) = &stack.base else { return Ok(Vec::new()) };
        let acquired = self.images.acquire(layer, &holder(stack.id)).await;
        acquired.map_err(|source| SnapshotError::Image { image: layer.image.clone(), source })
    }

    fn snapshot_dir(&self, id: u64) -> PathBuf {
        self.dir.join("snapshots").join(id.to_string())
    }

    fn fs_dir(&self, id: u64) -> PathBuf {
        self.snapshot_dir(id).join("fs")
    }

    fn mounts_of(&self, stack: &Stack, base: Vec<PathBuf>) -> Vec<Mount> {
        let own = self.fs_dir(stack.id);
        let mut lower: Vec<PathBuf> = stack.parents.iter().map(|id| self.fs_dir(*id)).collect();
        lower.extend(base);
        let writable = stack.kind == Kind::Active;
        match (lower.as_slice(), writable) {
            ([], _) => return vec![bind(&own, writable)],
            ([only], false) => return vec![bind(only, false)],
            _ => {}
        }
        let mut options = Vec::new();
        if self.has_index {
            options.push("index=off".to_owned());
        }
        if writable {
            options.push(format!("workdir={}", self.snapshot_dir(stack.id).join("work").display()));
            options.push(format!("upperdir={}", own.display()));
        }
        let names: Vec<String> = lower.iter().map(|path| path.display().to_string()).collect();
        options.push(format!("lowerdir={}", names.join(":")));
        vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
    }
}

fn bind(dir: &Path, writable: bool) -> Mount {
    let mode = if writable { "rw" } else { "ro" };
    Mount {
        kind: "bind",
        source: dir.display().to_string(),
        options: vec![mode.to_owned(), "rbind".to_owned()],
    }
}

fn holder(id: u64) -> String {
    format!("snapshot-{id}")
}

/// The directories of a new snapshot. Its root belongs to whom the root below it belongs to, as in containerd's overlay
/// snapshotter.
fn make_dirs(dir: &Path, kind: Kind, template: Option<&Path>) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(dir)?;
    let fs = dir.join("fs");
    std::fs::DirBuilder::new().mode(0o755).create(&fs)?;
    if let Some(template) = template {
        let below = template.metadata()?;
        std::os::unix::fs::lchown(&fs, Some(below.uid()), Some(below.gid()))?;
    }
    if kind == Kind::Active {
        std::fs::DirBuilder::new().mode(0o711).create(dir.join("work"))?;
    }
    Ok(())
}

fn remove_half_made(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "cannot remove a half-made snapshot now");
        }
        _ => {}
    }
}

fn used(fs: &Path) -> Result<Usage, SnapshotError> {
    Usage::of(fs).map_err(|source| SnapshotError::Files { action: "measure", path: fs.into(), source })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, SnapshotError> {
    tokio::task::spawn_blocking(work).await?
}

/// An error with its causes, in one line.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
