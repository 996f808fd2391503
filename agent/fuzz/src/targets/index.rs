//! Index blobs: the bytes as a blob, and as the raw sections of a blob whose digest and frames are right.

use crate::index::{blob, walk, with_toc_digest};
use sluice_image::index::LayerIndex;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    let blob = if mode & 1 == 0 { with_toc_digest(bytes.to_vec()) } else { blob(bytes) };
    if let Ok(index) = LayerIndex::from_blob(blob) {
        walk(&index);
    }
}
