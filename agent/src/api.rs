//! What the command line and the daemon say to each other: JSON over HTTP on the daemon's unix socket.
//!
//! Long operations answer with one JSON [`Event`] per line, the last being `done` or `failed`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::journal::NodeEvent;

/// Who uses an image: it stays mounted until they release it, die or unmount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Holder {
    /// A process, by pid (released when it ends).
    Process(u32),
    /// A mount point (released when nothing is mounted there any more).
    MountPoint(PathBuf),
    /// A snapshot of the containerd snapshotter, by its name for it (released by the snapshotter; not kept over a restart
    /// of the daemon, after which the snapshotter asks again).
    Snapshot(String),
}

/// `POST /v1/acquire`: make an image's root file system available.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AcquireRequest {
    pub(crate) reference: String,
    /// False: pull and unpack everything first.
    pub(crate) stream: bool,
    pub(crate) holder: Holder,
    /// The container that is to start; none: the image is only mounted.
    #[serde(default)]
    pub(crate) start: Option<StartRequest>,
}

/// What of a container's start is known beforehand.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct StartRequest {
    /// Replaces the image's entry point.
    pub(crate) entrypoint: Option<String>,
    /// Replaces the image's command, if there is something.
    pub(crate) command: Vec<String>,
    /// Milliseconds that are recorded at most; none: as configured.
    pub(crate) window_ms: Option<u64>,
}

/// What was recorded of a start: the answer to `POST /v1/ready`, null if nothing is recorded for the holder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StartReport {
    /// The trace file.
    pub(crate) trace: PathBuf,
    /// Class of the entry point.
    pub(crate) entry: String,
    /// By what accesses were seen.
    pub(crate) level: String,
    /// Reads that the agent answered.
    pub(crate) reads: u64,
    /// Records of the probes.
    pub(crate) probed: u64,
    pub(crate) ranges: usize,
    /// Bytes of the ranges, whole pages.
    pub(crate) bytes: u64,
    /// Microseconds that threads slept for bytes of the image.
    pub(crate) blocked_us: u64,
    /// How much of that the agent took to answer.
    pub(crate) served_us: u64,
    /// Records that were lost.
    pub(crate) lost: u64,
    /// Whether it is in the profile now.
    pub(crate) learned: bool,
}

/// `POST /v1/profiles`: the answer is lines for people.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProfileRequest {
    List { reference: Option<String> },
    Show { reference: String },
    Push { reference: String, pack: bool },
    Pull { reference: String, start: StartRequest },
    Remove { reference: String },
}

/// `POST /v1/pull`, `/v1/remove`, `/v1/status`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ImageRequest {
    pub(crate) reference: Option<String>,
}

/// `POST /v1/release`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReleaseRequest {
    pub(crate) holder: Holder,
}

/// `POST /v1/stop`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StopRequest {
    /// Unmount images in use instead of leaving them to the next daemon.
    pub(crate) drain: bool,
}

/// `POST /v1/upgrade`: another program takes the daemon's place; the answer is which.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct UpgradeRequest {
    /// None: what stands where the daemon's own was started from.
    pub(crate) program: Option<PathBuf>,
}

/// How an image's files are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Served {
    /// From the registry while it is read.
    Streamed,
    /// All layers are on this node.
    Local,
    /// Pulled and unpacked to directories.
    Unpacked,
}

/// An image that is ready to be used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Acquired {
    pub(crate) reference: String,
    pub(crate) manifest_digest: String,
    /// The image configuration, as in the registry.
    pub(crate) config: String,
    /// Lower directories of the root file system, topmost first.
    pub(crate) lower_dirs: Vec<PathBuf>,
    pub(crate) served: Served,
    /// Why the image was not streamed, if it was to be.
    pub(crate) fell_back: Option<String>,
}

/// What `sluice run --report` writes when the container ended.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RunReport {
    /// Why there was no container.
    pub(crate) error: Option<String>,
    pub(crate) served: Option<Served>,
    /// Why the image was not streamed, if it was to be.
    pub(crate) fell_back: Option<String>,
    /// From the start of the command until the runtime starts the container's process, milliseconds.
    pub(crate) ready_ms: u64,
    /// Bytes of the image that came to this node meanwhile: of content, or of layers as in the registry if it was unpacked.
    pub(crate) bytes: u64,
    pub(crate) bytes_total: u64,
}

/// One line of a long operation's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// Something the user should know.
    Note { text: String },
    /// How far an operation is.
    Progress { bytes_done: u64, bytes_total: u64 },
    /// Something happened to an image of the node.
    Happened { what: NodeEvent },
    /// The end, well: what the request asked for.
    Done { result: serde_json::Value },
    /// The end, badly.
    Failed { message: String },
}

/// `POST /v1/status`: the node and its images.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) pid: u32,
    pub(crate) version: String,
    /// The program's file.
    #[serde(default)]
    pub(crate) program: PathBuf,
    /// When the daemon began, milliseconds since 1970.
    #[serde(default)]
    pub(crate) since_ms: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) resident_peak_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) disk_full: bool,
    pub(crate) reads: ReadCounters,
    /// None where nothing can be streamed.
    pub(crate) blocks: Option<BlockServerStatus>,
    /// Stream indexes that lied, since the daemon started.
    #[serde(default)]
    pub(crate) indexes_quarantined: u64,
    pub(crate) images: Vec<ImageStatus>,
}

/// The server of block files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BlockServerStatus {
    pub(crate) pid: u32,
    /// How the kernel's reads reach it, `zero_copy`, `io_uring` or `classic`, and why so.
    pub(crate) way: String,
    pub(crate) reason: String,
    pub(crate) resident_bytes: u64,
}

/// Where reads of the daemon were answered from, since its start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct ReadCounters {
    pub(crate) from_disk: u64,
    pub(crate) from_registry: u64,
    pub(crate) waiting: u64,
    pub(crate) bytes_demand: u64,
    pub(crate) bytes_prefetch: u64,
    pub(crate) bytes_fill: u64,
}

/// One image of the node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ImageStatus {
    pub(crate) reference: String,
    pub(crate) manifest_digest: String,
    pub(crate) state: String,
    pub(crate) users: usize,
    /// Bytes of content in the layer store, shared layers included.
    pub(crate) bytes_local: u64,
    pub(crate) bytes_total: u64,
    pub(crate) layers: Vec<LayerStatus>,
}

/// One layer of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerStatus {
    pub(crate) digest: String,
    pub(crate) state: String,
    pub(crate) bytes_local: u64,
    pub(crate) bytes_total: u64,
}

/// What `pull` brought.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PullReport {
    pub(crate) reference: String,
    pub(crate) manifest_digest: String,
    pub(crate) bytes_local: u64,
}

/// What `gc` freed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GcReport {
    pub(crate) layers_removed: usize,
    pub(crate) bytes_freed: u64,
}

/// What `fsck` found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FsckReport {
    pub(crate) layers: usize,
    pub(crate) chunks_checked: u64,
    pub(crate) problems: Vec<String>,
}

/// `POST /v1/events`: what happened to images, oldest first.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct EventsRequest {
    /// Go on with what happens from now on.
    pub(crate) follow: bool,
}

/// `POST /v1/node`: the switch for new images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NodeRequest {
    Enable,
    Disable,
    Status,
}

/// Whether this node streams new images.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeStatus {
    /// New images are streamed where they can be.
    pub(crate) streaming: bool,
    /// Why not, if so.
    pub(crate) reason: Option<String>,
    /// The socket for containerd.
    pub(crate) snapshotter: PathBuf,
    pub(crate) images_in_use: usize,
}
