//! Runs a container from a root file system: overlayfs, OCI runtime specification, runc or crun; and unpacks layers the
//! ordinary way.
//!
//! It gets lower directories and an image configuration; how those came about is not known here.

mod bundle;
mod inside;
#[doc(hidden)]
pub mod outside;
mod parents;
mod spec;
pub mod unpack;
mod users;

use std::path::{Path, PathBuf};

use sluice_kernel::mount::{Restrictions, mount_bind};
use sluice_kernel::{MountError, OverlayMount, mount_overlay};

pub use bundle::{Bundle, BundleOptions, find_runtime};
pub use spec::{Bind, Network, SpecOptions};

/// Why a container cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A file of the bundle.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The image configuration is not valid.
    #[error("the image's configuration is not valid")]
    Config(#[source] serde_json::Error),
    /// The user does not exist in the image.
    #[error("the image has no {kind} `{name}` in /etc/{file}")]
    User {
        /// `user` or `group`.
        kind: &'static str,
        /// As asked.
        name: String,
        /// `passwd` or `group`.
        file: &'static str,
    },
    /// The image's user database is damaged.
    #[error("the image's /etc/{file} has no valid number for `{name}`")]
    UserNumber {
        /// As found.
        name: String,
        /// `passwd` or `group`.
        file: &'static str,
    },
    /// What is mounted cannot be told.
    #[error(transparent)]
    MountInfo(#[from] sluice_kernel::mountinfo::MountInfoError),
    /// Nothing to run.
    #[error("the image names no command; give one after the image")]
    NoCommand,
    /// A bind is malformed.
    #[error("`{0}` is not a bind; write SRC:DST or SRC:DST:ro with absolute paths")]
    Bind(String),
    /// No runtime.
    #[error("neither runc nor crun is installed; install one of them, or give --runtime")]
    NoRuntime,
}

pub(crate) trait OnFile<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T, ContainerError>;
}

impl<T> OnFile<T> for std::io::Result<T> {
    fn on(self, what: &'static str, path: &Path) -> Result<T, ContainerError> {
        self.map_err(|source| ContainerError::File { what, path: path.to_path_buf(), source })
    }
}

/// Mounts lower directories (topmost first) read-only on `target`.
pub fn mount_read_only(lower_dirs: &[PathBuf], target: &Path) -> Result<(), MountError> {
    let restrictions = Restrictions { read_only: true, ..Restrictions::default() };
    match lower_dirs {
        [only] => mount_bind(only, target, restrictions),
        _ => mount_overlay(
            &OverlayMount {
                lower: lower_dirs.to_vec(),
                upper_and_work: None,
                options: Vec::new(),
                restrictions,
            },
            target,
        ),
    }
}
