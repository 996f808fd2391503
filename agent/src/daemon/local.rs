//! The agent's local address: metrics, and a page that shows the node live. On loopback only, and read-only; off unless configured.
//!
//! What it shows is for people on the node, but browsers are not careful: a request that names another host in its `Host` header came by
//! a name that somebody pointed here, and is refused.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Stop;
use crate::node::Node;

const PAGE: &str = include_str!("live.html");

/// Listens, before anything is begun that a wrong address would leave behind.
pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    if !address.ip().is_loopback() {
        bail!("the local address {address} is not a loopback address");
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves until the daemon stops.
pub(super) fn serve(
    listener: TcpListener,
    node: Arc<Node>,
    mut stopped: watch::Receiver<Stop>,
) -> Result<()> {
    tracing::info!(address = %listener.local_addr()?, "metrics and the live page are here");
    let routes = axum::Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/v1/live", get(live))
        .merge(metrics_route())
        .layer(middleware::from_fn(only_local))
        .with_state(node);
    tokio::spawn(async move {
        let over = async move { drop(stopped.wait_for(|stop| *stop != Stop::No).await) };
        if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(over).await {
            tracing::warn!(%error, "the local address is not served any more");
        }
    });
    Ok(())
}

/// `GET /metrics`, also on the daemon's socket.
pub(super) fn metrics_route() -> axum::Router<Arc<Node>> {
    axum::Router::new().route("/metrics", get(metrics))
}

async fn only_local(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name =
        host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
    let local = name == "localhost"
        || name
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    if local { next.run(request).await } else { StatusCode::FORBIDDEN.into_response() }
}

async fn live(State(node): State<Arc<Node>>) -> Response {
    match node.status(None).await {
        Ok(status) => axum::Json(status).into_response(),
        Err(error) => failed(&error),
    }
}

async fn metrics(State(node): State<Arc<Node>>) -> Response {
    match node.metrics_text().await {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response()
}
