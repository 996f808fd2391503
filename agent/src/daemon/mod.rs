//! The daemon: the node's state behind HTTP on a unix socket.
//!
//! Handlers only translate between the wire and [`Node`]; what happens stands there.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::body::{Body, Bytes};
use axum::extract::{Json, State};
use axum::response::Response;
use axum::routing::post;
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};

use crate::api::{
    AcquireRequest, Event, EventsRequest, ImageRequest, NodeRequest, ProfileRequest, ReleaseRequest,
    StopRequest, UpgradeRequest,
};
use crate::config::Config;
use crate::journal::NodeEvent;
use crate::node::{Node, Over};

mod local;
mod snapshots;
mod sockets;
mod upgrade;

pub(crate) use sockets::are_inherited as has_inherited_sockets;
pub(crate) use upgrade::{CAN_FOLLOW, become_successor, own_arguments};

/// Events that may wait for a slow reader before the work is held up.
const EVENTS_WAITING: usize = 64;
/// How long what was asked may still take when the daemon stops: a slow registry would hold it up for minutes.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// How long connections whose requests were cut short may take to end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Whether and how a daemon is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It is not.
    No,
    /// Images in use are left to the next one.
    Leave,
    /// Images in use are unmounted.
    Drain,
    /// Images in use are left to this program, which takes the daemon's place.
    Follow(PathBuf),
}

/// A daemon that runs inside this process.
#[derive(Debug)]
pub(crate) struct Running {
    node: Arc<Node>,
    stop: watch::Sender<Stop>,
    cut: watch::Sender<bool>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    snapshots: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Ends it: no more requests, state flushed, images in use left to the next agent or, with `drain`, unmounted.
    /// Requests that take longer than [`LAST_ANSWERS`] are cut short: who asked asks the next daemon.
    pub(crate) async fn stop(mut self, drain: bool) -> Result<()> {
        self.stop.send_replace(Stop::Leave);
        if !self.answered_within(LAST_ANSWERS).await? {
            tracing::warn!("requests under way are cut short");
            self.cut.send_replace(true);
            if !self.answered_within(LAST_WORDS).await? {
                // A client that takes no answer: its connection ends with the process.
                self.server.abort();
            }
        }
        self.snapshots.await.context("the snapshotter ended badly")?;
        if drain { self.node.drain().await } else { self.node.leave().await }
    }

    /// Whether all requests were answered within `limit`.
    async fn answered_within(&mut self, limit: Duration) -> Result<bool> {
        match tokio::time::timeout(limit, &mut self.server).await {
            Ok(served) => served.context("the server ended badly")?.map(|()| true).map_err(Into::into),
            Err(_elapsed) => Ok(false),
        }
    }

    /// Ready when this daemon cannot go on, and another one can.
    pub(crate) async fn needs_another(&self) {
        self.node.server_lost().await;
    }

    /// Waits until a client asked the daemon to stop.
    pub(crate) async fn asked_to_stop(&self) -> Stop {
        let mut stop = self.stop.subscribe();
        match stop.wait_for(|stop| *stop != Stop::No).await {
            Ok(stop) => stop.clone(),
            Err(_closed) => Stop::Leave,
        }
    }
}

#[derive(Clone)]
struct Shared {
    node: Arc<Node>,
    stop: watch::Sender<Stop>,
    /// True once requests under way are not to be answered any more.
    cut: watch::Sender<bool>,
}

/// Opens the node's state and its socket.
pub(crate) async fn start(config: Arc<Config>) -> Result<Running> {
    let inherited = sockets::Inherited::take()?;
    let socket = config.socket();
    let local = match config.local {
        Some(address) => Some(local::listen(address).await?),
        None => None,
    };
    let listener = inherited.get(&socket)?;
    if listener.is_none() {
        // Before its end is waited for.
        refuse_second(&socket).await?;
    }
    let node = Node::start(Arc::clone(&config)).await?;
    let listener = match listener {
        Some(listener) => tokio::net::UnixListener::from_std(listener)?,
        None => bind(&socket).await?,
    };
    let (stop, mut stopped) = watch::channel(Stop::No);
    let cut = watch::Sender::new(false);
    let shared = Shared { node: Arc::clone(&node), stop: stop.clone(), cut: cut.clone() };
    let server = tokio::spawn(
        axum::serve(listener, routes(shared))
            .with_graceful_shutdown(async move {
                if stopped.wait_for(|stop| *stop != Stop::No).await.is_err() {
                    tracing::debug!("the stop channel closed");
                }
            })
            .into_future(),
    );
    if let Some(listener) = local {
        local::serve(listener, Arc::clone(&node), stop.subscribe())?;
    }
    let snapshots = snapshots::start(&config, &node, &inherited, stop.subscribe()).await?;
    Ok(Running { node, stop, cut, server, snapshots })
}

