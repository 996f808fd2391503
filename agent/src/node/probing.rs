//! Probes in the daemon: loaded beside its start, and told which mounts to watch; what they see goes to the start that it
//! belongs to.
//!
//! Starts of one image share its mount, so that the device does not tell them apart: the mount namespace does. One that was there
//! before a recording began is never the start's. A new one belongs to the recording whose holder is an ancestor of the process, else
//! to that of the namespace that an ancestor is in, else to the oldest recording of the mount that has none yet.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_probes::{Device, Event, Losses, Options, Probes, mount_namespace_of, processes};
use sluice_trace::{Capability, Levels, Record, What};

use super::Node;

/// Records kept of one start; more are no start's working set.
const MAX_RECORDS: usize = 400_000;
/// How often records are taken while a start is recorded.
const BUSY_MS: u16 = 50;
/// And while none is: failed calls wake us by themselves.
const IDLE_MS: u16 = 1000;
/// A recording that nobody ended goes so long after its window.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Ancestors of a process that are looked at.
const MAX_ANCESTORS: usize = 64;

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Probing {
    loaded: OnceLock<Loaded>,
    last_id: AtomicU64,
}

#[derive(Debug)]
struct Loaded {
    levels: Levels,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    probes: Probes,
    /// The oldest first.
    recordings: Vec<Recording>,
    /// Mount namespaces that are no start's, until recordings change.
    foreign: HashSet<(Device, u32)>,
    /// Calls that failed, not yet reported.
    failed: Vec<Event>,
}

/// One start, as the probes see it.
#[derive(Debug)]
struct Recording {
    id: u64,
    device: Device,
    holder: Option<u32>,
    expires: Instant,
    /// Mount namespaces that were there before.
    before: HashSet<u32>,
    namespaces: Vec<u32>,
    recorded: Recorded,
    losses_before: Losses,
}

/// What was seen of a start.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    pub(super) records: Vec<Record>,
    pub(super) lost: Losses,
    /// Arguments of the first program of the image that was started.
    pub(super) argv: Option<Vec<String>>,
}

impl Probing {
    /// What is seen, and by what; none as long as there are no probes.
    pub(super) fn levels(&self) -> Option<&Levels> {
        self.loaded.get().map(|loaded| &loaded.levels)
    }

    /// Whether accesses are seen that the page cache answers.
    pub(super) fn sees_memory(&self) -> bool {
        let sees = |levels: &Levels, capability| levels.of(capability).is_some();
        self.levels().is_some_and(|levels| sees(levels, Capability::Read) && sees(levels, Capability::Fault))
    }

    /// A number for a recording; none: there are no probes.
    pub(super) fn next_id(&self) -> Option<u64> {
        self.loaded.get().map(|_| self.last_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Gets ready to record, so that [`Self::begin`] takes less. Blocks the thread for milliseconds.
    pub(super) fn prepare(&self) {
        let Some(loaded) = self.loaded.get() else { return };
        if let Err(error) = loaded.lock().probes.prepare() {
            tracing::debug!(%error, "probes are not ready"); // Beginning says what that means.
        }
    }

    /// Records what is done with the file system mounted at `dir` from now on. Blocks the thread for milliseconds.
    pub(super) fn begin(&self, id: u64, dir: &Path, holder: Option<u32>, window: Duration) -> Result<()> {
        let loaded = self.loaded.get().context("there are no probes")?;
        let found = std::fs::metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
        let device = Device::from_stat(found.dev());
        let before = processes().filter_map(mount_namespace_of).collect();
        let mut state = loaded.lock();
        // Watching anew forgets what was touched before: namespaces' numbers are given out again.
        state.take_fills(device)?;
        state.probes.watch(device)?;
        state.foreign.clear();
        let losses_before = state.probes.losses()?;
        state.recordings.push(Recording {
            id,
            device,
            holder,
            expires: Instant::now() + window + FORGOTTEN,
            before,
            namespaces: Vec::new(),
            recorded: Recorded::default(),
            losses_before,
        });
        Ok(())
    }

    /// Ends a recording; none if it never began, or was forgotten.
    pub(super) fn end(&self, id: u64) -> Option<Recorded> {
        let mut state = self.loaded.get()?.lock();
        state.end(id).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "what probes saw of a start is lost");
            None
        })
    }

    /// Takes what the kernel recorded; gives the calls that failed.
    fn drain(&self) -> Result<Vec<Event>> {
        let Some(loaded) = self.loaded.get() else { return Ok(Vec::new()) };
        let mut state = loaded.lock();
        state.drain()?;
        let now = Instant::now();
        let forgotten: Vec<u64> =
            state.recordings.iter().filter(|one| one.expires < now).map(|one| one.id).collect();
        for id in forgotten {
            state.end(id)?;
        }
        Ok(std::mem::take(&mut state.failed))
    }

    fn is_recording(&self) -> bool {
        self.loaded.get().is_some_and(|loaded| !loaded.lock().recordings.is_empty())
    }
}

