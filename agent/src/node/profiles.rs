//! Profiles: kept on the node, one file per image and class of entry point; published beside the image.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use sluice_registry::ResolvedImage;
use sluice_registry::artifact::{self, ArtifactReader, ArtifactStore, Kind};
use sluice_trace::{Profile, ProfileKey};

/// Profiles and start packs as artifacts.
pub(crate) const PROFILE_KIND: Kind = Kind {
    artifact_type: "application/vnd.sluice.profile.v1",
    blob_type: "application/vnd.sluice.profile.v1+blob",
    name: "profile",
};
/// Annotation of a profile: the class of entry point that it is about.
const ENTRY: &str = "dev.sluice.profile.entry";
/// Annotation of a start pack: the class of entry point that it is for.
const PACK: &str = "dev.sluice.pack.entry";
/// Annotation of a start pack that has all that a profile wants: digest of that profile's blob.
const PACK_OF: &str = "dev.sluice.pack.profile";
/// Longest published profile accepted.
const MAX_PROFILE: u64 = 16 << 20;
/// A profile that helped no start for so long, in seconds, goes.
const UNUSED: u64 = 30 * 24 * 3600;
/// How often a publication that lost a race is tried again.
const ATTEMPTS: usize = 3;

/// The node's own profiles.
#[derive(Debug)]
pub(super) struct Profiles {
    dir: PathBuf,
    /// One writer at a time.
    writing: Mutex<()>,
}

/// The start that a profile is sought for.
#[derive(Debug, Clone)]
pub(super) struct Sought {
    pub(super) key: ProfileKey,
    /// Nobody said which arguments it will have: `key` is of those of the image's configuration, and where these have no profile,
    /// another class of the same image is likelier to be right than nothing.
    pub(super) any_class: bool,
}

/// Where what is published about a start is to be had.
#[derive(Debug)]
pub(super) struct Published {
    key: ProfileKey,
    profile: ArtifactReader,
    /// Its start pack, if there is one.
    pub(super) pack: Option<ArtifactReader>,
    /// Whether the pack has all that the profile wants.
    pub(super) packed: bool,
}

/// A start pack to be published.
#[derive(Debug, Clone)]
pub(super) struct Pack {
    pub(super) bytes: Bytes,
    /// It has all that its profile wants.
    pub(super) whole: bool,
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Profiles {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, writing: Mutex::default() }
    }

    fn path(&self, key: &ProfileKey) -> PathBuf {
        let class = ring::digest::digest(&ring::digest::SHA256, key.entry.as_bytes());
        let name: String = class.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        self.image_dir(&key.image).join(name)
    }

    fn image_dir(&self, image: &str) -> PathBuf {
        self.dir.join(image.trim_start_matches("sha256:"))
    }

    pub(super) fn load(&self, key: &ProfileKey) -> Result<Option<Profile>> {
        let path = self.path(key);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => {
                let bytes = read.with_context(|| format!("cannot read {}", path.display()))?;
                let profile =
                    Profile::decode(&bytes).with_context(|| format!("cannot use {}", path.display()))?;
                Ok(Some(profile).filter(|profile| !profile.is_expired(now(), UNUSED)))
            }
        }
    }

    /// The profile that serves a start: of classes that may be right, the one that helped or was learned last.
    pub(super) fn sought(&self, sought: &Sought) -> Result<Option<Profile>> {
        let exact = self.load(&sought.key)?;
        if exact.is_some() || !sought.any_class {
            return Ok(exact);
        }
        let mut of_image = Vec::new();
        list(&self.image_dir(&sought.key.image), &mut of_image)?;
        Ok(of_image.into_iter().max_by_key(|profile| profile.last_used))
    }

    /// Changes a profile; makes an empty one to begin with.
    pub(super) fn change(
        &self,
        key: &ProfileKey,
        change: impl FnOnce(&mut Profile) -> Result<()>,
    ) -> Result<Profile> {
        let _turn = self.writing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut profile = match self.load(key) {
            Ok(profile) => profile.unwrap_or_else(|| Profile::new(key.clone())),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "a damaged profile is begun anew");
                Profile::new(key.clone())
            }
        };
        change(&mut profile)?;
        let path = self.path(key);
        if profile.samples().len() > 0 {
            let dir = path.parent().context("a profile is in a directory")?;
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            let new = path.with_extension("new");
            std::fs::write(&new, profile.encode()?)
                .and_then(|()| std::fs::rename(&new, &path))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(profile)
    }

    /// All of them; what is damaged or was unused for long is removed.
    pub(super) fn list(&self) -> Result<Vec<Profile>> {
        let mut found = Vec::new();
        for dir in read_dir(&self.dir)? {
            list(&dir, &mut found)?;
        }
        Ok(found)
    }

    pub(super) fn remove(&self, key: &ProfileKey) -> Result<()> {
        remove(&self.path(key))
    }
}

