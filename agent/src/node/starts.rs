//! One container's start: what is known of it is fetched ahead, what it reads is recorded and learned.
//!
//! A start never waits for anything here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use sluice_prefetch::{Limits, Pace, PackReader, PackWriter, fetch, wanted};
use sluice_registry::ResolvedImage;
use sluice_registry::artifact::ArtifactReader;
use sluice_store::Store;
use sluice_stream::{FetchDone, Lane, StreamedLayer};
use sluice_trace::{
    Footer, Header, Levels, Phase, Profile, ProfileKey, Record, Sample, Summarizer, Summary, TraceWriter,
    TracedLayer, What, entry_class,
};
use tokio::task::JoinHandle;

use super::Node;
use super::files::ImageFiles;
use super::layers::NodeLayer;
use super::profiles::{self, Learned, now};
use super::reads::{Recording, Step};
use crate::api::{Holder, StartReport, StartRequest};
use crate::daemon::EventSender;
use crate::journal::Reason;

/// Trace files that are kept.
const MAX_TRACES: usize = 64;

/// A start that is being recorded.
#[derive(Debug)]
pub(super) struct Window {
    key: ProfileKey,
    reference: String,
    layers: Vec<String>,
    /// Layers that the kernel read by itself from the beginning.
    complete: usize,
    recording: Arc<Recording>,
}

/// What is looked up while an image is made ready.
pub(super) struct Lookup {
    key: ProfileKey,
    window: Duration,
    found: JoinHandle<(Option<Learned>, Step)>,
    reference: String,
}

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

