//! Artifacts beside an image: the distribution specification's referrers, by its API or by the tag scheme where there is none.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, FixedOffset};
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK, LOCATION};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::artifact::{
    ArtifactBlob, ArtifactReader, Blobs, CREATED, INDEX_TYPE, Kind, LAYERS, MANIFEST_TYPE, MAX_DOCUMENT,
    blobs_among, blobs_of,
};
use crate::client::{Ask, Client, Document, Needs, Target};
use crate::image::sha256;
use crate::redact::{Secret, same_origin};
use crate::{Reference, RegistryError, ResolvedImage, observe};

/// Pages of a list of referrers, of at most 4 MiB each.
const MAX_PAGES: usize = 64;
/// How long a list that was asked for ahead is an answer.
const LIST_LIFE: Duration = Duration::from_secs(10);

/// An artifact that a list names.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) digest: String,
    /// Its blobs, where the list tells them. They are believed as the digest is: both are the list's word alone.
    blobs: Option<Vec<ArtifactBlob>>,
}

impl Client {
    /// The artifacts of a kind, newest first.
    pub(crate) async fn artifacts(
        &self,
        image: &ResolvedImage,
        kind: Kind,
    ) -> Result<Vec<Listed>, RegistryError> {
        if let Some((began, list)) = self.inner.listing.take(&image.reference, &image.manifest_digest, kind)
            && let Ok(listed) = list.await
        {
            observe::answered(began);
            return listed;
        }
        self.list(&image.reference, &image.manifest_digest, kind).await
    }

    async fn list(
        &self,
        reference: &Reference,
        manifest_digest: &str,
        kind: Kind,
    ) -> Result<Vec<Listed>, RegistryError> {
        let entries = self.referrers(reference, manifest_digest, kind.artifact_type).await?;
        let entries = entries.unwrap_or_default();
        Ok(newest_first(&entries, kind.artifact_type).collect())
    }

    /// Begins to ask for the artifacts of a kind, for who will ask soon.
    pub(crate) fn list_ahead(&self, reference: &Reference, manifest_digest: &str, kind: Kind) {
        let (client, asked, digest) = (self.clone(), reference.clone(), manifest_digest.to_owned());
        let list = tokio::spawn(async move { client.list(&asked, &digest, kind).await });
        self.inner.listing.put(reference, manifest_digest, kind, list);
    }

    /// The blobs of an artifact.
    pub(crate) async fn artifact(
        &self,
        image: &ResolvedImage,
        listed: &Listed,
    ) -> Result<Blobs, RegistryError> {
        let blobs = match &listed.blobs {
            Some(blobs) => blobs.clone(),
            None => {
                let (manifest, _) = self.manifest(&image.reference, &listed.digest).await?;
                blobs_of(&manifest).ok_or_else(|| RegistryError::Image {
                    reference: image.reference.to_string(),
                    reason: format!("its referrer {} is not an artifact manifest", listed.digest),
                })?
            }
        };
        let with_reader = |blob: ArtifactBlob| {
            let reader = ArtifactReader::Registry(self.blob(&image.reference, &blob.digest, blob.size));
            (blob, reader)
        };
        Ok(blobs.into_iter().map(with_reader).collect())
    }

