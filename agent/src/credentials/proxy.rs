//! A CRI image service before containerd's: every call goes on to containerd unchanged, and the credentials of pulls are learned
//! on the way. kubelet is pointed at it (`imageServiceEndpoint`) where pods have pull secrets.
//!
//! Messages are passed on as bytes, so that any version of the API works; of `PullImage` alone we read what we know.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use sluice_containerd::BoundSocket;
use sluice_registry::{Credentials, Secret};
use tonic::Status;
use tonic::client::GrpcService;
use tonic::transport::{Channel, Endpoint};

use super::learned::{Learned, Trial};
use super::secrets::user_and_password;

/// A pull's messages have some KiB; Kubernetes objects at most a MiB or so.
const MAX_MESSAGE: usize = 4 << 20;
/// Of each message in a gRPC stream: compressed or not, and the length.
const FRAME_HEADER: usize = 5;

/// What we read of `runtime.v1.PullImageRequest`.
#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    /// Base64 of `user:password`.
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "5")]
    identity_token: String,
}

#[derive(Debug, Clone)]
struct Proxy {
    containerd: Channel,
    learned: Arc<Learned>,
}

/// Serves on `socket` until `stop` is ready.
pub(crate) async fn serve(
    socket: BoundSocket,
    containerd: &Path,
    learned: Arc<Learned>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let address = format!("unix://{}", containerd.display());
    let containerd = Endpoint::from_shared(address).context("containerd's address")?.connect_lazy();
    let router = axum::Router::new().fallback(forward).with_state(Proxy { containerd, learned });
    Ok(socket.serve_routes(tonic::service::Routes::from(router), stop).await?)
}

async fn forward(State(proxy): State<Proxy>, request: Request<Body>) -> Response<Body> {
    let answered = if request.uri().path() == "/runtime.v1.ImageService/PullImage" {
        proxy.pull(request).await
    } else {
        proxy.pass(request.map(tonic::body::Body::new)).await
    };
    answered.unwrap_or_else(|status| status.into_http::<Body>())
}

impl Proxy {
    /// A message and its answer, as they are.
    async fn pass(&self, request: Request<tonic::body::Body>) -> Result<Response<Body>, Status> {
        let mut containerd = self.containerd.clone();
        std::future::poll_fn(|context| containerd.poll_ready(context)).await.map_err(away)?;
        let answer = containerd.call(request).await.map_err(away)?;
        Ok(answer.map(Body::new))
    }

    async fn pull(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let bytes = Limited::new(body, MAX_MESSAGE).collect().await;
        let bytes = bytes.map_err(|error| Status::resource_exhausted(error.to_string()))?.to_bytes();
        let trial = self.begin(&bytes);
        let request = Request::from_parts(head, tonic::body::Body::new(Body::from(bytes)));
        let answer = self.pass(request).await;
        let Some(trial) = trial else { return answer };
        // Dropped without a success (a caller who left, too), it forgets what did not help.
        let (head, body) = answer?.into_parts();
        let body = Limited::new(body, MAX_MESSAGE).collect().await;
        let body = body.map_err(|error| Status::unavailable(error.to_string()))?;
        let good = |headers: &HeaderMap| headers.get("grpc-status").is_some_and(|status| status == "0");
        if (good(&head.headers) || body.trailers().is_some_and(good))
            && let Err(error) = trial.succeeded()
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "the next agent will not have this pull's credentials"
            );
        }
        Ok(Response::from_parts(head, Body::new(body)))
    }

    /// Learns the credentials of a pull. What cannot be read is left to containerd.
    fn begin(&self, frame: &Bytes) -> Option<Trial> {
        let compressed = *frame.first()? != 0;
        if compressed {
            tracing::debug!("a compressed pull: its credentials are not learned");
            return None;
        }
        let message = match PullImageRequest::decode(frame.get(FRAME_HEADER..)?) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%error, "a pull is not understood: its credentials are not learned");
                return None;
            }
        };
        let credentials = credentials(message.auth?)?;
        match self.learned.begin(&message.image?.image, credentials) {
            Ok(trial) => Some(trial),
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "no credentials are learned");
                None
            }
        }
    }
}

/// As containerd's CRI plugin reads them.
fn credentials(auth: AuthConfig) -> Option<Credentials> {
    if !auth.username.is_empty() {
        return Some(Credentials::Password(auth.username, Secret::new(auth.password)));
    }
    if !auth.identity_token.is_empty() {
        return Some(Credentials::Identity(Secret::new(auth.identity_token)));
    }
    user_and_password(&auth.auth)
}

fn away(error: tonic::transport::Error) -> Status {
    Status::unavailable(format!("containerd does not answer: {error}"))
}
