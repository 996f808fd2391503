//! One container's start, recorded: by probes where the kernel lets us, and by the agent's own log of reads.
//!
//! What was touched is written to a trace and learned. A start never waits for anything here, but for the moment that it takes to
//! attach probes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_stream::Starting;
use sluice_trace::{
    Capability, Footer, Header, Level, Levels, Phase, ProfileKey, Record, Sample, Summarizer, Summary,
    TraceWriter, TracedLayer, What,
};
use tokio::sync::oneshot;

use super::Node;
use super::ahead::{Lookup, class_of_process};
use super::files::ImageFiles;
use super::probing::Recorded;
use super::profiles::now;
use super::reads::{Recording, Step};
use crate::api::{Holder, Served, StartReport};
use crate::journal::Reason;

/// Trace files that are kept.
const MAX_TRACES: usize = 64;
/// So long the answer to who asked for the image waits for probes: attaching takes a few milliseconds.
const ATTACH_PATIENCE: Duration = Duration::from_millis(50);

/// The image of a start.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) holder: Holder,
    pub(super) reference: String,
    pub(super) config: String,
    pub(super) layers: Vec<String>,
    /// Where it is mounted; none if it is not.
    pub(super) dir: Option<PathBuf>,
    /// Nothing of it is in the page cache, so that all reads reach the agent.
    pub(super) fresh: bool,
    /// What was done for it since.
    pub(super) steps: Vec<Step>,
}

/// Kept while a start is under way: the fill leaves the link to it, and it is guessed what it will read.
pub(super) type UnderWay = (Starting, oneshot::Sender<()>);

/// Why a start's window is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// The container is ready.
    Ready,
    /// It ended: what it did was its start.
    Ended,
    /// Time is up, and nobody knows.
    TimeUp,
}

impl Started {
    pub(super) fn new(image: &super::Image, holder: &Holder, fresh: bool) -> Option<Self> {
        (image.served != Served::Unpacked).then(|| Self {
            holder: holder.clone(),
            reference: image.reference.clone(),
            config: image.config.clone(),
            layers: image.layers.clone(),
            dir: image.mount.as_ref().map(|mount| mount.dir().to_path_buf()),
            fresh,
            steps: Vec::new(),
        })
    }

    /// One whose image was asked for before it was mounted.
    pub(super) fn asked_at(mut self, asked: Instant, resolved: Step, steps: Vec<Step>) -> Self {
        self.steps = vec![resolved];
        self.steps.extend(steps);
        self.steps.push(Step::since(Phase::Pull, asked));
        self
    }
}

/// A start that is being recorded.
#[derive(Debug)]
pub(super) struct Window {
    key: ProfileKey,
    started: Started,
    /// Layers that the kernel read by itself from the beginning.
    complete: usize,
    began_at: u64,
    reads: Arc<Recording>,
    /// Number of the probes' recording.
    probed: Option<u64>,
    /// The mount's metadata, which inode numbers are looked up in.
    metadata: Option<std::fs::File>,
}

