//! Whose stream indexes are believed, what is remembered of one's own, and what becomes of one that lied.
//!
//! An index says which bytes of a layer are which file; until the layer is complete and its diffID checked, a container runs what the
//! index says. So an index that somebody with push access attached to an image is not used unless the operator says so.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde::Deserialize;
use sluice_image::index::LayerIndex;
use sluice_registry::artifact::{ArtifactBlob, ArtifactReader, ArtifactStore};
use sluice_registry::{RegistryError, ResolvedImage};

use super::keys::{PublicKey, SigningKey};
use super::{INDEX_KIND, LAYER_ANNOTATION};

/// Annotation of an index blob: digest of its header, which holds the digest of its table of contents.
pub(crate) const HEADER_ANNOTATION: &str = "dev.sluice.index.header";
/// Annotation of an index blob: signatures of its statement in base64, separated by spaces.
pub(crate) const SIGNATURES_ANNOTATION: &str = "dev.sluice.index.signatures";
/// Artifacts of an image looked at: somebody may have pushed others after the one that is believed.
const ARTIFACTS: usize = 8;
/// Signatures of one index looked at.
const SIGNATURES: usize = 8;

/// Whose indexes are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// Those made on this node, and those in the configured object store.
    #[default]
    Local,
    /// Those signed by a configured key, wherever they are.
    Signed,
    /// Everybody's.
    Any,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Trust {
    mode: Mode,
    keys: Vec<PublicKey>,
    /// Whether indexes come from the operator's own object store.
    own_store: bool,
    dir: PathBuf,
    /// Indexes that lied since this agent started.
    pub(super) lies: AtomicU64,
}

/// Indexes found for an image.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// By layer: those that are believed.
    pub(crate) indexes: HashMap<String, (ArtifactBlob, ArtifactReader)>,
    /// By layer: why another one is not, and what to do.
    pub(crate) refused: HashMap<String, String>,
}

impl Trust {
    /// `own_store`: artifacts are in an object store that the operator configured. What this node made and condemned is kept
    /// below `root`.
    pub(crate) fn open(mode: Mode, keys: &[PathBuf], own_store: bool, root: &Path) -> Result<Self> {
        Ok(Self {
            mode,
            keys: keys.iter().map(|path| PublicKey::read(path)).collect::<Result<_>>()?,
            own_store,
            dir: root.join("trust"),
            lies: AtomicU64::new(0),
        })
    }