impl Loaded {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drain(&mut self) -> Result<()> {
        let mut events = Vec::new();
        self.probes.drain(|event| events.push(event))?;
        for event in events {
            if matches!(event.record.what, What::Failed(_)) {
                self.failed.push(event.clone());
            }
            self.sort(event);
        }
        Ok(())
    }

    /// Gives an event to the start that it belongs to.
    fn sort(&mut self, event: Event) {
        let process = &event.record.process;
        let Some(place) = self.owner(event.device, process.mnt_ns, process.tgid) else { return };
        let Some(recording) = self.recordings.get_mut(place) else { return };
        let Recorded { records, lost, argv } = &mut recording.recorded;
        if argv.is_none() && matches!(event.record.what, What::Exec { .. }) {
            *argv = arguments(process.tgid);
        }
        if records.len() < MAX_RECORDS {
            records.push(event.record);
        } else {
            lost.records += 1;
        }
    }

    /// Place of the recording that a mount namespace belongs to.
    fn owner(&mut self, device: Device, mnt_ns: u32, tgid: u32) -> Option<usize> {
        let claimed = self.recordings.iter().position(|one| one.namespaces.contains(&mnt_ns));
        if claimed.is_some() || self.foreign.contains(&(device, mnt_ns)) {
            return claimed;
        }
        let may = |one: &Recording| one.device == device && !one.before.contains(&mnt_ns);
        if !self.recordings.iter().any(may) {
            self.foreign.insert((device, mnt_ns));
            return None;
        }
        let lineage: Vec<(u32, Option<u32>)> =
            ancestors(tgid).map(|pid| (pid, mount_namespace_of(pid))).collect();
        let related = |one: &Recording| {
            lineage.iter().any(|(pid, namespace)| {
                one.holder == Some(*pid) || namespace.is_some_and(|found| one.namespaces.contains(&found))
            })
        };
        let place = self
            .recordings
            .iter()
            .position(|one| may(one) && related(one))
            .or_else(|| self.recordings.iter().position(|one| may(one) && one.namespaces.is_empty()));
        match place.and_then(|place| self.recordings.get_mut(place)) {
            Some(recording) => recording.namespaces.push(mnt_ns),
            None => {
                self.foreign.insert((device, mnt_ns));
            }
        }
        place
    }

    /// Takes records and page-cache fills of a device to the starts that they belong to.
    fn take_fills(&mut self, device: Device) -> Result<()> {
        self.drain()?;
        let mut fills = Vec::new();
        self.probes.take_fills(device, None, |event| fills.push(event))?;
        for event in fills {
            let owner = self
                .recordings
                .iter_mut()
                .find(|one| one.device == device && one.namespaces.contains(&event.record.process.mnt_ns));
            if let Some(owner) = owner {
                owner.recorded.records.push(event.record);
            }
        }
        Ok(())
    }

    fn end(&mut self, id: u64) -> Result<Option<Recorded>> {
        let Some(place) = self.recordings.iter().position(|one| one.id == id) else { return Ok(None) };
        let device = self.recordings.get(place).map(|one| one.device).context("it was just there")?;
        let taken = self.take_fills(device);
        let Recording { mut recorded, losses_before, .. } = self.recordings.remove(place);
        self.foreign.clear();
        if !self.recordings.iter().any(|one| one.device == device) {
            self.probes.unwatch(device)?;
        }
        taken?;
        // Losses are the machine's: whose record was lost nobody knows.
        let now = self.probes.losses()?;
        recorded.lost.records += now.records.saturating_sub(losses_before.records);
        recorded.lost.fills += now.fills.saturating_sub(losses_before.fills);
        recorded.lost.failures += now.failures.saturating_sub(losses_before.failures);
        Ok(Some(recorded))
    }
}