impl Node {
    /// The image is there: what is known is fetched, and what the start touches is recorded.
    pub(super) async fn begin_start(self: &Arc<Self>, mut lookup: Lookup, started: Started) {
        self.layers_are_there(&mut lookup);
        let Lookup { key, window, recording, under_way, .. } = lookup;
        let complete = self.complete_layers(&started.layers);
        if complete < started.layers.len() {
            self.lock(&self.starting).push((started.holder.clone(), under_way));
        }
        // Without probes that see what is in memory, only the first start since the mount is seen as it is.
        let seen = started.fresh || self.probing.sees_memory();
        let Some(reads) = recording.filter(|_| seen) else { return };
        started.steps.iter().for_each(|step| reads.step(*step));
        let holder = started.holder.clone();
        let probed = self.begin_probing(&started, window).await;
        let metadata = match started.dir.as_deref().filter(|_| probed.is_some()).map(metadata_of) {
            Some(Ok(file)) => Some(file),
            Some(Err(error)) => {
                tracing::warn!(error = format!("{error:#}"), "inode numbers cannot be looked up");
                None
            }
            None => None,
        };
        let began_at = now().saturating_sub(reads.elapsed().as_secs());
        let window_of = Window { key, started, complete, began_at, reads, probed, metadata };
        self.lock(&self.windows).push((holder.clone(), window_of));
        let node = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(window).await;
            node.end_start(&holder, Over::TimeUp).await;
        });
    }

    async fn begin_probing(self: &Arc<Self>, started: &Started, window: Duration) -> Option<u64> {
        let dir = started.dir.clone()?;
        let id = self.probing.next_id()?;
        let pid = match &started.holder {
            Holder::Process(pid) => Some(*pid),
            _ => None,
        };
        let node = Arc::clone(self);
        let attached = tokio::task::spawn_blocking(move || node.probing.begin(id, &dir, pid, window));
        match tokio::time::timeout(ATTACH_PATIENCE, attached).await {
            Ok(Ok(Ok(()))) => Some(id),
            // It is on its way; what the start does before is missed.
            Err(_elapsed) => Some(id),
            Ok(Ok(Err(error))) => {
                tracing::warn!(error = format!("{error:#}"), "probes do not see this start");
                None
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "attaching probes was cut short");
                None
            }
        }
    }

    pub(super) fn complete_layers(&self, layers: &[String]) -> usize {
        let layer = |digest: &String| self.store.layer(digest).ok().flatten();
        layers.iter().filter_map(layer).filter(|layer| layer.is_complete()).count()
    }

    /// The start's window is over: the container is ready, or ended, or time is up. What was touched is learned.
    pub(crate) async fn end_start(self: &Arc<Self>, holder: &Holder, over: Over) -> Option<StartReport> {
        let ready_ns = (over != Over::TimeUp).then(sluice_kernel::process::monotonic_ns);
        self.lock(&self.starting).retain(|(one, _)| one != holder);
        let window = {
            let mut windows = self.lock(&self.windows);
            let place = windows.iter().position(|(one, _)| one == holder)?;
            windows.swap_remove(place).1
        };
        let node = Arc::clone(self);
        let learned = tokio::task::spawn_blocking(move || {
            let (served, lost) = node.reads.end(&window.reads);
            let probed = window.probed.and_then(|id| node.probing.end(id));
            node.learn(window, served, lost, probed, ready_ns)
        });
        match learned.await.map_err(anyhow::Error::from).flatten() {
            Ok(report) => report,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a start is not learned");
                None
            }
        }
    }

    /// Writes the trace and adds it to the profile; none if there was nothing to record. Blocks the thread.
    fn learn(
        &self,
        window: Window,
        served: Vec<Record>,
        lost_reads: u64,
        probed: Option<Recorded>,
        ready_ns: Option<u64>,
    ) -> Result<Option<StartReport>> {
        let Recorded { records: mut seen, lost, argv } = probed.unwrap_or_default();
        let reads = served.iter().filter(|record| matches!(record.what, What::Served { .. })).count() as u64;
        if reads == 0 && seen.is_empty() {
            return Ok(None);
        }
        let began_ns = window.reads.began_ns();
        let own_log = Levels { reached: [(Capability::Read, Level::Log)].into(), ..Levels::default() };
        let levels = self.probing.levels().filter(|_| !seen.is_empty()).cloned().unwrap_or(own_log);
        let key = window.key_of(argv.as_deref());
        let layer = |digest: &String| {
            let bytes = self.store.layer(digest)?.context("a layer vanished")?.size();
            Ok(TracedLayer { digest: digest.clone(), bytes })
        };
        let layers = window.started.layers.iter().map(layer).collect::<Result<_>>()?;
        let header = Header {
            image: key.image.clone(),
            entry: key.entry.clone(),
            kernel: uname(|name| name.release()),
            machine: uname(|name| name.machine()),
            began_at: window.began_at,
            began_ns,
            levels,
            reference: window.started.reference.clone(),
            layers,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            container: match &window.started.holder {
                Holder::Process(pid) => format!("process {pid}"),
                Holder::MountPoint(dir) => dir.display().to_string(),
                Holder::Snapshot(name) => name.clone(),
            },
        };
        let files = ImageFiles::read(&self.store, &window.started.layers)?;
        let files = match window.metadata {
            Some(metadata) => files.with_inodes(metadata, &self.store)?,
            None => files,
        };
        let waited = waited(&seen, &served, &files);
        let probed = seen.len() as u64;
        seen.extend(served);
        seen.sort_by_key(|record| record.time_ns);
        let mut all = files.of_records(&seen, began_ns);
        all.append(&mut seen);
        let nobody = sluice_trace::Process::default();
        all.extend(ready_ns.map(|time_ns| Record { time_ns, process: nobody, what: What::Ready }));
        let footer = Footer {
            lost_records: lost_reads.saturating_add(lost.records),
            lost_fills: lost.fills,
            lost_failures: lost.failures,
            ..Footer::default()
        };
        let path = write_trace(&self.config.root.join("traces"), &header, &all, &footer)?;
        let mut summarizer = Summarizer::new(&header);
        all.iter().for_each(|record| summarizer.push(record));
        self.judge(&summarizer.finish(), &footer);
        let records = all.into_iter().map(Ok::<_, std::convert::Infallible>);
        let Ok(sample) =
            Sample::from_records(records, &header.levels, (header.began_at, header.began_ns), &files);
        let by = |capability| header.levels.of(capability);
        let level = by(Capability::Fault).or(by(Capability::Fill)).unwrap_or(Level::Log);
        let mut report = StartReport {
            trace: path,
            entry: key.entry.clone(),
            level: level.to_string(),
            reads,
            probed,
            ranges: sample.ranges.len(),
            bytes: sample.bytes(),
            blocked_us: waited.blocked_ns / 1000,
            served_us: waited.served_ns / 1000,
            lost: footer.lost_records.saturating_add(footer.lost_fills),
            learned: !sample.ranges.is_empty(),
        };
        // A layer that became complete meanwhile is read by the kernel, unseen by the log: better than nothing, but no better than that.
        let unseen = level == Level::Log
            && (!window.started.fresh || self.complete_layers(&window.started.layers) > window.complete);
        if unseen && self.profiles.load(&key).ok().flatten().is_some() {
            report.learned = false;
        }
        if report.learned {
            self.profiles.change(&key, |profile| {
                profile.add(sample);
                Ok(())
            })?;
        }
        tracing::info!(?report, "a start was recorded");
        Ok(Some(report))
    }
}

