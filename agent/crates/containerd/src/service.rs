//! The snapshots API on a unix socket: a translation between gRPC and [`Snapshotter`].

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::proto::snapshots as wire;
use crate::proto::snapshots::snapshots_server::{Snapshots, SnapshotsServer};
use crate::proto::types;
use crate::snapshotter::{Mount, SnapshotError, Snapshotter, words};
use crate::state::{Kind, SnapshotInfo, StateError};

/// Snapshots in one message of a list.
const LISTED_AT_ONCE: usize = 100;

/// The socket cannot be served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Serving ended badly.
    #[error("serving snapshots ended")]
    Transport(#[from] tonic::transport::Error),
}

/// The listening socket, for root only.
#[derive(Debug)]
pub struct BoundSocket(UnixListener);

impl BoundSocket {
    /// Listens at `path`, in the place of a socket that nobody serves any more.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Socket { path: path.into(), source };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self(listener))
    }

    /// Takes over a socket that the service manager listens on already.
    pub fn inherited(listener: std::os::unix::net::UnixListener, path: &Path) -> Result<Self, ServeError> {
        let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        listener.map(Self).map_err(|source| ServeError::Socket { path: path.into(), source })
    }

    /// Serves until `stop` is ready and what is under way is answered.
    pub async fn serve(
        self,
        snapshotter: Arc<Snapshotter>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        self.serve_routes(Routes::new(SnapshotsServer::new(Service(snapshotter))), stop).await
    }

    /// Serves any gRPC services until `stop` is ready and what is under way is answered.
    pub async fn serve_routes(
        self,
        routes: Routes,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let server = tonic::transport::Server::builder().add_routes(routes);
        Ok(server.serve_with_incoming_shutdown(UnixListenerStream::new(self.0), stop).await?)
    }
}

struct Service(Arc<Snapshotter>);

/// errno-like codes as containerd's clients read them.
fn status(error: SnapshotError) -> Status {
    let text = words(&error);
    match error {
        SnapshotError::Served(_) | SnapshotError::State(StateError::Exists(_)) => {
            Status::already_exists(text)
        }
        SnapshotError::State(StateError::NotFound(_)) => Status::not_found(text),
        SnapshotError::State(StateError::State { .. }) => Status::failed_precondition(text),
        SnapshotError::State(StateError::Invalid(_)) | SnapshotError::Filter(_) => {
            Status::invalid_argument(text)
        }
        SnapshotError::Image { .. } => {
            tracing::warn!(error = text, "snapshot refused");
            Status::unavailable(text)
        }
        _ => {
            tracing::error!(error = text, "snapshot failed");
            Status::internal(text)
        }
    }
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

fn wire_mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let wire = |mount: Mount| types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(wire).collect()
}

fn wire_info(info: SnapshotInfo) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: info.name,
        parent: info.parent,
        kind: kind.into(),
        created_at: Some(timestamp(info.created)),
        updated_at: Some(timestamp(info.updated)),
        labels: info.labels.into_iter().collect(),
    }
}

fn timestamp(since_1970: Duration) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since_1970.subsec_nanos()).unwrap_or(0),
    }
}

#[tonic::async_trait]
impl Snapshots for Service {
    type ListStream = BoxStream<'static, Result<wire::ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let wire::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.0.prepare(&key, &parent, sorted(labels)).await.map_err(status)?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: wire_mounts(mounts) }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let wire::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.0.view(&key, &parent, sorted(labels)).await.map_err(status)?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts: wire_mounts(mounts) }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let mounts = self.0.mounts(&request.into_inner().key).await.map_err(status)?;
        Ok(Response::new(wire::MountsResponse { mounts: wire_mounts(mounts) }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let wire::CommitSnapshotRequest { key, name, labels, .. } = request.into_inner();
        self.0.commit(&key, &name, sorted(labels)).await.map_err(status)?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        self.0.remove(&request.into_inner().key).await.map_err(status)?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let info = self.0.stat(&request.into_inner().key).await.map_err(status)?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(wire_info(info)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let wire::UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.ok_or_else(|| Status::invalid_argument("the request names no snapshot"))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let info = self.0.update(&info.name, sorted(info.labels), paths).await.map_err(status)?;
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(wire_info(info)) }))
    }

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let infos = self.0.list(&request.into_inner().filters).await.map_err(status)?;
        let messages = futures::stream::iter(infos.into_iter().map(wire_info)).chunks(LISTED_AT_ONCE);
        Ok(Response::new(messages.map(|info| Ok(wire::ListSnapshotsResponse { info })).boxed()))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let usage = self.0.usage(&request.into_inner().key).await.map_err(status)?;
        Ok(Response::new(wire::UsageResponse {
            size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        self.0.cleanup().await.map_err(status)?;
        Ok(Response::new(()))
    }
}