    /// The referrers of an image. `None` if nobody ever said anything about it.
    async fn referrers(
        &self,
        reference: &Reference,
        manifest_digest: &str,
        artifact_type: &str,
    ) -> Result<Option<Vec<Value>>, RegistryError> {
        let filter: String = url::form_urlencoded::byte_serialize(artifact_type.as_bytes()).collect();
        let path = format!("referrers/{manifest_digest}?artifactType={filter}");
        match self.pages(reference, path).await {
            Ok(entries) => return Ok(Some(entries)),
            // Registries without the API have no such path, or no such method, or make no sense of it. That somebody may
            // not ask is something else.
            Err(RegistryError::Status { status: 400 | 404 | 405 | 406 | 410 | 415 | 501, .. }) => {}
            Err(error) => return Err(error),
        }
        match self.pages(reference, format!("manifests/{}", fallback_tag(manifest_digest))).await {
            Ok(entries) => Ok(Some(entries)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A list of descriptors, all its pages.
    async fn pages(&self, reference: &Reference, path: String) -> Result<Vec<Value>, RegistryError> {
        let mut target = Target::Path(path);
        let mut entries = Vec::new();
        for _ in 0..MAX_PAGES {
            let mut ask = metadata(reference, Method::GET, target, None, Needs::Pull);
            ask.headers.insert(ACCEPT, HeaderValue::from_static(INDEX_TYPE));
            let page = self.document(&ask, MAX_DOCUMENT).await?;
            let wrong = |reason: &str| RegistryError::Protocol {
                host: page.host.clone(),
                what: ask.what(),
                reason: reason.to_owned(),
            };
            entries.append(&mut list(&page.bytes).ok_or_else(|| wrong("it is not a list of referrers"))?.1);
            match next_page(&page) {
                Some(Ok(next)) => target = Target::Named(page.endpoint, Secret(next)),
                Some(Err(reason)) => return Err(wrong(reason)),
                None => return Ok(entries),
            }
        }
        Err(RegistryError::Image {
            reference: reference.to_string(),
            reason: format!("its list of referrers has more than {MAX_PAGES} pages"),
        })
    }

    pub(crate) async fn push_blob(&self, image: &ResolvedImage, bytes: Bytes) -> Result<(), RegistryError> {
        let digest = sha256(&bytes);
        let path = Target::Path(format!("blobs/{digest}"));
        match self.ask(&metadata(&image.reference, Method::HEAD, path, None, Needs::Push)).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let path = Target::Path("blobs/uploads/".to_owned());
        let start = metadata(&image.reference, Method::POST, path, Some(Bytes::new()), Needs::Push);
        let answer = self.ask(&start).await?;
        let wrong = |reason: &str| RegistryError::Protocol {
            host: answer.host.clone(),
            what: "the start of an upload".to_owned(),
            reason: reason.to_owned(),
        };
        let location = answer.response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| wrong("it gave no location"))?;
        let mut url =
            answer.response.url().join(location).map_err(|error| wrong(&format!("its location: {error}")))?;
        url.query_pairs_mut().append_pair("digest", &digest);
        let target = Target::Named(answer.endpoint, Secret(url.into()));
        // Its slot is free again for what follows.
        drop((answer.response, answer.slots));
        let mut put = metadata(&image.reference, Method::PUT, target, Some(bytes), Needs::Push);
        put.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        self.ask(&put).await.map(|_| ())
    }

    pub(crate) async fn push_referrer(
        &self,
        image: &ResolvedImage,
        kind: Kind,
        manifest: Bytes,
    ) -> Result<(), RegistryError> {
        let digest = sha256(&manifest);
        let described: Value = serde_json::from_slice(&manifest).unwrap_or_default();
        let entry = json!({
            "mediaType": MANIFEST_TYPE, "digest": digest, "size": manifest.len(), "artifactType": kind.artifact_type,
            "annotations": described.get("annotations").cloned().unwrap_or_else(|| json!({})),
        });
        let path = Target::Path(format!("manifests/{digest}"));
        let mut put = metadata(&image.reference, Method::PUT, path, Some(manifest), Needs::Push);
        put.headers.insert(CONTENT_TYPE, HeaderValue::from_static(MANIFEST_TYPE));
        let answer = self.ask(&put).await?;
        if answer.response.headers().contains_key("oci-subject") {
            return Ok(());
        }
        drop(answer);
        // The registry has no referrers API: the list is ours to keep, under a tag.
        let tag = fallback_tag(&image.manifest_digest);
        let (mut document, mut entries) = self.fallback_list(image, &tag).await?;
        entries.retain(|entry| entry.get("digest").and_then(Value::as_str) != Some(&digest));
        entries.push(entry);
        document.insert("manifests".to_owned(), Value::Array(entries));
        let body = Some(Bytes::from(Value::Object(document).to_string()));
        let path = Target::Path(format!("manifests/{tag}"));
        let mut put = metadata(&image.reference, Method::PUT, path, body, Needs::Push);
        put.headers.insert(CONTENT_TYPE, HeaderValue::from_static(INDEX_TYPE));
        self.ask(&put).await.map(|_| ())
    }

    /// The list under the fall-back tag as the registry itself has it. What cannot be read must not be overwritten.
    async fn fallback_list(&self, image: &ResolvedImage, tag: &str) -> Result<Entries, RegistryError> {
        let path = Target::Path(format!("manifests/{tag}"));
        let mut ask = metadata(&image.reference, Method::GET, path, None, Needs::Push);
        ask.headers.insert(ACCEPT, HeaderValue::from_static(INDEX_TYPE));
        match self.document(&ask, MAX_DOCUMENT).await {
            Ok(found) => list(&found.bytes).ok_or_else(|| RegistryError::Protocol {
                host: found.host.clone(),
                what: ask.what(),
                reason: format!("what is tagged {tag} is not a list of referrers; it is left as it is: remove or repair it"),
            }),
            Err(error) if error.is_not_found() => {
                let document = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] });
                list(document.to_string().as_bytes())
                    .ok_or_else(|| RegistryError::Config("an empty list is no list".to_owned()))
            }
            Err(error) => Err(error),
        }
    }
}

fn metadata(
    reference: &Reference,
    method: Method,
    target: Target,
    body: Option<Bytes>,
    needs: Needs,
) -> Ask<'_> {
    Ask { method, reference, target, headers: HeaderMap::new(), body, needs, background: false }
}

/// Lists of artifacts that were asked for before anybody wanted them.
#[derive(Debug, Default)]
pub(crate) struct Listing(Mutex<Lists>);

