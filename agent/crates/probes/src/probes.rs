//! The probes of the running kernel: loaded, attached, read.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap as KernelMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::{Ebpf, EbpfLoader};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_events::{Drop as Lost, FillKey, FillValue, WatchBucket, watch_bucket};
use sluice_trace::{Capability, Level, Levels, What};
use zerocopy::FromBytes;

use crate::attach::{self, Link};
use crate::btf::{Btf, BtfError};
use crate::choose::{choose, kernel_types, words};
use crate::decode::{self, Event, RecordError};
use crate::hooks::Hook;
use crate::{Device, offsets, resolve, trampoline};

#[cfg(with_object)]
const OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("SLUICE_EBPF_OBJECT_PATH")));
#[cfg(not(with_object))]
const OBJECT: Option<&[u8]> = None;

pub(crate) const TRACEFS: &str = "/sys/kernel/tracing";

/// Why there are no probes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// This program was built without the eBPF toolchain.
    #[error("probes are not built in: this program was built without `cargo xtask ebpf`")]
    NotBuiltIn,
    /// The kernel does not describe its types.
    #[error("the kernel cannot be probed")]
    Types(#[from] BtfError),
    /// The kernel refuses the maps or the object: no right to use eBPF, or too old.
    #[error("the kernel refuses eBPF")]
    Refused(#[source] Box<aya::EbpfError>),
    /// The object lacks a map: another build's.
    #[error("the eBPF object has no map {0}")]
    NoMap(&'static str),
    /// A map cannot be read or written.
    #[error("the map {name} cannot be used")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<MapError>,
    },
    /// A program that could be attached when loading cannot be attached any more.
    #[error("cannot attach: {0}")]
    Attach(String),
    /// The object's records are of another version.
    #[error("the kernel's records are not understood")]
    Record(#[from] RecordError),
    /// There is no place left for the device's number among those that are watched.
    #[error("too many file systems are watched at once")]
    TooMany,
    /// Waiting failed.
    #[error("cannot wait for records")]
    Wait(#[source] nix::Error),
}

/// What to load.
#[derive(Debug, Clone)]
pub struct Options {
    /// Size of the ring buffer in bytes; a power of two of at least 4096.
    pub ring_bytes: u32,
    /// The highest level to use: lower ones exist for kernels that refuse it, and tests run with each.
    pub highest: Level,
    /// What to see.
    pub capabilities: Vec<Capability>,
    /// How long programs stay attached after the last file system is watched no more: containers come in bursts.
    pub linger: Duration,
}

impl Default for Options {
    /// Everything by the best hook, 4 MiB (a second of 50,000 opens), 10 s.
    fn default() -> Self {
        let (capabilities, linger) = (Capability::ALL.to_vec(), Duration::from_secs(10));
        Self { ring_bytes: 4 << 20, highest: Level::Fexit, capabilities, linger }
    }
}

/// What was lost since loading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Losses {
    /// Records that found the ring buffer full.
    pub records: u64,
    /// Page-cache fills (or sleeps) that found their map full.
    pub fills: u64,
    /// Failed calls beyond the limit per second.
    pub failures: u64,
}

impl Losses {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.records.saturating_add(self.fills).saturating_add(self.failures)
    }
}

/// Loaded probes. Dropping them takes them out of the kernel.
pub struct Probes {
    bpf: Ebpf,
    levels: Levels,
    /// Attached while something is watched.
    recording: Vec<Hook>,
    links: Vec<Link>,
    linger: Duration,
    /// Since when nothing is watched.
    idle_since: Option<Instant>,
    /// Takes links that are not needed any more out of the kernel.
    detaching: Option<JoinHandle<()>>,
    /// Attached all the time.
    _always: Vec<Link>,
    watched: Array<MapData, WatchBucket>,
    /// Tells the programs that what is watched has changed.
    round: Array<MapData, u32>,
    /// Device by the number of the watch, as long as its entries may be in the kernel's maps.
    watches: HashMap<u32, Device>,
    active: HashMap<Device, u32>,
    last_watch: u32,
    events: Events,
    filled: KernelMap<MapData, [u8; size_of::<FillKey>()], [u8; size_of::<FillValue>()]>,
    drops: PerCpuArray<MapData, u64>,
}

impl std::fmt::Debug for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probes")
            .field("levels", &self.levels)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

impl Probes {
    /// Whether this program was built with probes.
    pub const BUILT_IN: bool = OBJECT.is_some();

    /// Loads what the kernel can do. Needs root, and the kernel's type information (stock kernels since 5.10 have it).
    ///
    /// Mounts tracefs at its usual place if it is not there: system-call tracepoints are found through it.
    pub fn load(options: &Options) -> Result<Self, ProbeError> {
        Self::load_and_tell(options, || {})
    }

    /// The same, and calls `stays` whenever something was attached that stays so until these probes are dropped. Whoever keeps a copy of
    /// its descriptor (`anon_inode:bpf_link` or `anon_inode:[perf_event]`) keeps it attached, and takes over the time of detaching.
    pub fn load_and_tell(options: &Options, mut stays: impl FnMut()) -> Result<Self, ProbeError> {
        let object = OBJECT.ok_or(ProbeError::NotBuiltIn)?;
        let types = Btf::running()?;
        let offsets = offsets::resolve(&types);
        let mut loader = EbpfLoader::new();
        let words = zerocopy::transmute_ref!(&offsets);
        let global: &[u32; size_of::<sluice_events::Offsets>() / 4] = words;
        loader.btf(None).override_global("OFFSETS", global.as_slice(), true);
        loader.map_max_entries("EVENTS", options.ring_bytes);
        let mut bpf = loader.load(object).map_err(|source| ProbeError::Refused(Box::new(source)))?;
        mount_tracefs();
        let no_trampolines = trampoline::refused(&types);
        drop(types);
        let chosen = choose(&mut bpf, options, &offsets, no_trampolines, &mut stays);
        Ok(Self {
            watched: map(&mut bpf, "WATCHED")?,
            round: map(&mut bpf, "ROUND")?,
            events: Events::new(bpf.take_map("EVENTS").ok_or(ProbeError::NoMap("EVENTS"))?)?,
            filled: map(&mut bpf, "FILLED")?,
            drops: map(&mut bpf, "DROPS")?,
            bpf,
            levels: chosen.levels,
            recording: chosen.recording,
            links: Vec::new(),
            linger: options.linger,
            idle_since: None,
            detaching: None,
            _always: chosen.always,
            watches: HashMap::new(),
            active: HashMap::new(),
            last_watch: 0,
        })
    }

    /// What is seen, and by what.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// Does already what the first watch would take a few milliseconds for; kept as long as after the last watch.
    pub fn prepare(&mut self) -> Result<(), ProbeError> {
        if self.links.is_empty() {
            self.attach()?;
        }
        if self.active.is_empty() {
            self.idle_since = Some(Instant::now());
        }
        self.events.mapped().map(|_ring| ())
    }

    /// Begins to record what is done with a file system; anew if it is watched already, so that pages count as not
    /// touched. The first watch attaches the programs.
    pub fn watch(&mut self, device: Device) -> Result<(), ProbeError> {
        self.prepare()?;
        self.last_watch = self.last_watch.wrapping_add(1);
        let Device(number) = device;
        self.say_watched(number, self.last_watch)?;
        self.begin_round()?;
        self.idle_since = None;
        self.active.insert(device, self.last_watch);
        // What an earlier watch of the device left in the maps is stale now.
        self.watches.retain(|_, watched| *watched != device);
        self.watches.insert(self.last_watch, device);
        Ok(())
    }

    /// Ends it. What was recorded can still be drained. Some time after the last one the programs are detached.
    pub fn unwatch(&mut self, device: Device) -> Result<(), ProbeError> {
        if self.active.remove(&device).is_some() {
            let Device(number) = device;
            self.say_watched(number, 0)?;
            self.last_watch = self.last_watch.wrapping_add(1);
            self.begin_round()?;
        }
        if self.active.is_empty() {
            self.idle_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Tells the programs the number of the watch of a device; 0: none.
    fn say_watched(&mut self, device: u32, watch: u32) -> Result<(), ProbeError> {
        let place = watch_bucket(device);
        let mut bucket = self.watched.get(&place, 0).map_err(used("WATCHED"))?;
        let is_its = |entry: &&mut u64| **entry >> 32 == u64::from(device);
        let entry = match bucket.iter_mut().find(is_its) {
            Some(entry) => entry,
            None => bucket.iter_mut().find(|entry| **entry == 0).ok_or(ProbeError::TooMany)?,
        };
        *entry = if watch == 0 { 0 } else { u64::from(device) << 32 | u64::from(watch) };
        self.watched.set(place, bucket, 0).map_err(used("WATCHED"))
    }

    /// What programs remember of what is watched does not hold any more.
    fn begin_round(&mut self) -> Result<(), ProbeError> {
        self.round.set(0, self.last_watch, 0).map_err(used("ROUND"))
    }

    fn attach(&mut self) -> Result<(), ProbeError> {
        // What is still attached cannot be attached once more. Only who watches just when the others are detached waits.
        if let Some(thread) = self.detaching.take() {
            thread.join().unwrap_or_else(|_panic| tracing::error!("detaching probes failed"));
        }
        for hook in &self.recording {
            match attach_one(&mut self.bpf, *hook) {
                Ok(links) => self.links.extend(links),
                Err(error) => {
                    self.links.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Detaches what nobody has needed for a while.
    fn detach_if_idle(&mut self) {
        if self.idle_since.is_some_and(|since| since.elapsed() > self.linger) {
            self.idle_since = None;
            let links = std::mem::take(&mut self.links);
            // The kernel takes up to 70 ms per system-call tracepoint (6.18), for which nobody needs to wait.
            self.detaching = Some(std::thread::spawn(move || drop(links)));
        }
    }

    /// Waits until 256 KiB of records are there, or so long. Fewer do not wake anybody: drain now and then.
    pub fn wait(&self, at_most: Duration) -> Result<(), ProbeError> {
        let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(ProbeError::Wait(error)),
        }
    }

    /// Takes all records that are there, in the order in which the kernel made them; returns how many.
    ///
    /// Does not wait for records. Looks up in `/proc` what failed calls were about if the kernel's record does not say.
    pub fn drain(&mut self, mut sink: impl FnMut(Event)) -> Result<usize, ProbeError> {
        let mut count = 0;
        let ring = self.events.mapped()?;
        while let Some(item) = ring.next() {
            let mut event = decode::event(&item)?;
            if let What::Failed(call) = &mut event.record.what {
                resolve::complete(call, &event.record.process);
            }
            sink(event);
            count += 1;
        }
        self.detach_if_idle();
        if self.links.is_empty() {
            self.events.unmap();
        }
        Ok(count)
    }

    /// Takes the pages that came into the page cache from mount namespace `mnt_ns` (`None`: from all) since the watch of
    /// `device` began. In no order; take them when recording is over, since a page that comes while its neighbours
    /// are taken may be lost.
    pub fn take_fills(
        &mut self,
        device: Device,
        mnt_ns: Option<u32>,
        mut sink: impl FnMut(Event),
    ) -> Result<(), ProbeError> {
        let keys: Result<Vec<_>, MapError> = self.filled.keys().collect();
        for bytes in keys.map_err(used("FILLED"))? {
            let Ok(key) = FillKey::read_from_bytes(&bytes) else { continue };
            let known = self.watches.get(&key.watch);
            let stale = known.is_none();
            let wanted = known == Some(&device) && mnt_ns.is_none_or(|wanted| wanted == key.mnt_ns);
            if !stale && !wanted {
                continue;
            }
            let value = match self.filled.get(&bytes, 0) {
                Ok(value) => value,
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(used("FILLED")(error)),
            };
            match self.filled.remove(&bytes) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(used("FILLED")(error)),
            }
            if let Ok(value) = FillValue::read_from_bytes(&value)
                && !stale
            {
                decode::fills(&key, &value, device, &mut sink);
            }
        }
        Ok(())
    }

    /// What was lost since loading.
    pub fn losses(&self) -> Result<Losses, ProbeError> {
        let sum = |what: Lost| -> Result<u64, ProbeError> {
            let values = self.drops.get(&(what as u32), 0).map_err(used("DROPS"))?;
            Ok(values.iter().sum())
        };
        Ok(Losses {
            records: sum(Lost::RingFull)?,
            fills: sum(Lost::FillMapFull)?,
            failures: sum(Lost::TooManyFailures)?,
        })
    }
}

impl AsFd for Probes {
    /// Wakes when 256 KiB of records are there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.map.fd().as_fd()
    }
}

/// The ring buffer of records. Mapped it counts as resident twice its size, since the kernel maps all of it, two times in a row: so it is
/// only while something is recorded, and for a moment now and then.
struct Events {
    /// Kept: programs that are loaded anew name it by its descriptor.
    map: MapData,
    ring: Option<RingBuf<MapData>>,
}

impl Events {
    fn new(map: Map) -> Result<Self, ProbeError> {
        let Map::RingBuf(map) = map else { return Err(ProbeError::NoMap("EVENTS")) };
        Ok(Self { map, ring: None })
    }

    fn mapped(&mut self) -> Result<&mut RingBuf<MapData>, ProbeError> {
        let ring = match self.ring.take() {
            Some(ring) => ring,
            None => {
                let map = self.map.fd().as_fd().try_clone_to_owned().map_err(MapError::from);
                let data = map.and_then(MapData::from_fd).map_err(used("EVENTS"))?;
                RingBuf::try_from(Map::RingBuf(data)).map_err(used("EVENTS"))?
            }
        };
        Ok(self.ring.insert(ring))
    }

    fn unmap(&mut self) {
        self.ring = None;
    }
}

fn attach_one(bpf: &mut Ebpf, hook: Hook) -> Result<Vec<Link>, ProbeError> {
    attach::attach_again(bpf, kernel_types, hook).map_err(|error| ProbeError::Attach(words(&error)))
}

fn map<T: TryFrom<Map, Error = MapError>>(bpf: &mut Ebpf, name: &'static str) -> Result<T, ProbeError> {
    let found = bpf.take_map(name).ok_or(ProbeError::NoMap(name))?;
    T::try_from(found).map_err(used(name))
}

fn used(name: &'static str) -> impl Fn(MapError) -> ProbeError {
    move |source| ProbeError::Map { name, source: Box::new(source) }
}

/// Where it cannot be mounted, system-call tracepoints are missing, which the levels say.
fn mount_tracefs() {
    if Path::new(TRACEFS).join("events").exists() {
        return;
    }
    let none: Option<&str> = None;
    let flags =
        nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    if let Err(error) = nix::mount::mount(Some("tracefs"), TRACEFS, Some("tracefs"), flags, none) {
        tracing::warn!(%error, "cannot mount tracefs at {TRACEFS}");
    }
}

#[cfg(test)]
mod tests {
    use aya::programs::Program;

    use super::*;

    #[test]
    fn what_finds_no_place_is_not_watched_and_leaves_the_others() {
        let mut probes = Probes::load(&Options::default()).expect("loads");
        let devices = [1, 2, 3].map(|number| Device(number * sluice_events::WATCH_BUCKETS));
        let [first, second, third] = devices;
        probes.watch(first).expect("watched");
        probes.watch(second).expect("watched");
        probes.watch(first).expect("anew, in its own place");
        assert!(matches!(probes.watch(third), Err(ProbeError::TooMany)));
        probes.unwatch(first).expect("unwatched");
        probes.watch(third).expect("in the place that is free now");
        probes.unwatch(second).expect("unwatched");
        probes.unwatch(third).expect("unwatched");
        assert_eq!(probes.watched.get(&0, 0).expect("read"), [0; 2]);
        assert!(matches!(probes.watch(first), Ok(())) && probes.idle_since.is_none());
    }

    /// As is done on 5.10, where a program at a function cannot be attached twice.
    #[test]
    fn programs_can_be_loaded_anew() {
        let mut probes = Probes::load(&Options::default()).expect("loads");
        for _ in 0..2 {
            probes.drain(|_event| {}).expect("drained");
            for hook in probes.recording.clone() {
                match probes.bpf.program_mut(hook.program()) {
                    Some(Program::RawTracePoint(one)) => one.unload().expect("unloaded"),
                    Some(Program::TracePoint(one)) => one.unload().expect("unloaded"),
                    // By functions: the kernel's own types are needed for that.
                    _ => continue,
                }
                attach::load(&mut probes.bpf, None, hook).expect("loaded anew");
            }
        }
    }
}
