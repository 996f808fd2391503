//! What is known of a start, fetched before it is asked for.
//!
//! A start never waits for anything here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use sluice_prefetch::{Limits, Pace, fetch, wanted};
use sluice_registry::{Client, ResolvedImage};
use sluice_stream::{Prefetching, StreamedLayer};
use sluice_trace::{ContentKey, FileFacts, Phase, Profile, ProfileKey, entry_class};
use tokio::task::JoinHandle;

use super::Node;
use super::files::ImageFiles;
use super::layers::NodeLayer;
use super::pack_bytes::PackBytes;
use super::profiles::{self, Learned, now};
use super::reads::{Recording, Step};
use crate::api::StartRequest;

/// What is looked up while an image is made ready.
pub(super) struct Lookup {
    pub(super) key: ProfileKey,
    pub(super) window: Duration,
    found: JoinHandle<(Option<Learned>, Option<PackBytes>, Step)>,
    /// The fill waits until what is known has been fetched.
    before_fill: Prefetching,
}

/// The class of a start: what of the image's configuration applies is the runtime's rule.
pub(super) fn class_of(config: &str, asked: &StartRequest) -> String {
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

/// The class of a start of which only the process's arguments are known: an interpreter that the kernel put before the image's own
/// entry point is none of it.
pub(super) fn class_of_process(config: &str, argv: &[String]) -> String {
    let (configured, seen) = (class_of(config, &StartRequest::default()), entry_class(argv));
    if !configured.is_empty() && seen.ends_with(&format!(" {configured}")) { configured } else { seen }
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
        let found = tokio::spawn(async move {
            let began = Instant::now();
            let mut found = node.known(&image, &own).await;
            let step = Step::since(Phase::Profile, began);
            let pack = found.as_mut().and_then(|learned| learned.pack.take());
            // Where the link is rationed nothing comes before its turn.
            let early = node.config.prefetch_bytes_per_second.is_none();
            (found, pack.map(|pack| PackBytes::new(pack, early)), step)
        });
        Lookup { key, window, found, before_fill: self.scheduler.prefetching() }
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

    /// Fetches what is known once the image is there.
    pub(super) fn begin_prefetch(
        self: &Arc<Self>,
        lookup: Lookup,
        layers: Vec<String>,
        recorded: Option<Arc<Recording>>,
    ) {
        let Lookup { key, found, before_fill, .. } = lookup;
        let streamed: HashMap<String, Arc<StreamedLayer>> = {
            let node_layers = self.lock(&self.layers);
            let streamed = |digest: &String| node_layers.get(digest).and_then(|layer| layer.streamed());
            layers.iter().filter_map(|digest| Some((digest.clone(), streamed(digest)?))).collect()
        };
        if streamed.is_empty() {
            return;
        }
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let _before_fill = before_fill;
            let Ok((learned, pack, step)) = found.await else { return };
            if let Some(recording) = &recorded {
                recording.step(step);
            }
            let learned = match learned {
                Some(learned) => Some(learned),
                None => node.inherit(&key, &layers).await,
            };
            if let Some(learned) = learned
                && let Err(error) =
                    node.prefetch(&key, (learned.profile, pack), layers, streamed, recorded.as_deref()).await
            {
                tracing::warn!(entry = key.entry, error = format!("{error:#}"), "cannot prefetch");
            }
        });
    }

    /// What was learned of an earlier version of the image, as far as files are the same.
    async fn inherit(self: &Arc<Self>, key: &ProfileKey, layers: &[String]) -> Option<Learned> {
        if !self.config.prefetch {
            return None;
        }
        let (node, own, layers) = (Arc::clone(self), key.clone(), layers.to_vec());
        let inherited = tokio::task::spawn_blocking(move || node.inherited(&own, &layers)).await;
        let profile = inherited.map_err(anyhow::Error::from).flatten().unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "nothing is inherited from an earlier version");
            None
        })?;
        tracing::info!(entry = key.entry, "a profile is inherited from an earlier version of the image");
        Some(Learned { profile, pack: None })
    }

    /// Blocks the thread.
    fn inherited(&self, key: &ProfileKey, layers: &[String]) -> Result<Option<Profile>> {
        let mut earlier = self.profiles.list()?;
        earlier.retain(|one| one.key.entry == key.entry && one.key.image != key.image);
        let records = self.store.images()?;
        let repositories = |image: &str| -> HashSet<String> {
            let record = records.iter().find(|record| record.manifest_digest == image);
            let names = record.into_iter().flat_map(|record| &record.references);
            names.filter_map(|name| Some(Client::parse(name).ok()?.repository().to_owned())).collect()
        };
        let own = repositories(&key.image);
        earlier.retain(|one| !own.is_disjoint(&repositories(&one.key.image)));
        if earlier.is_empty() {
            return Ok(None);
        }
        earlier.sort_by_key(|one| std::cmp::Reverse(one.last_used));
        let files = ImageFiles::read(&self.store, layers)?;
        let facts = files.layers.iter().flat_map(|layer| &layer.files).map(|file| &file.facts);
        let by_content: HashMap<ContentKey, &FileFacts> = facts.map(|facts| (facts.content, facts)).collect();
        let find = |content: &ContentKey| by_content.get(content).map(|facts| (*facts).clone());
        Ok(earlier.iter().find_map(|one| one.inherited_by(key.clone(), find)))
    }

    async fn prefetch(
        self: &Arc<Self>,
        key: &ProfileKey,
        (learned, pack): (Profile, Option<PackBytes>),
        layers: Vec<String>,
        streamed: HashMap<String, Arc<StreamedLayer>>,
        recorded: Option<&Recording>,
    ) -> Result<()> {
        let pace = Pace::new(self.config.prefetch_bytes_per_second);
        if let Some(pack) = pack
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
        let profile = learned.clone();
        let read = tokio::task::spawn_blocking(move || -> Result<_> {
            Ok(wanted(&profile, &ImageFiles::read(&store, &layers)?.layers))
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
                own.merge(learned)?;
                own.last_used = now();
                Ok(())
            })
        })
        .await??;
        Ok(())
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
    }
}
