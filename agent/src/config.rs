//! Configuration: the raw TOML document and the command line's overrides, resolved once at start.
//!
//! Nothing below the binary reads the environment or a file of settings; it gets what is resolved here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use sluice_blockfs::{Choice, Options, Way};
use sluice_store::StoreLimits;

use crate::cli::Global;
use crate::logging::LogFormat;
use crate::node::{Guess, Mode};

const DEFAULT_CONFIG: &str = "/etc/sluice/config.toml";
const DEFAULT_ROOT: &str = "/var/lib/sluice";
const DEFAULT_STATE: &str = "/run/sluice";
const DEFAULT_CONTAINERD: &str = "/run/containerd/containerd.sock";

/// What the configuration file may say. Unknown keys are refused by name.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawConfig {
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    index_store: Option<String>,
    publish_index: Option<bool>,
    memory_limit_mib: Option<u64>,
    log_format: Option<LogFormat>,
    registry: RawRegistry,
    stream: RawStream,
    store: RawStore,
    blocks: RawBlocks,
    images: RawImages,
    containerd: RawContainerd,
    credentials: RawCredentials,
    prefetch: RawPrefetch,
    local: RawLocal,
    regressions: RawRegressions,
    probes: RawProbes,
    trust: RawTrust,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLocal {
    listen: Option<std::net::SocketAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawRegressions {
    enabled: Option<bool>,
    starts: Option<usize>,
    worse_by_percent: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawTrust {
    mode: Option<Mode>,
    keys: Option<Vec<PathBuf>>,
    sign_key: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawPrefetch {
    enabled: Option<bool>,
    record: Option<bool>,
    window_s: Option<u64>,
    in_flight: Option<usize>,
    rate_mbit: Option<u64>,
    guess: Option<Vec<Guess>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawProbes {
    enabled: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawImages {
    allow: Option<Vec<String>>,
    deny: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawContainerd {
    address: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawCredentials {
    cri_proxy: Option<bool>,
    provider_config: Option<PathBuf>,
    provider_bin_dir: Option<PathBuf>,
    pull_secrets: Option<PathBuf>,
    access_check_s: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawRegistry {
    hosts_dir: Option<PathBuf>,
    plain_http: Vec<String>,
    docker_config: Option<PathBuf>,
    extra_ca: Vec<PathBuf>,
    connections_per_host: Option<usize>,
    longest_retry_after_s: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawStream {
    outage_timeout_s: Option<u64>,
    fill: Option<bool>,
    enabled: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawStore {
    memory_budget_mib: Option<u64>,
    quota_mib: Option<u64>,
    reserve_mib: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawBlocks {
    way: RawWay,
    queue_depth: Option<u16>,
    one_device: bool,
    patience_s: Option<u64>,
}

/// How the kernel's reads reach us.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawWay {
    /// io_uring where the kernel has it.
    Auto,
    /// io_uring with zero copy where the kernel has it, else as `Auto`.
    ZeroCopy,
    IoUring,
    /// The default until io_uring is ahead for many readers, and never short of ring entries (see ARCHITECTURE.md).
    #[default]
    Classic,
}

impl RawBlocks {
    fn resolve(&self) -> Options {
        let default = Options::default();
        Options {
            choice: match self.way {
                RawWay::Auto => Choice::Auto,
                RawWay::ZeroCopy => Choice::ZeroCopy,
                RawWay::IoUring => Choice::Only(Way::IoUring),
                RawWay::Classic => Choice::Only(Way::Classic),
            },
            queue_depth: self.queue_depth.unwrap_or(default.queue_depth),
            patience: self.patience_s.map_or(default.patience, Duration::from_secs),
            ..default
        }
    }
}

impl RawRegressions {
    fn resolve(&self) -> Option<sluice_regress::Limits> {
        let default = sluice_regress::Limits::default();
        self.enabled.unwrap_or(true).then(|| sluice_regress::Limits {
            starts: self.starts.unwrap_or(default.starts),
            worse_by: self.worse_by_percent.map_or(default.worse_by, |percent| percent / 100.0),
            ..default
        })
    }
}

/// The daemon's memory if nothing is configured, in MiB.
const DEFAULT_MEMORY_MIB: u64 = 128;
/// What it takes with nothing under way, in MiB: program, probes, certificates, tables of the layers in use.
const IDLE_MIB: u64 = 64;
/// With less, too few transfers fit.
const LEAST_MEMORY_MIB: u64 = 96;
/// More transfers at once gain nothing.
const MOST_TRANSFERS: u64 = 64;

/// What a limit of memory is divided into: the idle daemon, verified bytes that wait for the disk, transfers for blocked processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All of it.
    pub(crate) limit_bytes: u64,
    /// Verified bytes that wait for a full disk.
    pub(crate) waiting_bytes: u64,
    /// Transfers at once; more reads wait for their turn.
    pub(crate) transfers: usize,
}

impl Memory {
    fn divide(limit_mib: u64) -> Result<Self> {
        if limit_mib < LEAST_MEMORY_MIB {
            bail!(
                "memory_limit_mib = {limit_mib} is too little: the daemon needs at least {LEAST_MEMORY_MIB}"
            );
        }
        let limit_bytes = limit_mib << 20;
        let waiting_bytes = limit_bytes / 16 * 3;
        let left = limit_bytes - (IDLE_MIB << 20) - waiting_bytes;
        // Background fetches and the start's prefetch take as many again as they may be under way at once.
        let background = (crate::node::BACKGROUND_FETCHES as u64) * sluice_stream::FETCH_BYTES;
        let transfers =
            (left.saturating_sub(background) / sluice_stream::FETCH_BYTES).clamp(1, MOST_TRANSFERS);
        Ok(Self { limit_bytes, waiting_bytes, transfers: transfers as usize })
    }
}

/// The resolved configuration of this process.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Directory of the layer store.
    pub(crate) root: PathBuf,
    /// Directory of sockets and mounts.
    pub(crate) state: PathBuf,
    /// How the log is written.
    pub(crate) log_format: LogFormat,
    /// Object store of stream indexes; the image's registry if none.
    pub(crate) index_store: Option<String>,
    /// Publish the index made by a first pull.
    pub(crate) publish_index: bool,
    /// containerd's tree of `hosts.toml` files.
    pub(crate) hosts_dir: Option<PathBuf>,
    /// Registries spoken to by http; `*` is all.
    pub(crate) plain_http: Vec<String>,
    /// Docker's `config.json`.
    pub(crate) docker_config: Option<PathBuf>,
    /// Certificates trusted besides the system's, PEM files.
    pub(crate) extra_ca: Vec<PathBuf>,
    /// Requests under way per registry host, over all images.
    pub(crate) connections_per_host: usize,
    /// A registry that asks for a longer pause is reported as busy instead of waited for.
    pub(crate) longest_retry_after: Duration,
    /// How long a blocked read waits for a registry that is away.
    pub(crate) outage_timeout: Duration,
    /// Fetch the rest of a streamed image in the background.
    pub(crate) fill: bool,
    /// What the daemon's memory is divided into.
    pub(crate) memory: Memory,
    /// What the layer store may take.
    pub(crate) store_limits: StoreLimits,
    /// How block files are served.
    pub(crate) blocks: Options,
    /// Attach an image as one block device, as kernels before 5.16 need it.
    pub(crate) one_device: bool,
    /// The file that all this comes from.
    pub(crate) file: Option<PathBuf>,
    /// Stream new images at all.
    pub(crate) streaming_enabled: bool,
    /// Patterns of references that may be streamed.
    pub(crate) allow: Vec<String>,
    /// Patterns of references that may not, whatever `allow` says.
    pub(crate) deny: Vec<String>,
    /// containerd's socket.
    pub(crate) containerd: PathBuf,
    /// Serve a CRI image service that learns the credentials of pulls.
    pub(crate) cri_proxy: bool,
    /// kubelet's `CredentialProviderConfig`, and the directory of the plugins.
    pub(crate) credential_providers: Option<(PathBuf, PathBuf)>,
    /// Directory of pull secrets.
    pub(crate) pull_secrets: Option<PathBuf>,
    /// How long a registry's word that a repository has a layer is believed.
    pub(crate) access_check: Duration,
    /// Fetch what profiles and start packs say.
    pub(crate) prefetch: bool,
    /// Record containers' starts.
    pub(crate) record: bool,
    /// Watch containers with eBPF probes.
    pub(crate) probes: bool,
    /// How long a start is recorded, if nothing says earlier that it is over.
    pub(crate) record_window: Duration,
    /// Prefetches of a start under way at once.
    pub(crate) prefetch_in_flight: usize,
    /// What is fetched ahead for a start of which nothing is known.
    pub(crate) guess: Vec<Guess>,
    /// Bound of what a start's prefetch takes of the link.
    pub(crate) prefetch_bytes_per_second: Option<u64>,
    /// Loopback address of metrics and the live page.
    pub(crate) local: Option<std::net::SocketAddr>,
    /// When starts count as worse than those before; none: nobody looks.
    pub(crate) regressions: Option<sluice_regress::Limits>,
    /// Whose stream indexes are believed.
    pub(crate) trust: Mode,
    /// Public keys of those who may sign them.
    pub(crate) keys: Vec<PathBuf>,
    /// Signs what this node publishes.
    pub(crate) sign_key: Option<PathBuf>,
}

impl Config {
    /// Reads the configuration file (a missing default one is empty) and applies the command line.
    pub(crate) fn resolve(global: &Global) -> Result<Self> {
        let raw = match &global.config {
            Some(path) => RawConfig::read(path)?,
            None if Path::new(DEFAULT_CONFIG).exists() => RawConfig::read(Path::new(DEFAULT_CONFIG))?,
            None => RawConfig::default(),
        };
        if raw.trust.mode == Some(Mode::Signed) && raw.trust.keys.as_ref().is_none_or(Vec::is_empty) {
            bail!("the trust mode is `signed`, but [trust] keys names no public key: no index would be used");
        }
        let mut plain_http = raw.registry.plain_http;
        plain_http.extend(global.plain_http.iter().cloned());
        let memory = Memory::divide(raw.memory_limit_mib.unwrap_or(DEFAULT_MEMORY_MIB))?;
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let docker_dir = std::env::var_os("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| home.map(|home| home.join(".docker")));
        Ok(Self {
            root: absolute(global.root.clone().or(raw.root).unwrap_or_else(|| DEFAULT_ROOT.into()))?,
            state: absolute(global.state.clone().or(raw.state).unwrap_or_else(|| DEFAULT_STATE.into()))?,
            log_format: global.log_format.or(raw.log_format).unwrap_or_default(),
            index_store: raw.index_store,
            publish_index: raw.publish_index.unwrap_or(true),
            hosts_dir: raw.registry.hosts_dir,
            plain_http,
            docker_config: raw
                .registry
                .docker_config
                .or_else(|| docker_dir.map(|dir| dir.join("config.json"))),
            extra_ca: raw.registry.extra_ca,
            connections_per_host: raw.registry.connections_per_host.unwrap_or(8),
            longest_retry_after: Duration::from_secs(raw.registry.longest_retry_after_s.unwrap_or(120)),
            outage_timeout: Duration::from_secs(raw.stream.outage_timeout_s.unwrap_or(600)),
            fill: raw.stream.fill.unwrap_or(true),
            memory,
            store_limits: StoreLimits {
                memory_budget_bytes: raw
                    .store
                    .memory_budget_mib
                    .map_or(memory.waiting_bytes, |mib| mib << 20),
                quota_bytes: raw.store.quota_mib.map(|mib| mib << 20),
                reserve_bytes: raw.store.reserve_mib.unwrap_or(64) << 20,
            },
            blocks: raw.blocks.resolve(),
            one_device: raw.blocks.one_device,
            file: global.config.clone(),
            streaming_enabled: raw.stream.enabled.unwrap_or(true),
            allow: raw.images.allow.unwrap_or_else(|| vec!["*".to_owned()]),
            deny: raw.images.deny,
            cri_proxy: raw.credentials.cri_proxy.unwrap_or(false),
            credential_providers: providers(&raw.credentials)?,
            pull_secrets: raw.credentials.pull_secrets,
            access_check: Duration::from_secs(raw.credentials.access_check_s.unwrap_or(600)),
            prefetch: raw.prefetch.enabled.unwrap_or(true),
            record: raw.prefetch.record.unwrap_or(true),
            probes: raw.probes.enabled.unwrap_or(true),
            record_window: Duration::from_secs(raw.prefetch.window_s.unwrap_or(30)),
            prefetch_in_flight: raw.prefetch.in_flight.unwrap_or(3).max(1),
            guess: raw.prefetch.guess.unwrap_or_else(|| vec![Guess::Elf]),
            prefetch_bytes_per_second: raw.prefetch.rate_mbit.map(|rate| rate.saturating_mul(125_000)),
            local: raw.local.listen,
            regressions: raw.regressions.resolve(),
            trust: raw.trust.mode.unwrap_or_default(),
            keys: raw.trust.keys.unwrap_or_default(),
            sign_key: raw.trust.sign_key,
            containerd: raw.containerd.address.unwrap_or_else(|| DEFAULT_CONTAINERD.into()),
        })
    }

    /// The daemon's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.state.join("sluice.sock")
    }

    /// The socket that containerd's proxy plugin is pointed at.
    pub(crate) fn snapshotter_socket(&self) -> PathBuf {
        self.state.join("snapshotter.sock")
    }

    /// The CRI image service that learns credentials.
    pub(crate) fn cri_socket(&self) -> PathBuf {
        self.state.join("cri.sock")
    }
}

impl RawConfig {
    fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not a valid configuration", path.display()))
    }
}

/// As kubelet's two flags: one makes no sense without the other.
fn providers(raw: &RawCredentials) -> Result<Option<(PathBuf, PathBuf)>> {
    match (raw.provider_config.clone(), raw.provider_bin_dir.clone()) {
        (Some(file), Some(programs)) => Ok(Some((file, programs))),
        (None, None) => Ok(None),
        _ => anyhow::bail!("[credentials] provider_config and provider_bin_dir go together"),
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).with_context(|| format!("cannot resolve {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = toml::from_str::<RawConfig>("[stream]\noutage = 3\n").expect_err("accepted");
        assert!(error.to_string().contains("outage"), "{error}");
    }

    #[test]
    fn memory_is_divided_without_rest_and_refused_if_too_little() {
        let error = Memory::divide(40).expect_err("accepted").to_string();
        assert!(error.contains("memory_limit_mib = 40") && error.contains("96"), "{error}");
        for mib in [LEAST_MEMORY_MIB, DEFAULT_MEMORY_MIB, 256, 1024] {
            let memory = Memory::divide(mib).expect("enough");
            let background = crate::node::BACKGROUND_FETCHES as u64;
            let transfers = (memory.transfers as u64 + background) * sluice_stream::FETCH_BYTES;
            let all = (IDLE_MIB << 20) + memory.waiting_bytes + transfers;
            assert!(memory.transfers >= 4 && all <= memory.limit_bytes, "{mib}: {memory:?}");
        }
    }

    #[test]
    fn sections_are_optional() {
        let raw: RawConfig =
            toml::from_str("root = \"/x\"\n[store]\nmemory_budget_mib = 5\n").expect("valid");
        assert_eq!(raw.store.memory_budget_mib, Some(5));
        assert_eq!(raw.root.as_deref(), Some(Path::new("/x")));
    }

    #[test]
    fn the_commented_file_names_every_key_and_is_valid_with_all_of_them() {
        let text = include_str!("../../deploy/config.toml");
        toml::from_str::<RawConfig>(text).expect("valid as it is installed");
        let is_key = |line: &str| {
            line.split_once(" = ")
                .is_some_and(|(key, _)| key.chars().all(|char| char.is_ascii_lowercase() || char == '_'))
        };
        let uncommented: Vec<&str> = text
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| is_key(rest)).unwrap_or(line))
            .collect();
        let raw: RawConfig = toml::from_str(&uncommented.join("\n")).expect("valid with every key");
        let said = format!("{raw:?}");
        assert!(!said.contains("None"), "a key is missing in the file: {said}");
    }
}