/// The profiles of one image; what is damaged or was unused for long is removed.
fn list(dir: &Path, found: &mut Vec<Profile>) -> Result<()> {
    for path in read_dir(dir)? {
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        match Profile::decode(&bytes) {
            Ok(profile) if !profile.is_expired(now(), UNUSED) => found.push(profile),
            Ok(_) => remove(&path)?,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a damaged profile is removed");
                remove(&path)?;
            }
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => {
            let entries = entries.with_context(|| format!("cannot read {}", dir.display()))?;
            entries.map(|entry| Ok(entry?.path())).collect()
        }
    }
}

/// The profile that is published for a start.
pub(super) async fn find(
    artifacts: &ArtifactStore,
    image: &ResolvedImage,
    key: &ProfileKey,
) -> Result<Option<Profile>> {
    let sought = Sought { key: key.clone(), any_class: false };
    match look(artifacts, image, &sought).await? {
        Some(published) => published.read().await.map(Some),
        None => Ok(None),
    }
}

/// What is published for a start; of classes that may be right, what was published last.
pub(super) async fn look(
    artifacts: &ArtifactStore,
    image: &ResolvedImage,
    sought: &Sought,
) -> Result<Option<Published>> {
    let blobs = artifacts.find(image, PROFILE_KIND).await?.unwrap_or_default();
    let of =
        |name: &str, entry: &String| blobs.iter().find(|(blob, _)| blob.annotations.get(name) == Some(entry));
    let last = || blobs.iter().rev().find_map(|(blob, _)| blob.annotations.get(ENTRY));
    let entry = match of(ENTRY, &sought.key.entry) {
        None if sought.any_class => last(),
        _ => Some(&sought.key.entry),
    };
    let Some(entry) = entry else { return Ok(None) };
    let Some((blob, reader)) = of(ENTRY, entry) else { return Ok(None) };
    if blob.size > MAX_PROFILE {
        bail!("the published profile is too long: {} bytes", blob.size);
    }
    let pack = of(PACK, entry);
    let packed = pack.is_some_and(|(pack, _)| pack.annotations.get(PACK_OF) == Some(&blob.digest));
    let key = ProfileKey { image: sought.key.image.clone(), entry: entry.clone() };
    Ok(Some(Published { key, profile: reader.clone(), pack: pack.map(|(_, reader)| reader.clone()), packed }))
}

impl Published {
    /// The profile.
    pub(super) async fn read(&self) -> Result<Profile> {
        let profile = Profile::decode(&self.profile.read_all(0..self.profile.size()).await?)?;
        if profile.key != self.key {
            bail!("the published profile is about something else: {:?}", profile.key);
        }
        Ok(profile)
    }
}

/// Publishes a profile, united with what is published, and a start pack. Other classes of entry point are left as they are.
/// Gives the digest of the artifact.
pub(super) async fn publish(
    artifacts: &ArtifactStore,
    image: &ResolvedImage,
    mut profile: Profile,
    pack: Option<Pack>,
) -> Result<String> {
    let of = artifact::digest(&profile.encode()?);
    for _ in 0..ATTEMPTS {
        if let Some(theirs) = find(artifacts, image, &profile.key).await.unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the published profile is replaced");
            None
        }) {
            profile.merge(theirs)?;
        }
        let mut blobs: Vec<(HashMap<String, String>, Bytes)> = Vec::new();
        for (blob, reader) in artifacts.find(image, PROFILE_KIND).await?.unwrap_or_default() {
            let own = |name: &str| blob.annotations.get(name) == Some(&profile.key.entry);
            let replaced = own(ENTRY) || own(PACK) && pack.is_some();
            if !replaced {
                blobs.push((blob.annotations.clone(), reader.read_all(0..blob.size).await?));
            }
        }
        let named = |name: &str| HashMap::from([(name.to_owned(), profile.key.entry.clone())]);
        blobs.push((named(ENTRY), profile.encode()?.into()));
        blobs.extend(pack.clone().map(|pack| {
            let mut annotations = named(PACK);
            annotations.extend(pack.whole.then(|| (PACK_OF.to_owned(), of.clone())));
            (annotations, pack.bytes)
        }));
        let digest = artifacts.publish(image, PROFILE_KIND, blobs).await?;
        // Another node may have published between our look and our publication.
        let after = find(artifacts, image, &profile.key).await?;
        if after.is_some_and(|after| after == profile) {
            return Ok(digest);
        }
    }
    bail!("other nodes publish this profile all the time; try again later")
}