/// Loads the probes, and serves them as long as the node lives. Says in the log why there are none.
pub(super) fn watch(weak: &Weak<Node>) {
    let began = Instant::now();
    let mut attachments = Attachments::default();
    let ready = match load(weak, &mut attachments) {
        Ok(ready) => ready,
        Err(error) => {
            tracing::info!(
                reason = format!("{error:#}"),
                "no probes: starts are recorded by the agent's own log"
            );
            return;
        }
    };
    if let Some(node) = weak.upgrade() {
        let levels = node.probing.levels().map(|levels| &levels.reached);
        tracing::info!(?levels, took = ?began.elapsed(), "probes are loaded");
    }
    loop {
        let Some(node) = weak.upgrade() else { return };
        attachments.leave(&node);
        let busy = node.probing.is_recording();
        drop(node);
        let at_most = PollTimeout::from(if busy { BUSY_MS } else { IDLE_MS });
        match poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], at_most) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return tracing::error!(%error, "cannot wait for probes any more"),
        }
        let Some(node) = weak.upgrade() else { return };
        match node.probing.drain() {
            Ok(failed) => failed.iter().for_each(|event| node.report_failed_call(event)),
            Err(error) => {
                return tracing::error!(error = format!("{error:#}"), "cannot read probes any more");
            }
        }
    }
}

/// Gives a descriptor that is readable when there is something to take.
fn load(node: &Weak<Node>, attachments: &mut Attachments) -> Result<OwnedFd> {
    let stays = || {
        if let Some(node) = node.upgrade() {
            attachments.find();
            attachments.leave(&node);
        }
    };
    let probes = Probes::load_and_tell(&Options::default(), stays);
    sluice_kernel::process::trim_heap();
    let probes = probes?;
    let ready = probes.as_fd().try_clone_to_owned().context("cannot copy a descriptor")?;
    let levels = probes.levels().clone();
    let (recordings, foreign, failed) = (Vec::new(), HashSet::new(), Vec::new());
    let state = Mutex::new(State { probes, recordings, foreign, failed });
    let node = node.upgrade().context("the daemon ends")?;
    // Loaded once, by this thread.
    node.probing.loaded.get_or_init(|| Loaded { levels, state });
    Ok(ready)
}

/// What keeps those probes attached that stay so. The server of block files gets copies: the kernel takes up to 70 ms to detach one
/// from a system call's tracepoint, one after the other, and the agent's end, and so the next agent, must not wait for that.
#[derive(Default)]
struct Attachments {
    /// Their numbers in this process.
    found: HashSet<RawFd>,
    /// Not with the server yet.
    copies: Vec<OwnedFd>,
}

impl Attachments {
    /// Finds those that were attached since. Nothing else may be attached meanwhile.
    fn find(&mut self) {
        let Self { found, copies } = self;
        let is_new = |number, name: &str| {
            let is_attachment = name == "anon_inode:[perf_event]" || name == "anon_inode:bpf_link";
            is_attachment && !copies.iter().any(|copy| copy.as_raw_fd() == number) && found.insert(number)
        };
        match sluice_kernel::process::copy_descriptors(is_new) {
            Ok(new) => self.copies.extend(new),
            Err(error) => tracing::warn!(%error, "the daemon's end will wait until its probes are detached"),
        }
    }

    /// Leaves them to the server, if there is one (yet).
    fn leave(&mut self, node: &Node) {
        let blockfs = node.lock(&node.blockfs);
        let Some(blockfs) = blockfs.as_ref() else { return };
        for copy in self.copies.drain(..) {
            if let Err(error) = blockfs.hold(copy) {
                tracing::warn!(%error, "the daemon's end will wait until its probes are detached");
            }
        }
    }
}

/// A process and its ancestors, as far as they are still there.
fn ancestors(pid: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(pid), |pid| parent(*pid)).take(MAX_ANCESTORS)
}

fn parent(pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name in parentheses: state, parent.
    let parent = text.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
    (parent > 1).then_some(parent)
}

fn arguments(pid: u32) -> Option<Vec<String>> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = bytes.strip_suffix(b"\0")?;
    Some(text.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_where_it_comes_from() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let lineage: Vec<u32> = ancestors(child.id()).collect();
        // The parent goes on a moment before the kernel has the new arguments.
        let mut argv = None;
        for _ in 0..1000 {
            argv = arguments(child.id());
            if argv.is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().and_then(|()| child.wait()).expect("ended");
        assert_eq!(lineage.get(..2), Some([child.id(), std::process::id()].as_slice()));
        assert_eq!(argv, Some(vec!["sleep".to_owned(), "60".to_owned()]));
    }
}
