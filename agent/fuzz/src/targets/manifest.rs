//! Manifests and configurations of images: two documents, the first one's length in front.

use bytes::Bytes;
use sluice_registry::{Client, ResolvedImage};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((len, rest)) = data.split_first_chunk::<2>() else { return };
    let (manifest, config) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
    let reference = Client::parse("registry.example/app:1").expect("a reference");
    let [manifest, config] = [manifest, config].map(Bytes::copy_from_slice);
    let digest = crate::index::sha256(&manifest);
    let Ok(image) = ResolvedImage::from_parts(reference, digest, manifest, config) else { return };
    for layer in &image.layers {
        assert!(!layer.digest.is_empty());
    }
}