impl Node {
    /// Counts a start, compares it with those before, and tells what became worse.
    fn judge(&self, summary: &Summary, footer: &Footer) {
        let metrics = &self.reads.metrics;
        for (counter, by) in [
            (&metrics.records_lost, footer.lost_records + footer.lost_fills + footer.lost_failures),
            (&metrics.ahead_bytes, summary.ahead_bytes),
            (&metrics.ahead_used_bytes, summary.ahead_used_bytes),
        ] {
            counter.fetch_add(by, Ordering::Relaxed);
        }
        let Some(ready_ns) = summary.ready_ns else { return };
        metrics.ready.observe(Duration::from_nanos(ready_ns));
        let Some(limits) = &self.config.regressions else { return };
        match self.baselines.add(sluice_regress::Start::from(summary), limits, now()) {
            Err(error) => tracing::warn!(error = format!("{error:#}"), "a start is not compared"),
            Ok(found) => {
                for (against, finding) in found {
                    metrics.regressed(finding.kind);
                    let entry = &summary.header.entry;
                    let message = format!(
                        "Start of `{entry}`, against {against}: {}. {}",
                        finding.what, finding.advice
                    );
                    self.journal.emit(Reason::StartRegressed, &summary.header.reference, message);
                }
            }
        }
    }
}

impl Window {
    /// What was started: containerd does not tell, but the process's own arguments do.
    fn key_of(&self, argv: Option<&[String]>) -> ProfileKey {
        let image = self.key.image.clone();
        match (&self.started.holder, argv) {
            (Holder::Snapshot(_), Some(argv)) => {
                ProfileKey { image, entry: class_of_process(&self.started.config, argv) }
            }
            _ => self.key.clone(),
        }
    }
}

/// How long threads slept for bytes, and how much of that the agent took to answer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Waited {
    blocked_ns: u64,
    served_ns: u64,
}

/// Answers of the agent that are compared with one sleep at most, the latest first.
const COMPARED: usize = 4096;

/// Joins sleeps with the reads that the agent answered meanwhile. `served` is in order of time.
fn waited(seen: &[Record], served: &[Record], files: &ImageFiles) -> Waited {
    let mut sum = Waited::default();
    for record in seen {
        let What::Blocked { inode, offset, blocked_ns } = &record.what else { continue };
        sum.blocked_ns += blocked_ns;
        let Some((layer, at)) = files.place(*inode, *offset) else { continue };
        let (woke, slept) = (record.time_ns, record.time_ns.saturating_sub(*blocked_ns));
        let before = served.partition_point(|one| one.time_ns <= woke);
        let overlap = served.iter().take(before).rev().take(COMPARED).find_map(|one| match one.what {
            What::Served { layer: of, offset, len, service_ns, .. }
                if of == layer && (offset..offset + len).contains(&at) =>
            {
                let end = woke.min(one.time_ns + service_ns);
                Some(end.saturating_sub(slept.max(one.time_ns)))
            }
            _ => None,
        });
        sum.served_ns += overlap.unwrap_or(0);
    }
    sum
}

/// The device that holds the metadata of an image's mount.
fn metadata_of(dir: &Path) -> Result<std::fs::File> {
    use std::os::unix::ffi::OsStrExt;
    let mounts = sluice_kernel::mounts()?;
    let mount = mounts.iter().rev().find(|mount| mount.target == dir);
    let mount = mount.with_context(|| format!("{} is not mounted", dir.display()))?;
    let device = Path::new(std::ffi::OsStr::from_bytes(&mount.source));
    std::fs::File::open(device).with_context(|| format!("cannot open {}", device.display()))
}

/// Writes a trace file, and removes the oldest ones beyond the quota.
fn write_trace(dir: &Path, header: &Header, records: &[Record], footer: &Footer) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("{}-{:09}.trace", header.began_at, header.began_ns % 1_000_000_000));
    let file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut writer = TraceWriter::new(std::io::BufWriter::new(file), header)?;
    records.iter().try_for_each(|record| writer.push(record))?;
    writer.finish(footer.clone())?;
    let entries = std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path()));
    let mut all = entries.collect::<std::io::Result<Vec<_>>>()?;
    // Names begin with the time.
    all.sort();
    let surplus = all.len().saturating_sub(MAX_TRACES);
    for old in all.iter().take(surplus).filter(|old| **old != path) {
        std::fs::remove_file(old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    Ok(path)
}

fn uname(field: impl Fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr) -> String {
    nix::sys::utsname::uname().map(|name| field(&name).to_string_lossy().into_owned()).unwrap_or_default()
}
