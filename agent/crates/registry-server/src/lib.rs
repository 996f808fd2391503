//! Embedded OCI registry over OCI layouts, with a shaped link and faults for trials.
//!
//! `root` is one OCI layout (served under every repository name) or a directory of them (repository = relative path). The
//! protocol is the OCI distribution specification 1.1: ranges, referrers, pushes.

mod access;
mod layout;
mod link;
mod serve;
mod session;
mod trial;
mod upload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

pub use access::{Access, Account};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Why the registry cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The directory.
    #[error("cannot use {} as a directory of OCI layouts", path.display())]
    Root {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The link carries nothing.
    #[error("a link of 0 bits per second carries nothing: leave the rate out for a link without a limit")]
    Rate,
}

/// The link that all clients share.
#[derive(Debug, Clone, Copy, Default)]
pub struct Link {
    /// Bits per second of the answers, at least 1; none: as fast as it goes.
    pub rate_bits_per_second: Option<u64>,
    /// Round-trip time; setting a connection up costs one, so that its first answer takes two.
    pub round_trip: Duration,
}

/// What goes wrong, for trials. `POST /_sluice/faults` changes it while the server runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Connections are closed as soon as they are made.
    pub refuse: bool,
    /// Only requests whose path contains this are affected by what follows.
    pub path: String,
    /// Answer with this status.
    pub status: Option<u16>,
    /// With `status` 429 or 503: `Retry-After` in seconds.
    pub retry_after: Option<u64>,
    /// With `status` 401: what it wants, as `WWW-Authenticate` says it.
    pub challenge: Option<String>,
    /// Answer requests for blobs with a redirect (307) to here.
    pub redirect: Option<String>,
    /// Answer requests for blobs with a redirect (307) to an address of this server that is refused (403) so many milliseconds later.
    pub expires_ms: Option<u64>,
    /// Answer 200 with the whole blob to ranges.
    pub ignore_ranges: bool,
    /// Break the body off after so many bytes; longer bodies only.
    pub truncate_at: Option<u64>,
    /// Invert a bit of the byte in the middle of the body.
    pub flip: bool,
    /// State one byte more than the range has, in `Content-Range` and `Content-Length`.
    pub wrong_length: bool,
    /// Send bodies so slowly: bytes per second, in pieces of a tenth of it.
    pub bytes_per_second: Option<u32>,
    /// Never finish the body: it stands still after `truncate_at` bytes, or half-way.
    pub stall: bool,
    /// How many requests are affected; none: all. A request whose answer stays as it would be is not counted.
    pub times: Option<u64>,
    /// Of the requests that could be affected one in so many is, always the same ones; 0 and 1: all.
    pub one_in: u64,
}

/// How a server is started.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// An OCI layout or a directory of them.
    pub root: PathBuf,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The link.
    pub link: Link,
    /// What goes wrong from the start.
    pub faults: Faults,
    /// Whether the referrers API is there.
    pub referrers_api: bool,
}

/// Counts since the start, or since `POST /_sluice/reset`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests of all kinds.
    pub requests: u64,
    /// Bytes of bodies sent, as far as connections took them; without those of `/_sluice/`.
    pub bytes_sent: u64,
    /// Of these, of blobs.
    pub blob_bytes_sent: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    blob_bytes: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) layouts: layout::Layouts,
    pub(crate) counters: Counters,
    pub(crate) faults: RwLock<Faults>,
    /// Requests that a fault with `one_in` could have affected.
    turn: AtomicU64,
    pub(crate) referrers_api: bool,
    pub(crate) gate: access::Gate,
}

impl Shared {
    /// The faults that a request for `path` may meet.
    pub(crate) fn faults_for(&self, path: &str) -> Option<Faults> {
        let faults = self.faults.read().unwrap_or_else(PoisonError::into_inner);
        (*faults != Faults::default() && path.contains(&faults.path)).then(|| faults.clone())
    }

    /// Counts one affected request; `false` if no more are to be affected.
    pub(crate) fn count_fault(&self) -> bool {
        let mut faults = self.faults.write().unwrap_or_else(PoisonError::into_inner);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if faults.one_in > 1 && !mix(turn).is_multiple_of(faults.one_in) {
            return false;
        }
        match &mut faults.times {
            Some(0) => false,
            Some(times) => {
                *times -= 1;
                true
            }
            None => true,
        }
    }
}

/// Scatters numbers (SplitMix64's last step), so that every n-th is no pattern.
fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A running registry. Dropped, it stops.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
}

impl Server {
    /// Starts to serve.
    pub async fn start(config: ServerConfig) -> Result<Self, ServeError> {
        if config.link.rate_bits_per_second == Some(0) {
            return Err(ServeError::Rate);
        }
        let layouts = layout::Layouts::open(&config.root)
            .map_err(|source| ServeError::Root { path: config.root.clone(), source })?;
        let failed = |source| ServeError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            layouts,
            counters: Counters::default(),
            faults: RwLock::new(config.faults),
            turn: AtomicU64::new(0),
            referrers_api: config.referrers_api,
            gate: access::Gate::default(),
        });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(link::accept(listener, config.link, Arc::clone(&shared), stopped));
        Ok(Self { address, shared, stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what goes wrong.
    pub fn set_faults(&self, faults: Faults) {
        *self.shared.faults.write().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Demands a login from now on, or none; tokens that were given out are void.
    pub fn set_access(&self, access: Option<Access>) {
        self.shared.gate.set(access);
    }

    /// What was sent so far.
    pub fn stats(&self) -> Stats {
        self.shared.counters.read()
    }

    /// Stops and closes all connections.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Counters {
    pub(crate) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sent(&self, bytes: u64, blob: bool) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if blob {
            self.blob_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> Stats {
        Stats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes_sent: self.bytes.load(Ordering::Relaxed),
            blob_bytes_sent: self.blob_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn reset(&self) {
        for counter in [&self.requests, &self.bytes, &self.blob_bytes] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}
