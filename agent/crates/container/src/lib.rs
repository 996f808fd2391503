//! Runs a container from a root file system: overlayfs, OCI runtime specification, runc or crun.