/// Listens in the place of a daemon that is gone.
async fn bind(socket: &Path) -> Result<tokio::net::UnixListener> {
    refuse_second(socket).await?;
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error)
                .with_context(|| format!("cannot remove the stale socket {}", socket.display()));
        }
        _ => {}
    }
    let listener = tokio::net::UnixListener::bind(socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", socket.display()))?;
    Ok(listener)
}

async fn refuse_second(socket: &Path) -> Result<()> {
    if tokio::net::UnixStream::connect(socket).await.is_ok() {
        bail!("a daemon already listens on {}", socket.display());
    }
    Ok(())
}

fn routes(shared: Shared) -> axum::Router {
    let metrics = local::metrics_route().with_state(Arc::clone(&shared.node));
    axum::Router::new()
        .route("/v1/acquire", post(acquire))
        .route("/v1/release", post(release))
        .route("/v1/ready", post(ready))
        .route("/v1/profiles", post(profiles))
        .route("/v1/pull", post(pull))
        .route("/v1/status", post(status))
        .route("/v1/remove", post(remove))
        .route("/v1/gc", post(gc))
        .route("/v1/fsck", post(fsck))
        .route("/v1/events", post(events))
        .route("/v1/node", post(node))
        .route("/v1/stop", post(stop))
        .route("/v1/upgrade", post(upgrade))
        .with_state(shared)
        .merge(metrics)
}

async fn acquire(State(shared): State<Shared>, Json(request): Json<AcquireRequest>) -> Response {
    answer(shared.cut.subscribe(), move |events| async move { shared.node.acquire(request, events).await })
}

async fn release(State(shared): State<Shared>, Json(request): Json<ReleaseRequest>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move { shared.node.release(&request.holder).await })
}

async fn ready(State(shared): State<Shared>, Json(request): Json<ReleaseRequest>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move {
        Ok(shared.node.end_start(&request.holder, Over::Ready).await)
    })
}

async fn profiles(State(shared): State<Shared>, Json(request): Json<ProfileRequest>) -> Response {
    answer(shared.cut.subscribe(), move |events| async move {
        match request {
            ProfileRequest::List { reference } => shared.node.describe_profiles(reference.as_deref(), false),
            ProfileRequest::Show { reference } => shared.node.describe_profiles(Some(&reference), true),
            ProfileRequest::Push { reference, pack } => {
                shared.node.push_profiles(&reference, pack, events).await
            }
            ProfileRequest::Pull { reference, start } => {
                Ok(vec![shared.node.pull_profile(&reference, &start, events).await?])
            }
            ProfileRequest::Remove { reference } => {
                shared.node.remove_profiles(&reference).map(|()| Vec::new())
            }
        }
    })
}

async fn pull(State(shared): State<Shared>, Json(request): Json<ImageRequest>) -> Response {
    answer(
        shared.cut.subscribe(),
        move |events| async move { shared.node.pull(&named(request)?, events).await },
    )
}

async fn status(State(shared): State<Shared>, Json(request): Json<ImageRequest>) -> Response {
    answer(
        shared.cut.subscribe(),
        move |_| async move { shared.node.status(request.reference.as_deref()).await },
    )
}

async fn remove(State(shared): State<Shared>, Json(request): Json<ImageRequest>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move { shared.node.remove(&named(request)?).await })
}

async fn gc(State(shared): State<Shared>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move { shared.node.gc().await })
}

async fn fsck(State(shared): State<Shared>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move { shared.node.fsck().await })
}