/// The class of a start: what of the image's configuration applies is the runtime's rule.
fn class_of(config: &str, asked: &StartRequest) -> String {
    let config: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
    let words = |name: &str| -> Vec<String> {
        let list = config.get("config").and_then(|config| config.get(name)).and_then(|list| list.as_array());
        list.into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    let (mut arguments, command) = match &asked.entrypoint {
        Some(entrypoint) => (vec![entrypoint.clone()], Vec::new()),
        None => (words("Entrypoint"), words("Cmd")),
    };
    arguments.extend(if asked.command.is_empty() { command } else { asked.command.clone() });
    entry_class(&arguments)
}

impl Node {
    /// Begins to look for what is known of a start, beside the look for the image's index.
    pub(super) fn look_up(self: &Arc<Self>, image: &ResolvedImage, asked: &StartRequest) -> Lookup {
        let key = ProfileKey {
            image: image.manifest_digest.clone(),
            entry: class_of(&String::from_utf8_lossy(&image.config), asked),
        };
        let window = asked.window_ms.map_or(self.config.record_window, Duration::from_millis);
        let (node, image, own) = (Arc::clone(self), image.clone(), key.clone());
        let reference = image.reference.to_string();
        let found = tokio::spawn(async move {
            let began = Instant::now();
            let found = node.known(&image, &own).await;
            (found, Step::since(Phase::Profile, began))
        });
        Lookup { key, window, found, reference }
    }

    async fn known(&self, image: &ResolvedImage, key: &ProfileKey) -> Option<Learned> {
        if !self.config.prefetch {
            return None;
        }
        match self.profiles.load(key) {
            Ok(Some(profile)) => return Some(Learned { profile, pack: None }),
            Ok(None) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the node's profile is not used"),
        }
        let local =
            |digest: &str| self.store.layer(digest).ok().flatten().is_some_and(|layer| layer.is_complete());
        if image.layers.iter().all(|layer| local(&layer.digest)) {
            return None;
        }
        profiles::find(&self.artifacts, image, key).await.unwrap_or_else(|error| {
            let (image, error) = (image.reference.to_string(), format!("{error:#}"));
            tracing::warn!(image, error, "the published profile is not used; the start goes on without it");
            None
        })
    }

    /// The image is there: what is known is fetched, and reads are recorded if they reach the agent from the first on, as of a `fresh` image: when it was asked for, and its steps.
    pub(super) fn begin_start(
        self: &Arc<Self>,
        lookup: Lookup,
        layers: Vec<String>,
        fresh: Option<(Instant, Vec<Step>)>,
        holder: &Holder,
    ) {
        let streamed: HashMap<String, Arc<StreamedLayer>> = {
            let node_layers = self.lock(&self.layers);
            let streamed = |digest: &String| node_layers.get(digest).and_then(|layer| layer.streamed());
            layers.iter().filter_map(|digest| Some((digest.clone(), streamed(digest)?))).collect()
        };
        let Lookup { key, window, found, reference } = lookup;
        if streamed.is_empty() {
            return;
        }
        let mut recorded = None;
        if let Some((asked, steps)) = fresh
            && self.config.record
        {
            let recording = self.reads.begin(layers.clone(), asked);
            steps.into_iter().for_each(|step| recording.step(step));
            recorded = Some(Arc::clone(&recording));
            let complete = self.complete_layers(&layers);
            let started = Window { key: key.clone(), reference, layers: layers.clone(), complete, recording };
            self.lock(&self.windows).push((holder.clone(), started));
            let (node, holder) = (Arc::clone(self), holder.clone());
            tokio::spawn(async move {
                tokio::time::sleep(window).await;
                node.end_start(&holder, Over::TimeUp).await;
            });
        }
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let Ok((learned, step)) = found.await else { return };
            if let Some(recording) = &recorded {
                recording.step(step);
            }
            if let Some(learned) = learned
                && let Err(error) = node.prefetch(&key, learned, layers, streamed, recorded.as_deref()).await
            {
                tracing::warn!(entry = key.entry, error = format!("{error:#}"), "cannot prefetch");
            }
        });
    }

    fn complete_layers(&self, layers: &[String]) -> usize {
        let layer = |digest: &String| self.store.layer(digest).ok().flatten();
        layers.iter().filter_map(layer).filter(|layer| layer.is_complete()).count()
    }

    async fn prefetch(
        self: &Arc<Self>,
        key: &ProfileKey,
        learned: Learned,
        layers: Vec<String>,
        streamed: HashMap<String, Arc<StreamedLayer>>,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let pace = Pace::new(self.config.prefetch_bytes_per_second);
        if let Some(pack) = &learned.pack
            && let Err(error) = self.take_pack(pack, &streamed, &pace, recorded).await
        {
            let error = format!("{error:#}");
            tracing::warn!(
                entry = key.entry,
                error,
                "the start pack is refused; its bytes come from the layers"
            );
        }
        let store = self.store.clone();
        let profile = learned.profile.clone();
        let read = tokio::task::spawn_blocking(move || -> Result<_> {
            Ok(wanted(&profile, &ImageFiles::read(&store, &layers)?.0))
        });
        let ranges = read.await??;
        let limits = Limits {
            in_flight: self.config.prefetch_in_flight,
            bytes_per_second: self.config.prefetch_bytes_per_second,
        };
        let fetched = fetch(ranges, &streamed, limits, &pace).await;
        tracing::info!(entry = key.entry, ?fetched, "what the profile says is here");
        let (node, key) = (Arc::clone(self), key.clone());
        tokio::task::spawn_blocking(move || {
            node.profiles.change(&key, |own| {
                own.merge(learned.profile)?;
                own.last_used = now();
                Ok(())
            })
        })
        .await??;
        Ok(())
    }

    /// Takes a start pack's chunks as they arrive, each compared with the layer's index.
    async fn take_pack(
        &self,
        pack: &ArtifactReader,
        layers: &HashMap<String, Arc<StreamedLayer>>,
        pace: &Pace,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let mut reader = PackReader::default();
        let mut body = pack.read();
        let mut taken = 0_u64;
        let mut fetch = FetchDone {
            layer: "",
            lane: Lane::Prefetch,
            offset: 0,
            len: 0,
            began: Instant::now(),
            first_byte: None,
            whole: true,
        };
        while let Some(piece) = body.next().await {
            let piece = piece?;
            fetch.len += piece.len() as u64;
            fetch.first_byte.get_or_insert_with(Instant::now);
            self.scheduler.counters().add_bytes(Lane::Prefetch, piece.len() as u64);
            pace.spend(piece.len() as u64);
            let (layers, log) = (layers.clone(), Arc::clone(&self.reads));
            // Decompression, digests and writes: not on the threads that serve reads.
            let (back, kept) = tokio::task::spawn_blocking(move || -> Result<_> {
                let mut kept = 0;
                for item in reader.push(&piece)? {
                    if let Some(layer) = layers.get(&item.layer)
                        && layer.offer(item.store_offset, &item.bytes)?
                    {
                        let end = item.store_offset + item.bytes.len() as u64;
                        log.packed(&item.layer, item.store_offset..end);
                        kept += 1;
                    }
                }
                Ok((reader, kept))
            })
            .await??;
            reader = back;
            taken += kept;
            pace.wait().await;
        }
        reader.finish()?;
        crate::metrics::count(&self.reads.metrics.packs);
        self.reads.metrics.pack_bytes.fetch_add(fetch.len, Ordering::Relaxed);
        if let Some(recording) = recorded {
            recording.pack_fetched(&fetch);
        }
        tracing::info!(chunks = taken, bytes = pack.size(), "the start pack is here");
        Ok(())
    }

    /// The start's window is over: the container is ready, or ended, or time is up. What was read is learned.
    pub(crate) async fn end_start(self: &Arc<Self>, holder: &Holder, over: Over) -> Option<StartReport> {
        let window = {
            let mut windows = self.lock(&self.windows);
            let place = windows.iter().position(|(one, _)| one == holder)?;
            windows.swap_remove(place).1
        };
        let ready = (over != Over::TimeUp).then(|| window.recording.now_ns());
        let (mut records, lost) = self.reads.end(&window.recording);
        records.extend(ready.map(|time_ns| Record {
            time_ns,
            process: sluice_trace::Process::default(),
            what: What::Ready,
        }));
        let container = match holder {
            Holder::Process(pid) => format!("process {pid}"),
            Holder::MountPoint(dir) => dir.display().to_string(),
            Holder::Snapshot(name) => name.clone(),
        };
        let node = Arc::clone(self);
        let learned =
            tokio::task::spawn_blocking(move || node.learn(&window, container, records, lost)).await;
        match learned.map_err(anyhow::Error::from).flatten() {
            Ok(report) => Some(report),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a start is not learned");
                None
            }
        }
    }

    /// Writes the trace and adds it to the profile. Blocks the thread.
    fn learn(
        &self,
        window: &Window,
        container: String,
        records: Vec<Record>,
        lost: u64,
    ) -> Result<StartReport> {
        let key = &window.key;
        let header = Header {
            image: key.image.clone(),
            entry: key.entry.clone(),
            kernel: uname(|name| name.release()),
            machine: uname(|name| name.machine()),
            began_at: now().saturating_sub(window.recording.now_ns() / 1_000_000_000),
            // Times of level 0 count from the beginning.
            began_ns: 0,
            levels: Levels::default(),
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            reference: window.reference.clone(),
            layers: window.layers.iter().map(|digest| self.traced(digest)).collect::<Result<_>>()?,
            container,
        };
        let reads = records.iter().filter(|record| matches!(record.what, What::Served { .. })).count() as u64;
        let files = ImageFiles::read(&self.store, &window.layers)?;
        let mut all = files.spoken_of(&records);
        all.extend(records.iter().cloned());
        let path = write_trace(&self.config.root.join("traces"), &header, &all, lost)?;
        let mut summarizer = Summarizer::new(&header);
        all.iter().for_each(|record| summarizer.push(record));
        self.judge(&summarizer.finish(), lost);
        let records = records.into_iter().map(Ok::<_, std::convert::Infallible>);
        let Ok(sample) =
            Sample::from_records(records, &header.levels, (header.began_at, header.began_ns), &files);
        let mut report = StartReport {
            trace: path,
            entry: key.entry.clone(),
            reads,
            ranges: sample.ranges.len(),
            bytes: sample.bytes(),
            learned: !sample.ranges.is_empty(),
        };
        // A layer that became complete meanwhile is read by the kernel, unseen: better than nothing, but no better than that.
        let unseen = self.complete_layers(&window.layers) > window.complete;
        if unseen && self.profiles.load(key).ok().flatten().is_some() {
            report.learned = false;
        }
        if report.learned {
            self.profiles.change(key, |profile| {
                profile.add(sample);
                Ok(())
            })?;
        }
        tracing::info!(
            entry = key.entry,
            reads,
            ranges = report.ranges,
            learned = report.learned,
            "a start was recorded"
        );
        Ok(report)
    }

    /// Counts a start, compares it with those before, and tells what became worse.
    fn judge(&self, summary: &Summary, lost: u64) {
        let metrics = &self.reads.metrics;
        for (counter, by) in [
            (&metrics.records_lost, lost),
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

    fn traced(&self, digest: &str) -> Result<TracedLayer> {
        let layer = self.store.layer(digest)?;
        Ok(TracedLayer { digest: digest.to_owned(), bytes: layer.map_or(0, |layer| layer.size()) })
    }

    /// The node's profiles, of one image if one is named.
    pub(crate) fn list_profiles(&self, reference: Option<&str>) -> Result<Vec<Profile>> {
        let mut found = self.profiles.list()?;
        if let Some(reference) = reference {
            let digest = match self.find_record(reference)? {
                Some(record) => record.manifest_digest,
                None => reference.to_owned(),
            };
            found.retain(|profile| profile.key.image == digest);
            if found.is_empty() {
                bail!("there is no profile of `{reference}` here");
            }
        }
        Ok(found)
    }

    /// The node's profiles in words; with `plan`, what each fetches, in order.
    pub(crate) fn describe_profiles(&self, reference: Option<&str>, plan: bool) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for profile in self.list_profiles(reference)? {
            let planned = profile.plan();
            let bytes: u64 = planned.iter().map(|one| one.len).sum();
            let (key, starts) = (&profile.key, profile.samples().len());
            lines.push(format!(
                "{} `{}`: {starts} starts, {} ranges, {bytes} bytes",
                key.image,
                key.entry,
                planned.len()
            ));
            let line = |one: &sluice_trace::Planned| {
                let path = String::from_utf8_lossy(&one.file.path).into_owned();
                format!("{:>4.0} % {:>12} {:>10}  /{path}", one.weight * 100.0, one.offset, one.len)
            };
            lines.extend(planned.iter().filter(|_| plan).map(line));
        }
        Ok(lines)
    }

    /// Removes an image's profiles.
    pub(crate) fn remove_profiles(&self, reference: &str) -> Result<()> {
        self.list_profiles(Some(reference))?.iter().try_for_each(|profile| self.profiles.remove(&profile.key))
    }

    /// Publishes an image's profiles, with start packs if wanted; what was published.
    pub(crate) async fn push_profiles(
        self: &Arc<Self>,
        reference: &str,
        pack: bool,
        events: EventSender,
    ) -> Result<Vec<String>> {
        let image = self.resolve(reference, &events).await?;
        let mut said = Vec::new();
        for profile in self.list_profiles(Some(&image.manifest_digest))? {
            let (node, digests) = (Arc::clone(self), image.layers.iter().map(|layer| layer.digest.clone()));
            let (digests, own) = (digests.collect::<Vec<_>>(), profile.clone());
            let pack = match pack {
                true => {
                    let made = tokio::task::spawn_blocking(move || make_pack(&node.store, &own, &digests));
                    Some(made.await??)
                }
                false => None,
            };
            let size = pack.as_ref().map(Bytes::len);
            let entry = profile.key.entry.clone();
            let digest = profiles::publish(&self.artifacts, &image, profile, pack).await?;
            let size = size.map(|size| format!(", start pack of {size} bytes")).unwrap_or_default();
            said.push(format!("published {digest} for `{entry}`{size}"));
        }
        Ok(said)
    }

    /// Unites what is published for a start with what the node knows.
    pub(crate) async fn pull_profile(
        &self,
        reference: &str,
        asked: &StartRequest,
        events: EventSender,
    ) -> Result<String> {
        let image = self.resolve(reference, &events).await?;
        let entry = class_of(&String::from_utf8_lossy(&image.config), asked);
        let key = ProfileKey { image: image.manifest_digest.clone(), entry };
        let found = profiles::find(&self.artifacts, &image, &key).await?;
        let theirs = found.with_context(|| format!("no profile of `{}` is published", key.entry))?;
        let profile = self.profiles.change(&key, |own| Ok(own.merge(theirs.profile)?))?;
        Ok(format!("{} starts of `{}`", profile.samples().len(), key.entry))
    }
}

