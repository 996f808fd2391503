//! containerd's side of the agent: a proxy snapshotter, and a pull that drives containerd's API.
//!
//! The snapshotter answers "already there" for layers of images that can be streamed, and makes container roots as overlays on
//! one merged read-only mount per image. Layers of other images are ordinary snapshots, unpacked by containerd, so that a
//! node can have this as its only snapshotter. How an image comes to be mounted is not known here: see [`ImageMounts`].

pub mod proto;

mod client;
mod filter;
mod remote;
mod service;
mod snapshotter;
mod state;
mod usage;

pub use client::{ClientError, Containerd, LayerSource, PlannedLayer, PullPlan, PullReport, chain_ids};
pub use remote::{ImageMounts, Refusal, RemoteLayer, labels};
pub use service::{BoundSocket, ServeError};
pub use snapshotter::{Mount, SnapshotError, Snapshotter};
pub use state::{Kind, SnapshotInfo, StateError};
pub use usage::Usage;
