//! What is known of a start, fetched before it is asked for.
//!
//! A start never waits for anything here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_prefetch::{Limits, Pace, fetch, wanted};
use sluice_registry::{Client, Layer, Observer, ResolvedImage, observed};
use sluice_stream::StreamedLayer;
use sluice_trace::{ContentKey, FileFacts, Phase, Profile, ProfileKey, entry_class};
use tokio::sync::{mpsc, oneshot};

use super::Node;
use super::files::ImageFiles;
use super::layers::NodeLayer;
use super::pack_bytes::{PackBytes, TablesAwaited, TablesCome};
use super::profiles::{self, Sought, now};
use super::reads::{Recording, Step};
use super::starts::UnderWay;
use crate::api::StartRequest;

/// Where programs are looked for in an image that does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is looked up, and fetched, for a start. Dropped before [`Node::layers_are_there`] nothing more is.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) key: ProfileKey,
    pub(super) window: Duration,
    /// The layers that the container has: of a part of an image not all.
    pub(super) layers: Vec<String>,
    /// What is recorded of the start, from the question for its image on.
    pub(super) recording: Option<Arc<Recording>>,
    pub(super) under_way: UnderWay,
    /// Held until the layers' tables are here, or will not come.
    pub(super) tables: Option<TablesAwaited>,
    /// Tells which layers are streamed, once that is known.
    streamed: Option<oneshot::Sender<Streamed>>,
}

/// What is known of a start before it.
#[derive(Debug)]
struct Learned {
    profile: Profile,
    /// The start pack, of which the first bytes are on their way.
    pack: Option<PackBytes>,
    /// Whether the pack has all that the profile wants.
    packed: bool,
}

impl From<Profile> for Learned {
    fn from(profile: Profile) -> Self {
        Self { profile, pack: None, packed: false }
    }
}

/// Layers that are not local, by digest.
pub(super) type Streamed = HashMap<String, Arc<StreamedLayer>>;

/// The class of a start: what of the image's configuration applies is the runtime's rule.
pub(super) fn class_of(config: &str, asked: &StartRequest) -> String {
    entry_class(&arguments_of(config, asked))
}

fn arguments_of(config: &str, asked: &StartRequest) -> Vec<String> {
    let (mut arguments, command) = match &asked.entrypoint {
        Some(entrypoint) => (vec![entrypoint.clone()], Vec::new()),
        None => (words_of(config, "Entrypoint"), words_of(config, "Cmd")),
    };
    arguments.extend(if asked.command.is_empty() { command } else { asked.command.clone() });
    arguments
}

/// A list of the image's configuration.
fn words_of(config: &str, name: &str) -> Vec<String> {
    let config: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
    let list = config.get("config").and_then(|config| config.get(name)).and_then(|list| list.as_array());
    list.into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
}

