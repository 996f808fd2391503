//! Connections, through a link with a rate and a delay when one is asked for.
//!
//! The rate is that of the answers and is shared by all connections, in small quanta; the delay applies to bytes, not to
//! round trips, so that transfers are pipelined as on a real link.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use crate::trial::{Flushed, Flushes};
use crate::{Link, Shared, serve};

/// Bytes that travel together: small enough that connections share the link fairly.
const LARGEST_QUANTUM: usize = 32 * 1024;
const SMALLEST_QUANTUM: usize = 1500;
/// At low rates a quantum takes no longer than this.
const QUANTUM_TIME: Duration = Duration::from_millis(2);
/// How late a timer may be on a busy machine without the link losing its rate: so much is kept at hand.
const LATENESS: Duration = Duration::from_millis(20);
/// Quanta on their way per direction and connection.
const IN_FLIGHT: usize = 512;
/// Shorter waits than this are not slept: timers have a resolution of a millisecond.
const TIMER: Duration = Duration::from_millis(1);
/// After a failed accept: with no descriptor left it would fail again at once, for as long as all are in use.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of answers that wait in a connection; what was not taken by a client was counted as sent.
const WRITE_BUFFER: usize = 128 * 1024;

/// The shared link in one direction.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: Option<f64>,
    free_at: Mutex<Instant>,
}

impl Bucket {
    fn new(bits_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bits_per_second.map(|bits| bits as f64 / 8.0),
            free_at: Mutex::new(Instant::now()),
        }
    }

    /// When `len` bytes that were there at `ready` have passed.
    fn pass(&self, len: usize, ready: Instant) -> Instant {
        let Some(rate) = self.bytes_per_second else { return ready };
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = (*free_at).max(ready) + Duration::from_secs_f64(len as f64 / rate);
        *free_at
    }

    /// Bytes that pass in `time`; with no rate, `without`.
    fn bytes_in(&self, time: Duration, without: usize) -> usize {
        self.bytes_per_second.map_or(without, |rate| (rate * time.as_secs_f64()) as usize)
    }

    fn quantum(&self) -> usize {
        self.bytes_in(QUANTUM_TIME, LARGEST_QUANTUM).clamp(SMALLEST_QUANTUM, LARGEST_QUANTUM)
    }
}

/// Takes connections until told to stop.
pub(crate) async fn accept(
    listener: TcpListener,
    link: Link,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
) {
    let bucket = Arc::new(Bucket::new(link.rate_bits_per_second));
    let shaped = link.rate_bits_per_second.is_some() || !link.round_trip.is_zero();
    let mut ends = stopped.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ends.wait_for(|stop| *stop) => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if shared.faults.read().unwrap_or_else(PoisonError::into_inner).refuse {
            continue;
        }
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let (shared, bucket, mut ends) = (Arc::clone(&shared), Arc::clone(&bucket), stopped.clone());
        tokio::spawn(async move {
            let work = async {
                if shaped {
                    let backlog = bucket.bytes_in(LATENESS, 1 << 20).clamp(64 * 1024, 1 << 20);
                    let (near, far) = tokio::io::duplex(backlog);
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
    let flushes = Arc::new(Flushes::default());
    let io = Flushed { inner: io, flushes: Arc::clone(&flushes) };
    let service = hyper::service::service_fn(move |request| {
        let (shared, flushes) = (Arc::clone(&shared), Arc::clone(&flushes));
        async move { Ok::<_, std::convert::Infallible>(serve::handle(request, shared, &flushes).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().max_buf_size(WRITE_BUFFER);
    let served = pin!(builder.serve_connection(TokioIo::new(io), service));
    if let Err(error) = served.await {
        tracing::debug!(error = error.to_string(), "a connection ended");
    }
}

/// Carries bytes between a client's socket and the server.
async fn carry(
    socket: TcpStream,
    server: tokio::io::DuplexStream,
    round_trip: Duration,
    bucket: Arc<Bucket>,
) {
    let (client_read, client_write) = socket.into_split();
    let (server_read, server_write) = tokio::io::split(server);
    let unlimited = Arc::new(Bucket::new(None));
    // The handshake: nothing leaves the client before a round trip is over.
    let set_up = Instant::now() + round_trip;
    let there = direction(client_read, server_write, round_trip / 2, unlimited, set_up);
    let back = direction(server_read, client_write, round_trip / 2, bucket, set_up);
    tokio::join!(there, back);
}

async fn direction(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    delay: Duration,
    bucket: Arc<Bucket>,
    not_before: Instant,
) {
    let quantum = bucket.quantum();
    let on_the_way = bucket.bytes_in(delay + LATENESS, IN_FLIGHT * quantum).div_ceil(quantum);
    let (sender, receiver) = mpsc::channel(on_the_way.clamp(8, IN_FLIGHT));
    tokio::join!(take(from, sender, delay, bucket, quantum, not_before), give(receiver, to));
}

/// Reads at the link's rate, and says when each piece is due.
async fn take(
    mut from: impl AsyncRead + Unpin,
    sender: mpsc::Sender<(Instant, Vec<u8>)>,
    delay: Duration,
    bucket: Arc<Bucket>,
    quantum: usize,
    not_before: Instant,
) {
    let mut passed = not_before;
    loop {
        let mut buffer = vec![0; quantum];
        // What is there already has waited since the piece before it passed, however late this task was woken.
        let (read, ready) = match from.read(&mut buffer).now_or_never() {
            Some(read) => (read, passed.max(Instant::now() - LATENESS)),
            None => (from.read(&mut buffer).await, Instant::now().max(not_before)),
        };
        match read {
            Ok(0) => return,
            Err(error) => {
                tracing::trace!(%error, "a connection broke");
                return;
            }
            Ok(len) => {
                buffer.truncate(len);
                passed = bucket.pass(len, ready);
                if passed.saturating_duration_since(Instant::now()) >= TIMER {
                    tokio::time::sleep_until(passed.into()).await;
                }
                if sender.send((passed + delay, buffer)).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Writes each piece when it is due.
async fn give(mut receiver: mpsc::Receiver<(Instant, Vec<u8>)>, mut to: impl AsyncWrite + Unpin) {
    while let Some((due, bytes)) = receiver.recv().await {
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        if let Err(error) = to.write_all(&bytes).await {
            tracing::trace!(%error, "a connection broke");
            return;
        }
    }
    if let Err(error) = to.shutdown().await {
        tracing::trace!(%error, "a connection was closed already");
    }
}