impl NodeLayer {
    fn streamed(&self) -> Option<Arc<StreamedLayer>> {
        self.source().filter(|_| !self.layer().is_complete()).cloned()
    }
}

/// The chunks that a profile wants, from what is local and verified.
fn make_pack(store: &Store, profile: &Profile, layers: &[String]) -> Result<Bytes> {
    let mut pack = PackWriter::default();
    let mut packed = std::collections::HashSet::new();
    for range in wanted(profile, &ImageFiles::read(store, layers)?.0) {
        let layer = store.layer(&range.layer)?.context("a layer vanished")?;
        for (offset, bytes) in StreamedLayer::local_chunks(&layer, range.bytes())? {
            if packed.insert((range.layer.clone(), offset)) {
                pack.push(&range.layer, offset, &bytes)?;
            }
        }
    }
    Ok(pack.finish()?.into())
}

/// Writes a trace file, and removes the oldest ones beyond the quota.
fn write_trace(dir: &Path, header: &Header, records: &[Record], lost: u64) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("{}-{}.trace", header.began_at, uuid()));
    let file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut writer = TraceWriter::new(std::io::BufWriter::new(file), header)?;
    records.iter().try_for_each(|record| writer.push(record))?;
    writer.finish(Footer { lost_records: lost, ..Footer::default() })?;
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

/// Tells traces of the same second from each other.
fn uuid() -> String {
    let nanoseconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:09}", nanoseconds.subsec_nanos())
}

fn uname(field: impl Fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr) -> String {
    nix::sys::utsname::uname().map(|name| field(&name).to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_what_will_run() {
        let config = r#"{"config":{"Entrypoint":["/init"],"Cmd":["a","7"]}}"#;
        let class = |entrypoint: Option<&str>, command: &[&str]| {
            let command = command.iter().map(|word| (*word).to_owned()).collect();
            class_of(
                config,
                &StartRequest { entrypoint: entrypoint.map(str::to_owned), command, window_ms: None },
            )
        };
        assert_eq!(class(None, &[]), "/init a #");
        assert_eq!(class(None, &["b"]), "/init b");
        assert_eq!(class(Some("sh"), &[]), "sh");
        assert_eq!(class_of("no JSON", &StartRequest::default()), "");
    }
}