async fn events(State(shared): State<Shared>, Json(request): Json<EventsRequest>) -> Response {
    let mut stopped = shared.stop.subscribe();
    answer(shared.cut.subscribe(), move |sender| async move {
        let (kept, mut coming) = shared.node.journal.follow();
        for event in kept {
            sender.happened(event).await;
        }
        while request.follow && !sender.is_closed() {
            tokio::select! {
                event = coming.recv() => match event {
                    Ok(event) => sender.happened(event).await,
                    Err(RecvError::Lagged(lost)) => sender.note(format!("{lost} events were lost")),
                    Err(RecvError::Closed) => break,
                },
                () = sender.closed() => break,
                () = async { drop(stopped.wait_for(|stop| *stop != Stop::No).await) } => break,
            }
        }
        Ok(())
    })
}

async fn node(State(shared): State<Shared>, Json(request): Json<NodeRequest>) -> Response {
    answer(shared.cut.subscribe(), move |_| async move {
        match request {
            NodeRequest::Enable => shared.node.set_streaming(true)?,
            NodeRequest::Disable => shared.node.set_streaming(false)?,
            NodeRequest::Status => {}
        }
        Ok(shared.node.node_status())
    })
}

async fn stop(State(shared): State<Shared>, Json(request): Json<StopRequest>) -> Response {
    shared.stop.send_replace(if request.drain { Stop::Drain } else { Stop::Leave });
    // Its number: a socket that a service manager listens on does not tell.
    answer(shared.cut.subscribe(), |_| async { Ok(std::process::id()) })
}

async fn upgrade(State(shared): State<Shared>, Json(request): Json<UpgradeRequest>) -> Response {
    answer(shared.cut.subscribe(), |_| async move {
        let program = upgrade::successor(request.program).await?;
        shared.stop.send_replace(Stop::Follow(program.clone()));
        Ok(program)
    })
}

fn named(request: ImageRequest) -> Result<String> {
    request.reference.context("the request names no image")
}

/// Runs `work` to its end even if the client goes away, and streams its events, one JSON object a line. When it is `cut` short the
/// answer ends without a result.
fn answer<F, T>(cut: watch::Receiver<bool>, work: impl FnOnce(EventSender) -> F) -> Response
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Serialize,
{
    let (sender, receiver) = mpsc::channel(EVENTS_WAITING);
    let events = EventSender { sender };
    let work = work(events.clone());
    let also_cut = cut.clone();
    tokio::spawn(async move {
        let worked = tokio::select! {
            worked = work => worked,
            () = is_cut(cut) => return,
        };
        let last = match worked.and_then(|result| Ok(serde_json::to_value(result)?)) {
            Ok(result) => Event::Done { result },
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "request failed");
                Event::Failed { message: format!("{error:#}") }
            }
        };
        if events.sender.send(last).await.is_err() {
            tracing::debug!("the client left before the answer");
        }
    });
    // What the work started may hold its events for longer than it lasts.
    let lines = futures::stream::unfold(receiver, move |mut receiver| {
        let cut = also_cut.clone();
        async move {
            let event: Event = tokio::select! {
                biased;
                event = receiver.recv() => event?,
                () = is_cut(cut) => return None,
            };
            let line = serde_json::to_vec(&event).map(|mut line| {
                line.push(b'\n');
                Bytes::from(line)
            });
            Some((line, receiver))
        }
    });
    Response::new(Body::from_stream(lines))
}

/// Ready when requests are cut short.
async fn is_cut(mut cut: watch::Receiver<bool>) {
    if cut.wait_for(|cut| *cut).await.is_err() {
        // The daemon went without cutting anything short.
        std::future::pending().await
    }
}

/// Where a long operation says how far it is.
#[derive(Debug, Clone)]
pub(crate) struct EventSender {
    sender: mpsc::Sender<Event>,
}

impl EventSender {
    /// Events go to `sender`.
    pub(crate) fn new(sender: mpsc::Sender<Event>) -> Self {
        Self { sender }
    }

    /// Something happened to an image: waits for a slow reader.
    async fn happened(&self, event: NodeEvent) {
        if let Err(error) = self.sender.send(Event::Happened { what: event }).await {
            tracing::trace!(%error, "an event found no reader");
        }
    }

    /// Ready when the client went away.
    async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Something the user should know.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.offer(Event::Note { text: text.into() });
    }

    /// How far the operation is.
    pub(crate) fn progress(&self, bytes_done: u64, bytes_total: u64) {
        self.offer(Event::Progress { bytes_done, bytes_total });
    }

    /// True when the client went away.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    fn offer(&self, event: Event) {
        if let Err(error) = self.sender.try_send(event) {
            tracing::trace!(%error, "an event found no reader");
        }
    }
}
