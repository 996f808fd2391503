//! What the node knows of starts: profiles listed, published and fetched for people.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use sluice_image::parts::{parts_of, prove, ranges_of};
use sluice_image::records::ChunkRecord;
use sluice_prefetch::{Item, PackWriter, wanted};
use sluice_store::{Layer, Store};
use sluice_trace::{Profile, ProfileKey};

use super::Node;
use super::ahead::class_of;
use super::files::ImageFiles;
use super::profiles::{self, Pack};
use crate::api::StartRequest;
use crate::daemon::EventSender;

impl Node {
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
            let size = pack.as_ref().map(|pack| pack.bytes.len());
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
        let profile = self.profiles.change(&key, |own| Ok(own.merge(theirs)?))?;
        Ok(format!("{} starts of `{}`", profile.samples().len(), key.entry))
    }
}

/// What a profile wants, from what is local and verified: chunks, and of those that are wanted in part the parts.
fn make_pack(store: &Store, profile: &Profile, layers: &[String]) -> Result<Pack> {
    let mut items: Vec<(Arc<Layer>, ChunkRecord, Option<u64>)> = Vec::new();
    let mut packed: HashMap<(String, u64), u64> = HashMap::new();
    let mut whole = true;
    for range in wanted(profile, &ImageFiles::read(store, layers)?.layers) {
        let layer = store.layer(&range.layer)?.context("a layer vanished")?;
        whole &= layer.has(range.bytes());
        for chunk in layer.chunks(range.bytes())? {
            let (start, len) = (chunk.store_offset.get(), chunk.len.get());
            let in_chunk = range.bytes().start.saturating_sub(start)..range.bytes().end.saturating_sub(start);
            let parts = parts_of(len, in_chunk).filter(|_| layer.takes_parts());
            let before = packed.entry((range.layer.clone(), start)).or_default();
            let new = parts.unwrap_or(u64::MAX) & !*before;
            *before |= new;
            match items.last_mut() {
                _ if new == 0 => {}
                Some((of, last, Some(parts))) if Arc::ptr_eq(of, &layer) && *last == chunk => *parts |= new,
                _ => items.push((Arc::clone(&layer), chunk, parts.map(|_| new))),
            }
        }
    }
    let mut pack = PackWriter::default();
    for (layer, chunk, parts) in items {
        let (start, len) = (chunk.store_offset.get(), chunk.len.get());
        let mut bytes = vec![0; len as usize];
        // What is not local is left out.
        let local = layer.try_read(start, &mut bytes)?;
        whole &= local;
        if local {
            let (layer, parts) = (
                layer.digest().to_owned(),
                parts.filter(|parts| parts_of(len, 0..len.into()) != Some(*parts)),
            );
            let proof = parts.map_or_else(Vec::new, |parts| prove(&bytes, parts));
            let bytes = match parts {
                Some(parts) => {
                    let parts = ranges_of(len, parts)
                        .filter_map(|part| bytes.get(part.start as usize..part.end as usize));
                    parts.collect::<Vec<_>>().concat()
                }
                None => bytes,
            };
            pack.push(&Item {
                layer,
                store_offset: start,
                parts: parts.unwrap_or(0),
                proof,
                bytes: bytes.into(),
            })?;
        }
    }
    Ok(Pack { bytes: pack.finish()?.into(), whole })
}
