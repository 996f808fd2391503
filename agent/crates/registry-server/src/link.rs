//! Connections, through a link with a rate and a delay when one is asked for.
//!
//! The rate is shared by all connections, in small quanta; the delay applies to bytes, not to round trips, so that
//! transfers are pipelined as on a real link.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use crate::{Link, Shared, serve};

/// Bytes that travel together: small enough that connections share the link fairly.
const QUANTUM: usize = 32 * 1024;
/// Quanta on their way per direction and connection.
const IN_FLIGHT: usize = 512;
/// Shorter waits than this are not slept: timers have a resolution of a millisecond.
const TIMER: Duration = Duration::from_millis(1);

/// When the shared link is free again.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: Option<f64>,
    free_at: Mutex<Instant>,
}

impl Bucket {
    /// Waits for `len` bytes' turn.
    async fn pass(&self, len: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        let wait = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            // The link may have idled for a timer's resolution without losing its turn.
            let start = (*free_at).max(now - 2 * TIMER);
            *free_at = start + Duration::from_secs_f64(len as f64 / rate);
            free_at.saturating_duration_since(now)
        };
        if wait >= TIMER {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Takes connections until told to stop.
pub(crate) async fn accept(
    listener: TcpListener,
    link: Link,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
) {
    let bucket = Arc::new(Bucket {
        bytes_per_second: link.rate_bits_per_second.map(|bits| bits as f64 / 8.0),
        free_at: Mutex::new(Instant::now()),
    });
    let shaped = link.rate_bits_per_second.is_some() || !link.round_trip.is_zero();
    let mut ends = stopped.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ends.wait_for(|stop| *stop) => return,
        };
        let Ok((socket, _)) = accepted else { continue };
        let refuse = shared.faults.read().unwrap_or_else(PoisonError::into_inner).refuse;
        if refuse {
            continue;
        }
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let (shared, bucket, mut ends) = (Arc::clone(&shared), Arc::clone(&bucket), stopped.clone());
        tokio::spawn(async move {
            let work = async {
                if shaped {
                    let (near, far) = tokio::io::duplex(4 * QUANTUM);
                    tokio::join!(carry(socket, far, link.round_trip, bucket), connection(near, shared));
                } else {
                    connection(socket, shared).await;
                }
            };
            tokio::select! {
                () = work => {}
                _ = ends.wait_for(|stop| *stop) => {}
            }
        });
    }
}

async fn connection(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let service = hyper::service::service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, std::convert::Infallible>(serve::handle(request, shared).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let served = pin!(builder.serve_connection(TokioIo::new(io), service));
    if let Err(error) = served.await {
        tracing::debug!(error = error.to_string(), "a connection ended");
    }
}

/// Carries bytes between a client's socket and the server.
async fn carry(
    socket: tokio::net::TcpStream,
    server: tokio::io::DuplexStream,
    round_trip: Duration,
    bucket: Arc<Bucket>,
) {
    let (client_read, client_write) = socket.into_split();
    let (server_read, server_write) = tokio::io::split(server);
    let unlimited = Arc::new(Bucket { bytes_per_second: None, free_at: Mutex::new(Instant::now()) });
    // The handshake: the first request arrives a round trip late.
    let set_up = Instant::now() + round_trip;
    let there = direction(client_read, server_write, round_trip / 2, unlimited, set_up);
    let back = direction(server_read, client_write, round_trip / 2, bucket, set_up);
    tokio::join!(there, back);
}

async fn direction(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    delay: Duration,
    bucket: Arc<Bucket>,
    not_before: Instant,
) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(IN_FLIGHT);
    let reading = async move {
        loop {
            let mut buffer = vec![0; QUANTUM];
            match from.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    buffer.truncate(len);
                    bucket.pass(len).await;
                    let due = (Instant::now() + delay).max(not_before);
                    if sender.send((due, buffer)).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let writing = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            if due > Instant::now() {
                tokio::time::sleep_until(due.into()).await;
            }
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        if let Err(error) = to.shutdown().await {
            tracing::trace!(%error, "a connection was closed already");
        }
    };
    tokio::join!(reading, writing);
}
