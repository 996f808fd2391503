//! A snapshotter in a temporary directory, mounts that end with their test, and a node whose images are directories.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use sluice_containerd::{
    ImageMounts, Kind, Mount, Refusal, RemoteLayer, SnapshotError, Snapshotter, Usage, labels,
};
use sluice_kernel::OverlayMount;
use sluice_kernel::mount::{Restrictions, UnmountOptions, mount_bind, mount_overlay, unmount};

/// Images as directories: chain id to lower directories. What is held is written down.
#[derive(Debug, Default)]
pub(crate) struct Directories {
    pub(crate) chains: Mutex<HashMap<String, Vec<PathBuf>>>,
    pub(crate) held: Mutex<Vec<String>>,
    pub(crate) offers: Mutex<u32>,
    pub(crate) forgotten: Mutex<Vec<String>>,
}

#[tonic::async_trait]
impl ImageMounts for Directories {
    async fn offer(&self, layer: &RemoteLayer) -> Result<(), Refusal> {
        *self.offers.lock().unwrap() += 1;
        let known = self.chains.lock().unwrap().contains_key(&layer.chain_id);
        known.then_some(()).ok_or_else(|| Refusal(format!("{} is not streamed", layer.image)))
    }

    async fn acquire(&self, layer: &RemoteLayer, holder: &str) -> Result<Vec<PathBuf>, Refusal> {
        let dirs = self.chains.lock().unwrap().get(&layer.chain_id).cloned();
        let dirs = dirs.ok_or_else(|| Refusal("it is gone".to_owned()))?;
        let mut held = self.held.lock().unwrap();
        if !held.iter().any(|one| one == holder) {
            held.push(holder.to_owned());
        }
        Ok(dirs)
    }

    async fn release(&self, holder: &str) {
        self.held.lock().unwrap().retain(|one| one != holder);
    }

    async fn forget(&self, manifest_digest: &str) {
        self.forgotten.lock().unwrap().push(manifest_digest.to_owned());
    }

    async fn usage(&self, _: &RemoteLayer) -> Usage {
        Usage { bytes: 4096, inodes: 1 }
    }
}

pub(crate) struct Rig {
    pub(crate) snapshotter: Arc<Snapshotter>,
    pub(crate) node: Arc<Directories>,
    pub(crate) dir: tempfile::TempDir,
    mounted: Mutex<Vec<PathBuf>>,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = Arc::new(Directories::default());
        let snapshotter = Snapshotter::open(&dir.path().join("s"), Arc::clone(&node) as _).await.unwrap();
        Self { snapshotter, node, dir, mounted: Mutex::default() }
    }

    /// The same files and the same node under a new snapshotter.
    pub(crate) async fn restarted(mut self) -> Self {
        // The database lets one process in: the old one goes first.
        let path = self.dir.path().join("s");
        let stand_in = self.dir.path().join("stand-in");
        let node = Arc::clone(&self.node);
        let old = std::mem::replace(
            &mut self.snapshotter,
            Snapshotter::open(&stand_in, Arc::clone(&node) as _).await.unwrap(),
        );
        drop(old);
        self.snapshotter = Snapshotter::open(&path, node as _).await.unwrap();
        self
    }

    /// Mounts, gives the directory to `work`, unmounts.
    pub(crate) fn with_mounted<T>(&self, mounts: &[Mount], work: impl FnOnce(&Path) -> T) -> T {
        let target = self.mount(mounts);
        let result = work(&target);
        self.unmount(&target);
        result
    }

    pub(crate) fn mount(&self, mounts: &[Mount]) -> PathBuf {
        let number = self.mounted.lock().unwrap().len();
        let target = self.dir.path().join(format!("mnt{number}-{}", std::process::id()));
        std::fs::create_dir_all(&target).unwrap();
        let [mount] = mounts else { panic!("one mount: {mounts:?}") };
        let option =
            |key: &str| mount.options.iter().find_map(|option| option.strip_prefix(&format!("{key}=")));
        match mount.kind {
            "bind" => {
                let read_only = mount.options.iter().any(|option| option == "ro");
                let restrictions = Restrictions { read_only, ..Restrictions::default() };
                mount_bind(Path::new(&mount.source), &target, restrictions).unwrap();
            }
            "overlay" => {
                let overlay = OverlayMount {
                    lower: option("lowerdir").unwrap().split(':').map(PathBuf::from).collect(),
                    upper_and_work: option("upperdir")
                        .map(|upper| (upper.into(), option("workdir").unwrap().into())),
                    options: vec![(CString::from(c"index"), Some(CString::from(c"off")))],
                    restrictions: Restrictions::default(),
                };
                mount_overlay(&overlay, &target).unwrap();
            }
            other => panic!("mount of kind {other}"),
        }
        self.mounted.lock().unwrap().push(target.clone());
        target
    }

    pub(crate) fn unmount(&self, target: &Path) {
        unmount(target, UnmountOptions::default()).unwrap();
        for mounted in self.mounted.lock().unwrap().iter_mut().filter(|one| *one == target) {
            *mounted = PathBuf::new();
        }
    }

    /// Prepares, fills by `work` and commits a layer.
    pub(crate) async fn layer(&self, name: &str, parent: &str, work: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        let mounts = self.snapshotter.prepare(&key, parent, none()).await.unwrap();
        self.with_mounted(&mounts, work);
        self.snapshotter.commit(&key, name, none()).await.unwrap();
    }

    pub(crate) async fn kind(&self, key: &str) -> Kind {
        self.snapshotter.stat(key).await.unwrap().kind
    }

    pub(crate) fn ids_on_disk(&self) -> usize {
        self.dir.path().join("s/snapshots").read_dir().unwrap().count()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for target in self.mounted.lock().unwrap().iter().filter(|path| !path.as_os_str().is_empty()) {
            if let Err(error) = unmount(target, UnmountOptions { lazy: true, force: false }) {
                eprintln!("{error}");
            }
        }
    }
}

pub(crate) fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

/// The labels of a layer that containerd would like to have as `chain`.
pub(crate) fn served_labels(image: &str, chain: &str) -> BTreeMap<String, String> {
    [
        (labels::TARGET, chain.to_owned()),
        (labels::IMAGE, format!("registry.example/{image}:latest")),
        (labels::MANIFEST, format!("sha256:manifest-of-{image}")),
        (labels::LAYER, format!("sha256:layer-of-{chain}")),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// The reason in a refusal's words.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, SnapshotError>) -> String {
    result.unwrap_err().to_string()
}