/// By repository (with its registry), manifest and kind, with the time when each was asked for.
type Lists = HashMap<(String, String, &'static str), (Instant, List)>;
type List = JoinHandle<Result<Vec<Listed>, RegistryError>>;

impl Listing {
    fn put(&self, reference: &Reference, manifest_digest: &str, kind: Kind, list: List) {
        let mut lists = self.lists();
        lists.retain(|_, (began, _)| began.elapsed() < LIST_LIFE);
        lists.insert(key(reference, manifest_digest, kind), (Instant::now(), list));
    }

    fn take(&self, reference: &Reference, manifest_digest: &str, kind: Kind) -> Option<(Instant, List)> {
        let list = self.lists().remove(&key(reference, manifest_digest, kind))?;
        Some(list).filter(|(began, _)| began.elapsed() < LIST_LIFE)
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(reference: &Reference, manifest_digest: &str, kind: Kind) -> (String, String, &'static str) {
    let repository = format!("{}/{}", reference.registry(), reference.repository());
    (repository, manifest_digest.to_owned(), kind.artifact_type)
}

/// An index without its entries, and those.
pub(crate) type Entries = (serde_json::Map<String, Value>, Vec<Value>);

pub(crate) fn list(bytes: &[u8]) -> Option<Entries> {
    let Ok(Value::Object(mut document)) = serde_json::from_slice(bytes) else { return None };
    let kind = document.get("mediaType");
    if kind.is_some_and(|kind| kind.as_str() != Some(INDEX_TYPE)) {
        return None;
    }
    let Some(Value::Array(entries)) = document.remove("manifests") else { return None };
    Some((document, entries))
}

/// What an entry of a list says.
fn listed(entry: &Value) -> Option<Listed> {
    let layers = entry.get("annotations").and_then(|annotations| annotations.get(LAYERS)?.as_str());
    let layers: Option<Value> = layers.and_then(|text| serde_json::from_str(text).ok());
    let blobs = layers.as_ref().and_then(blobs_among);
    Some(Listed { digest: entry.get("digest")?.as_str()?.to_owned(), blobs })
}

/// The entries of a kind, the newest first: by the date their annotations give, then by their place. The last one
/// pushed stands last in both schemes, but registries are free in the order.
pub(crate) fn newest_first(entries: &[Value], artifact_type: &str) -> impl Iterator<Item = Listed> {
    let created = |entry: &Value| -> Option<DateTime<FixedOffset>> {
        let text = entry.get("annotations")?.get(CREATED)?.as_str()?;
        DateTime::parse_from_rfc3339(text).ok() // No date: older than any.
    };
    let mut of_kind: Vec<&Value> = entries
        .iter()
        .filter(|entry| entry.get("artifactType").and_then(Value::as_str) == Some(artifact_type))
        .collect();
    of_kind.sort_by_key(|entry| created(entry));
    of_kind.into_iter().rev().filter_map(listed)
}

/// Where a list goes on (RFC 8288); the reason if that is nowhere to go.
fn next_page(page: &Document) -> Option<Result<String, &'static str>> {
    let links = page.headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let next = links.flat_map(|links| links.split(", <")).find_map(|link| {
        let (target, parameters) = link.trim_start_matches('<').split_once('>')?;
        let is_next = parameters.split(';').any(|parameter| {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            key.trim().eq_ignore_ascii_case("rel")
                && value.trim().trim_matches('"').eq_ignore_ascii_case("next")
        });
        is_next.then_some(target)
    })?;
    let Ok(url) = page.url.join(next) else { return Some(Err("its next page is no address")) };
    if !same_origin(url.as_str(), page.url.as_str()) {
        return Some(Err("its next page is at another host"));
    }
    Some(Ok(url.into()))
}

/// The distribution specification's tag of an image's referrers.
fn fallback_tag(manifest_digest: &str) -> String {
    manifest_digest.replace(':', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_chosen_by_its_date() {
        let entry = |digest: &str, kind: &str, created: Option<&str>| {
            let annotations = created.map_or(json!({}), |date| json!({ CREATED: date }));
            json!({ "digest": digest, "artifactType": kind, "annotations": annotations })
        };
        let dated = [
            entry("old", "x", Some("2024-01-01T00:00:00Z")),
            entry("new", "x", Some("2024-06-01T23:30:00-02:00")),
            entry("middle", "x", Some("2024-06-02T00:00:00Z")),
            entry("other", "y", Some("2030-01-01T00:00:00Z")),
            entry("undated", "x", None),
            entry("wrong", "x", Some("yesterday")),
        ];
        let digests = |entries: &[Value], kind| -> Vec<String> {
            newest_first(entries, kind).map(|listed| listed.digest).collect()
        };
        assert_eq!(digests(&dated, "x"), ["new", "middle", "old", "wrong", "undated"]);
        assert_eq!(digests(&[entry("a", "x", None), entry("b", "x", None)], "x"), ["b", "a"]);
        assert!(digests(&dated, "z").is_empty());
    }

    #[test]
    fn lists() {
        let table = [
            (r#"{"manifests":[]}"#, true),
            (r#"{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}"#, true),
            (r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}"#, false),
            (r#"{"manifests":{}}"#, false),
            ("{}", false),
            ("[]", false),
            ("<html>", false),
        ];
        for (text, readable) in table {
            assert_eq!(list(text.as_bytes()).is_some(), readable, "{text}");
        }
    }
}
