//! A container's bundle: its overlay, its specification, and the runtime's command line.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{OverlayMount, mount_overlay, unmount};

use crate::spec::{self, SpecOptions};
use crate::{ContainerError, OnFile};

/// The runtime's directory, below that of all containers.
const RUNTIME: &str = ".runtime";

/// Where a container is made, and from what.
#[derive(Debug, Clone)]
pub struct BundleOptions {
    /// Directory of all containers.
    pub dir: PathBuf,
    /// Name of this one; a new one.
    pub id: String,
    /// Lower directories of the root, topmost first.
    pub lower_dirs: Vec<PathBuf>,
    /// The image configuration's text.
    pub image_config: String,
    /// runc or crun.
    pub runtime: PathBuf,
}

/// A container that can be started. [`Bundle::remove`] takes it away again.
#[derive(Debug)]
pub struct Bundle {
    options: BundleOptions,
    dir: PathBuf,
}

/// The runtime at `given`, or runc, or crun.
pub fn find_runtime(given: Option<&Path>) -> Result<PathBuf, ContainerError> {
    if let Some(given) = given {
        return Ok(given.to_path_buf());
    }
    let dirs = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    ["runc", "crun"]
        .iter()
        .flat_map(|name| dirs.map(|dir| Path::new(dir).join(name)))
        .find(|path| path.exists())
        .ok_or(ContainerError::NoRuntime)
}

impl Bundle {
    /// Mounts the root and writes the specification. A bundle of that name must not exist.
    pub fn create(options: BundleOptions, spec_options: &SpecOptions) -> Result<Self, ContainerError> {
        // Nobody else on the node may reach set-id programs that a container writes.
        let mut private = DirBuilder::new();
        private.mode(0o700);
        DirBuilder::new().recursive(true).mode(0o700).create(&options.dir).on("create", &options.dir)?;
        // As the kernel will name it: the mount is found again by this path.
        let dir = options.dir.canonicalize().on("resolve", &options.dir)?.join(&options.id);
        private.create(&dir).on("create", &dir)?;
        let bundle = Self { options, dir };
        if let Err(error) = bundle.fill(spec_options) {
            if let Err(left) = bundle.remove(false) {
                tracing::warn!(%left, "a bundle stays behind");
            }
            return Err(error);
        }
        Ok(bundle)
    }

    /// The upper directory's attributes are those of the container's root: it takes them from the topmost lower one.
    fn make_upper(&self) -> Result<(), ContainerError> {
        let upper = self.upper();
        let Some(lower) = self.options.lower_dirs.first() else { return Ok(()) };
        let meta = fs::metadata(lower).on("inspect", lower)?;
        chown(&upper, Some(meta.uid()), Some(meta.gid())).on("change the owner of", &upper)?;
        fs::set_permissions(&upper, meta.permissions()).on("change the mode of", &upper)
    }

    fn fill(&self, spec_options: &SpecOptions) -> Result<(), ContainerError> {
        for name in ["upper", "work", "rootfs"] {
            let path = self.dir.join(name);
            fs::create_dir(&path).on("create", &path)?;
        }
        self.make_upper()?;
        let root = self.dir.join("rootfs");
        let overlay = OverlayMount {
            lower: self.options.lower_dirs.clone(),
            upper_and_work: Some((self.dir.join("upper"), self.dir.join("work"))),
            options: Vec::new(),
            restrictions: Restrictions::default(),
        };
        mount_overlay(&overlay, &root)?;
        let spec = spec::build(&self.options.id, &root, &self.options.image_config, spec_options)?;
        let path = self.dir.join("config.json");
        fs::write(&path, spec.to_string()).on("write", &path)
    }

    fn runtime(&self) -> Command {
        let mut command = Command::new(&self.options.runtime);
        command.arg("--root").arg(self.options.dir.join(RUNTIME));
        command
    }

    /// Takes away the bundles below `dir` that nobody will: their containers do not run, and `ends` says that the makers are gone.
    /// What was kept on purpose stays. Returns the names.
    pub fn sweep(
        dir: &Path,
        runtime: &Path,
        ends: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>, ContainerError> {
        let mut swept = Vec::new();
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
            entries => entries.on("list", dir)?,
        };
        for entry in entries {
            let dir_of_one = entry.on("list", dir)?.path();
            let Some(id) = dir_of_one.file_name().and_then(|name| name.to_str()) else { continue };
            if !dir_of_one.join("config.json").exists() || !ends(id) {
                continue;
            }
            let options = BundleOptions {
                dir: dir.to_path_buf(),
                id: id.to_owned(),
                lower_dirs: Vec::new(),
                image_config: String::new(),
                runtime: runtime.to_path_buf(),
            };
            let bundle = Self { options, dir: dir_of_one.clone() };
            if !bundle.is_running()? {
                bundle.remove(false)?;
                swept.push(id.to_owned());
            }
        }
        Ok(swept)
    }

    /// What the runtime says; a container that it does not know does not run.
    fn is_running(&self) -> Result<bool, ContainerError> {
        let mut state = self.runtime();
        let output = state.args(["state", &self.options.id]).output().on("run", &self.options.runtime)?;
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Ok(state.get("status").is_some_and(|status| status != "stopped"))
    }

    /// The command that runs the container in the foreground; its exit code is the container's.
    pub fn command(&self) -> Command {
        let mut command = self.runtime();
        command.arg("run").arg("--bundle").arg(&self.dir).arg(&self.options.id);
        command
    }

    /// The command that runs another process in the container, once that runs.
    pub fn exec(&self, arguments: &[&str]) -> Command {
        let mut command = self.runtime();
        command.arg("exec").arg(&self.options.id).args(arguments);
        command
    }

    /// What the container wrote.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Ends the container if it still runs, and unmounts; `keep` leaves what it wrote ([`Self::upper`]). Can be repeated.
    pub fn remove(&self, keep: bool) -> Result<(), ContainerError> {
        // Where runtimes keep what they know of a container; one that ended in the foreground is forgotten already.
        if self.options.dir.join(RUNTIME).join(&self.options.id).exists() {
            let mut delete = self.runtime();
            delete.args(["delete", "--force", &self.options.id]).stdout(Stdio::null()).stderr(Stdio::null());
            if let Err(error) = delete.status() {
                tracing::debug!(%error, "the runtime deletes nothing");
            }
        }
        let root = self.dir.join("rootfs");
        // Never remove through a mount: an unknown state is an error here.
        while sluice_kernel::mount::is_mount_point(&root)? {
            unmount(&root, UnmountOptions { lazy: true, force: false })?;
        }
        if !keep {
            return gone(fs::remove_dir_all(&self.dir)).on("remove", &self.dir);
        }
        for name in ["work", "rootfs"] {
            let path = self.dir.join(name);
            gone(fs::remove_dir_all(&path)).on("remove", &path)?;
        }
        let path = self.dir.join("config.json");
        gone(fs::remove_file(&path)).on("remove", &path)
    }
}

/// What is not there is removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