/// Where the first program of a start may be in the image, the likeliest first.
fn programs_of(config: &str, asked: &StartRequest) -> Vec<String> {
    let Some(program) = arguments_of(config, asked).into_iter().next() else { return Vec::new() };
    if program.contains('/') {
        return vec![program];
    }
    let environment = words_of(config, "Env");
    let path = environment.iter().find_map(|one| one.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    path.split(':').map(|directory| format!("{directory}/{program}")).collect()
}

/// The class of a start of which only the process's arguments are known: an interpreter that the kernel put before the image's own
/// entry point is none of it.
pub(super) fn class_of_process(config: &str, argv: &[String]) -> String {
    let (configured, seen) = (class_of(config, &StartRequest::default()), entry_class(argv));
    if !configured.is_empty() && seen.ends_with(&format!(" {configured}")) { configured } else { seen }
}

/// Tells a start's recording of requests that are made for it.
pub(super) fn looks_of(recording: Option<Arc<Recording>>) -> Observer {
    Arc::new(move |began| {
        if let Some(recording) = &recording {
            recording.looked_up(began, began.elapsed());
        }
    })
}

impl Node {
    /// Begins to look for what is known of a start that was asked for at `began`, from the image's `layers`, beside the look for
    /// the image's index. What is known is fetched once the layers are there.
    pub(super) fn look_up(
        self: &Arc<Self>,
        image: &ResolvedImage,
        layers: &[Layer],
        asked: Option<&StartRequest>,
        began: Instant,
    ) -> Lookup {
        let any_class = asked.is_none();
        let asked = asked.cloned().unwrap_or_default();
        let config = String::from_utf8_lossy(&image.config);
        let key = ProfileKey { image: image.manifest_digest.clone(), entry: class_of(&config, &asked) };
        let window = asked.window_ms.map_or(self.config.record_window, Duration::from_millis);
        let layers: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let recording = self.config.record.then(|| self.reads.begin(layers.clone(), began));
        if recording.is_some() {
            let node = Arc::clone(self);
            tokio::task::spawn_blocking(move || node.probing.prepare());
        }
        let (streamed, layers_there) = oneshot::channel::<Streamed>();
        let (tables, tables_come) = mpsc::channel(1);
        let programs = programs_of(&config, &asked);
        let sought = Sought { key: key.clone(), any_class };
        let (node, image, recorded) = (Arc::clone(self), image.clone(), recording.clone());
        let digests = layers.clone();
        let (guessing, over) = oneshot::channel();
        let under_way = (self.scheduler.starting(), guessing);
        // The fill waits until what is known has been fetched.
        let before_fill = self.scheduler.prefetching();
        tokio::spawn(async move {
            let began = Instant::now();
            let known = node.known(&image, &sought, tables_come);
            let learned = observed(looks_of(recorded.clone()), known).await;
            if let Some(recording) = &recorded {
                recording.step(Step::since(Phase::Profile, began));
            }
            let Ok(streamed) = layers_there.await else { return };
            if streamed.is_empty() {
                return;
            }
            let learned = match learned {
                Some(learned) => Some(learned),
                None => node.inherit(&sought, &image, &layers).await.map(Learned::from),
            };
            let done = match learned {
                Some(learned) => node.prefetch(learned, layers, streamed, recorded.as_deref()).await,
                None => {
                    drop(before_fill);
                    return node.guess(layers, streamed, programs, over).await;
                }
            };
            if let Err(error) = done {
                tracing::warn!(entry = sought.key.entry, error = format!("{error:#}"), "cannot prefetch");
            }
        });
        let (tables, streamed) = (Some(tables), Some(streamed));
        Lookup { key, window, layers: digests, recording, under_way, tables, streamed }
    }

    /// What is known is fetched from now on, also while the image's metadata are still made.
    pub(super) fn layers_are_there(&self, lookup: &mut Lookup) {
        lookup.tables = None;
        let Some(tell) = lookup.streamed.take() else { return };
        let layers = self.lock(&self.layers);
        let streamed = |digest: &String| layers.get(digest).and_then(|layer| layer.streamed());
        let streamed = lookup.layers.iter().filter_map(|digest| Some((digest.clone(), streamed(digest)?)));
        if tell.send(streamed.collect()).is_err() {
            tracing::debug!(
                entry = lookup.key.entry,
                "the look for what is known of the start was cut short"
            );
        }
    }

    async fn known(&self, image: &ResolvedImage, sought: &Sought, tables: TablesCome) -> Option<Learned> {
        if !self.config.prefetch {
            return None;
        }
        match self.profiles.sought(sought) {
            Ok(Some(profile)) => return Some(profile.into()),
            Ok(None) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the node's profile is not used"),
        }
        let local =
            |digest: &str| self.store.layer(digest).ok().flatten().is_some_and(|layer| layer.is_complete());
        if image.layers.iter().all(|layer| local(&layer.digest)) {
            return None;
        }
        self.published(image, sought, tables).await.unwrap_or_else(|error| {
            let (image, error) = (image.reference.to_string(), format!("{error:#}"));
            tracing::warn!(image, error, "the published profile is not used; the start goes on without it");
            None
        })
    }

    async fn published(
        &self,
        image: &ResolvedImage,
        sought: &Sought,
        tables: TablesCome,
    ) -> Result<Option<Learned>> {
        let Some(published) = profiles::look(&self.artifacts, image, sought).await? else { return Ok(None) };
        // Where the link is rationed nothing comes before its turn.
        let early = self.config.prefetch_bytes_per_second.is_none().then(|| self.scheduler.clone());
        let pack = published.pack.clone().map(|pack| PackBytes::new(pack, early, tables));
        Ok(Some(Learned { profile: published.read().await?, pack, packed: published.packed }))
    }

    /// What was learned of an earlier version of the image, as far as files are the same.
    async fn inherit(
        self: &Arc<Self>,
        sought: &Sought,
        image: &ResolvedImage,
        layers: &[String],
    ) -> Option<Profile> {
        if !self.config.prefetch {
            return None;
        }
        let (node, own, layers) = (Arc::clone(self), sought.clone(), layers.to_vec());
        let name = image.reference.whole();
        let inherited = tokio::task::spawn_blocking(move || node.inherited(&own, &name, &layers)).await;
        let profile = inherited.map_err(anyhow::Error::from).flatten().unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "nothing is inherited from an earlier version");
            None
        })?;
        tracing::info!(
            entry = profile.key.entry,
            "a profile is inherited from an earlier version of the image"
        );
        Some(profile)
    }

    /// `name` is that of the image, which may not be recorded yet. Blocks the thread.
    fn inherited(&self, sought: &Sought, name: &str, layers: &[String]) -> Result<Option<Profile>> {
        let Sought { key, any_class } = sought;
        let mut earlier = self.profiles.list()?;
        earlier.retain(|one| (*any_class || one.key.entry == key.entry) && one.key.image != key.image);
        let records = self.store.images()?;
        let repository = |name: &str| Some(Client::parse(name).ok()?.repository().to_owned());
        let repositories = |image: &str| -> HashSet<String> {
            let record = records.iter().find(|record| record.manifest_digest == image);
            let names = record.into_iter().flat_map(|record| &record.references);
            names.filter_map(|name| repository(name)).collect()
        };
        let mut own = repositories(&key.image);
        own.extend(repository(name));
        earlier.retain(|one| !own.is_disjoint(&repositories(&one.key.image)));
        if earlier.is_empty() {
            return Ok(None);
        }
        earlier.sort_by_key(|one| (one.key.entry != key.entry, std::cmp::Reverse(one.last_used)));
        let files = ImageFiles::read(&self.store, layers)?;
        let facts = files.layers.iter().flat_map(|layer| &layer.files).map(|file| &file.facts);
        let by_content: HashMap<ContentKey, &FileFacts> = facts.map(|facts| (facts.content, facts)).collect();
        let find = |content: &ContentKey| by_content.get(content).map(|facts| (*facts).clone());
        Ok(earlier.iter().find_map(|one| {
            let own = ProfileKey { image: key.image.clone(), entry: one.key.entry.clone() };
            one.inherited_by(own, find)
        }))
    }

    async fn prefetch(
        self: &Arc<Self>,
        learned: Learned,
        layers: Vec<String>,
        streamed: Streamed,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let pace = Pace::new(self.config.prefetch_bytes_per_second);
        let Learned { profile: learned, pack, mut packed } = learned;
        if let Some(pack) = pack
            && let Err(error) = self.take_pack(pack, &streamed, &pace, recorded).await
        {
            packed = false;
            let error = format!("{error:#}");
            tracing::warn!(
                entry = learned.key.entry,
                error,
                "the start pack is refused; its bytes come from the layers"
            );
        }
        // To find the profile's places takes reading all layers' entries, while the container starts.
        if !packed {
            let (store, profile) = (self.store.clone(), learned.clone());
            let read = tokio::task::spawn_blocking(move || -> Result<_> {
                Ok(wanted(&profile, &ImageFiles::read(&store, &layers)?.layers))
            });
            let limits = Limits {
                in_flight: self.config.prefetch_in_flight,
                bytes_per_second: self.config.prefetch_bytes_per_second,
            };
            let fetched = fetch(read.await??, &streamed, limits, &pace).await;
            tracing::info!(entry = learned.key.entry, ?fetched, "what the profile says is here");
        }
        self.make_durable(&streamed).await;
        let node = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            node.profiles.change(&learned.key.clone(), |own| {
                own.merge(learned)?;
                own.last_used = now();
                Ok(())
            })
        })
        .await??;
        Ok(())
    }

    /// Makes durable what came of layers, so that the server of block files reads it by itself. Only where probes see what is read:
    /// the agent's own log would not any more.
    async fn make_durable(self: &Arc<Self>, layers: &Streamed) {
        if !self.probing.sees_memory() {
            return;
        }
        let (node, layers) = (Arc::clone(self), layers.clone());
        let flush = move || -> Result<()> {
            for digest in layers.keys() {
                let Some(layer) = node.lock(&node.layers).get(digest).cloned() else { continue };
                node.make_local(&layer)?;
            }
            Ok(())
        };
        let flushed = tokio::task::spawn_blocking(flush).await;
        if let Err(error) = flushed.map_err(anyhow::Error::from).flatten() {
            tracing::debug!(error = format!("{error:#}"), "what came for the start is not durable yet");
        }
    }
}

impl NodeLayer {
    fn streamed(&self) -> Option<Arc<StreamedLayer>> {
        self.source().filter(|_| !self.layer().is_complete()).cloned()
    }
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
        let programs = |config| programs_of(config, &StartRequest::default());
        assert_eq!(programs(config), ["/init"]);
        assert_eq!(programs(r#"{"config":{"Cmd":["a","b"],"Env":["PATH=/x:/y"]}}"#), ["/x/a", "/y/a"]);
    }
}