#[cfg(test)]
mod tests {
    use sluice_trace::{FileFacts, Sample, SampleRange};

    use super::*;

    fn profile(key: &ProfileKey, number: u8) -> Profile {
        let mut profile = Profile::new(key.clone());
        let content = sluice_trace::ContentKey([number; 16]);
        profile.add(Sample {
            recorded_at: u64::from(number),
            inherited: false,
            files: vec![FileFacts { content, size: 4096, path: vec![number] }],
            ranges: vec![SampleRange { file: 0, first_page: 0, pages: 1, at_ms: 0 }],
        });
        profile
    }

    fn image(key: &ProfileKey) -> ResolvedImage {
        ResolvedImage {
            reference: sluice_registry::Client::parse("registry.example/app:1").expect("a reference"),
            manifest_digest: key.image.clone(),
            media_type: String::new(),
            manifest: Bytes::new(),
            config: Bytes::new(),
            layers: Vec::new(),
        }
    }

    fn key(entry: &str) -> ProfileKey {
        ProfileKey { image: format!("sha256:{}", "ab".repeat(32)), entry: entry.to_owned() }
    }

    #[tokio::test]
    async fn where_nobody_says_the_arguments_the_last_class_serves() {
        let dir = tempfile::tempdir().expect("a directory");
        let profiles = Profiles::new(dir.path().join("profiles"));
        let url = format!("file://{}", dir.path().join("objects").display());
        let artifacts = ArtifactStore::objects(&url, []).expect("opened");
        for (number, entry) in [(1, "first"), (3, "last"), (2, "second")] {
            let learned = |own: &mut Profile| {
                *own = profile(&key(entry), number);
                own.last_used = now() + u64::from(number);
                Ok(())
            };
            profiles.change(&key(entry), learned).expect("learned");
            publish(&artifacts, &image(&key(entry)), profile(&key(entry), number), None)
                .await
                .expect("published");
        }
        for (entry, any_class, own, theirs) in [
            ("first", true, Some("first"), Some("first")),
            ("other", true, Some("last"), Some("second")),
            ("other", false, None, None),
        ] {
            let sought = Sought { key: key(entry), any_class };
            let found = profiles.sought(&sought).expect("read").map(|profile| profile.key.entry);
            assert_eq!(found.as_deref(), own);
            let found = look(&artifacts, &image(&sought.key), &sought).await.expect("found");
            let found = match found {
                Some(published) => Some(published.read().await.expect("read").key.entry),
                None => None,
            };
            assert_eq!(found.as_deref(), theirs);
        }
    }

    #[tokio::test]
    async fn a_pack_is_known_to_have_all_of_the_profile_that_it_was_made_of_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("file://{}", dir.path().display());
        let artifacts = ArtifactStore::objects(&url, []).expect("opened");
        let key = key("sh");
        let image = image(&key);
        let pack = |whole| Some(Pack { bytes: Bytes::from_static(b"pack"), whole });
        let publish = |number, pack| publish(&artifacts, &image, profile(&key, number), pack);
        let packed = || async {
            let sought = Sought { key: key.clone(), any_class: false };
            let published = look(&artifacts, &image, &sought).await.expect("found").expect("published");
            assert!(published.pack.is_some());
            published.packed
        };
        publish(1, pack(false)).await.expect("published");
        assert!(!packed().await, "some of it was not there to be packed");
        publish(1, pack(true)).await.expect("published");
        assert!(packed().await);
        // Another start is learned of, and the pack stays.
        publish(2, None).await.expect("published");
        assert!(!packed().await, "the profile wants more now");
        // A pack of the one, united with the other.
        publish(1, pack(true)).await.expect("published");
        assert!(!packed().await);
    }
}
