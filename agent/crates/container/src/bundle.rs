//! A container's bundle: its overlay, its specification, and the runtime's command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sluice_kernel::mount::{Restrictions, UnmountOptions};
use sluice_kernel::{OverlayMount, mount_overlay, unmount};

use crate::spec::{self, SpecOptions};
use crate::{ContainerError, OnFile};

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
    /// Mounts the root and writes the specification.
    pub fn create(options: BundleOptions, spec_options: &SpecOptions) -> Result<Self, ContainerError> {
        let dir = options.dir.join(&options.id);
        for name in ["upper", "work", "rootfs"] {
            let path = dir.join(name);
            fs::create_dir_all(&path).on("create", &path)?;
        }
        let bundle = Self { options, dir };
        if let Err(error) = bundle.fill(spec_options) {
            if let Err(left) = bundle.remove(false) {
                tracing::warn!(%left, "a bundle stays behind");
            }
            return Err(error);
        }
        Ok(bundle)
    }

    fn fill(&self, spec_options: &SpecOptions) -> Result<(), ContainerError> {
        let root = self.dir.join("rootfs");
        let overlay = OverlayMount {
            lower: self.options.lower_dirs.clone(),
            upper_and_work: Some((self.dir.join("upper"), self.dir.join("work"))),
            options: Vec::new(),
            restrictions: Restrictions::default(),
        };
        mount_overlay(&overlay, &root)?;
        let (spec, workdir) = spec::build(&self.options.id, &root, &self.options.image_config, spec_options)?;
        tracing::debug!(workdir, "the runtime makes the working directory if it is not there");
        let path = self.dir.join("config.json");
        fs::write(&path, spec.to_string()).on("write", &path)
    }

    fn runtime(&self) -> Command {
        let mut command = Command::new(&self.options.runtime);
        command.arg("--root").arg(self.options.dir.join(".runtime"));
        command
    }

    /// The command that runs the container in the foreground; its exit code is the container's.
    pub fn command(&self) -> Command {
        let mut command = self.runtime();
        command.arg("run").arg("--bundle").arg(&self.dir).arg(&self.options.id);
        command
    }

    /// What the container wrote.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Ends the container if it still runs, and unmounts; `keep` leaves what it wrote.
    pub fn remove(&self, keep: bool) -> Result<(), ContainerError> {
        let mut delete = self.runtime();
        delete.args(["delete", "--force", &self.options.id]).stdout(Stdio::null()).stderr(Stdio::null());
        if let Err(error) = delete.status() {
            tracing::debug!(%error, "the runtime deletes nothing");
        }
        let root = self.dir.join("rootfs");
        if sluice_kernel::mount::is_mount_point(&root).unwrap_or(false) {
            unmount(&root, UnmountOptions { lazy: true, force: false })?;
        }
        if keep {
            return Ok(());
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).on("remove", &self.dir),
            _ => Ok(()),
        }
    }
}