    /// The indexes of an image's layers: for each the newest that is believed.
    pub(crate) async fn find(
        &self,
        artifacts: &ArtifactStore,
        image: &ResolvedImage,
    ) -> Result<Found, RegistryError> {
        let limit = if self.mode == Mode::Any { 1 } else { ARTIFACTS };
        let made = self.made().unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "indexes that were made here are not known");
            HashSet::new()
        });
        let mut found = Found::default();
        for (blob, reader) in artifacts.find_some(image, INDEX_KIND, limit).await?.into_iter().flatten() {
            let Some(layer) = blob.annotations.get(LAYER_ANNOTATION).cloned() else { continue };
            match self.refuses(&layer, &blob, &made) {
                None => drop(found.indexes.entry(layer).or_insert((blob, reader))),
                Some(reason) => drop(found.refused.entry(layer).or_insert(reason)),
            }
        }
        found.refused.retain(|layer, _| !found.indexes.contains_key(layer));
        Ok(found)
    }

    /// Why an index is not used, and what to do.
    fn refuses(&self, layer: &str, blob: &ArtifactBlob, made: &HashSet<String>) -> Option<String> {
        let header = blob.annotations.get(HEADER_ANNOTATION);
        if header.is_some_and(|header| self.condemned(header)) {
            return Some(
                "it lied before and is in quarantine; make a new one with `sluice index`".to_owned(),
            );
        }
        match self.mode {
            Mode::Any => None,
            Mode::Local if self.own_store => None,
            Mode::Local if header.is_some_and(|header| made.contains(header)) => None,
            Mode::Local => Some(
                "it was not made on this node, and the trust mode is `local`; keep indexes in an object store of your own \
                 (index_store), or sign them and set the mode to `signed`"
                    .to_owned(),
            ),
            Mode::Signed => {
                let signatures = blob.annotations.get(SIGNATURES_ANNOTATION);
                let Some((signatures, header)) = signatures.zip(header) else {
                    return Some("it is not signed; sign it with `sluice index --sign KEY`".to_owned());
                };
                let statement = statement(layer, &blob.digest, header);
                let mut signatures = signatures.split(' ').take(SIGNATURES);
                let valid = signatures.any(|one| self.keys.iter().any(|key| key.verifies(&statement, one)));
                (!valid).then(|| {
                    "it is signed by none of the configured keys; sign it with one of them, or add its key to [trust] keys".to_owned()
                })
            }
        }
    }

    /// Header digests of indexes that were made here, by this process or another.
    fn made(&self) -> Result<HashSet<String>> {
        let path = self.dir.join("made");
        match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(HashSet::new()),
            read => {
                let text = read.with_context(|| format!("cannot read {}", path.display()))?;
                Ok(text.lines().map(str::to_owned).collect())
            }
        }
    }

    /// Remembers an index that was made here.
    pub(crate) fn remember(&self, index: &LayerIndex) -> Result<()> {
        let header = header_digest(index);
        if self.made()?.contains(&header) {
            return Ok(());
        }
        let path = self.dir.join("made");
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| std::fs::OpenOptions::new().create(true).append(true).open(&path))
            .and_then(|mut file| file.write_all(format!("{header}\n").as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Puts an index that lied into quarantine: its table of contents stays there to be looked at, and is never used again.
    pub(super) fn condemn(&self, index: &LayerIndex, reason: &str) -> Result<()> {
        let path = self.quarantine(&header_digest(index));
        self.lies.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all(&path)
            .and_then(|()| std::fs::write(path.join("index"), index.blob()))
            .and_then(|()| std::fs::write(path.join("reason"), format!("{reason}\n")))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether an index is in quarantine.
    pub(crate) fn condemned(&self, header: &str) -> bool {
        self.quarantine(header).exists()
    }

    fn quarantine(&self, header: &str) -> PathBuf {
        let hex: String = header.chars().filter(char::is_ascii_hexdigit).collect();
        self.dir.join("quarantine").join(hex)
    }
}

/// What a signature is of.
fn statement(layer: &str, blob: &str, header: &str) -> Vec<u8> {
    format!("sluice stream index 1\nlayer {layer}\nindex {blob}\nheader {header}\n").into_bytes()
}

/// The signatures annotation of an index.
pub(crate) fn sign(key: &SigningKey, layer: &str, blob: &str, index: &LayerIndex) -> String {
    key.sign(&statement(layer, blob, &header_digest(index)))
}

/// Digest of an index's header, which names its table of contents by digest.
pub(crate) fn header_digest(index: &LayerIndex) -> String {
    let header = index.blob().get(..sluice_image::index::header::HEADER_LEN).unwrap_or_default();
    let digest = ring::digest::digest(&ring::digest::SHA256, header);
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::keys;

    fn blob(annotations: &[(&str, &str)]) -> ArtifactBlob {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let annotations = annotations.iter().map(owned).collect();
        ArtifactBlob { annotations, digest: "sha256:b".to_owned(), size: 1 }
    }

    #[test]
    fn only_what_a_configured_key_signed_is_believed() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = |name: &str| {
            keys::generate(&dir.path().join(name)).expect("made");
            let path = |end: &str| dir.path().join(name).with_extension(end);
            (SigningKey::read(&path("key")).expect("read"), path("pub"))
        };
        let ((old, old_public), (new, new_public), (strange, _)) = (key("old"), key("new"), key("strange"));
        let none = HashSet::new();
        let trust = Trust::open(Mode::Signed, &[old_public, new_public], false, dir.path()).expect("opened");
        let signed = |key: &SigningKey, layer: &str| key.sign(&statement(layer, "sha256:b", "sha256:a"));
        let (by_old, by_new, by_strange) = (signed(&old, "l"), signed(&new, "l"), signed(&strange, "l"));
        for (signatures, believed) in [
            (by_old.clone(), true),
            (by_new, true),
            (by_strange.clone(), false),
            (format!("{by_strange} {by_old}"), true),
            (signed(&old, "another layer"), false),
            (String::new(), false),
        ] {
            let blob = blob(&[(HEADER_ANNOTATION, "sha256:a"), (SIGNATURES_ANNOTATION, &signatures)]);
            assert_eq!(trust.refuses("l", &blob, &none).is_none(), believed, "{signatures}");
        }
        let moved = blob(&[(HEADER_ANNOTATION, "sha256:c"), (SIGNATURES_ANNOTATION, &by_old)]);
        assert!(trust.refuses("l", &moved, &none).is_some(), "a signature is of one header");
        assert!(trust.refuses("l", &blob(&[]), &none).is_some_and(|why| why.contains("not signed")));
    }

    #[test]
    fn local_is_this_node_and_the_operators_store() {
        let dir = tempfile::tempdir().expect("a directory");
        let strange = blob(&[(HEADER_ANNOTATION, "sha256:a")]);
        let none = HashSet::new();
        let open = |mode, own_store| Trust::open(mode, &[], own_store, dir.path()).expect("opened");
        let made = HashSet::from(["sha256:a".to_owned()]);
        assert!(open(Mode::Local, false).refuses("l", &strange, &made).is_none());
        assert!(open(Mode::Local, false).refuses("l", &strange, &none).is_some());
        assert!(open(Mode::Local, true).refuses("l", &strange, &none).is_none());
        assert!(open(Mode::Any, false).refuses("l", &strange, &none).is_none());
        assert!(open(Mode::Signed, true).refuses("l", &strange, &none).is_some());
        let trust = open(Mode::Any, false);
        std::fs::create_dir_all(trust.quarantine("sha256:a")).expect("made");
        assert!(trust.refuses("l", &strange, &none).is_some(), "one in quarantine never");
    }
}
