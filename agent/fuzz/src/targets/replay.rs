//! The replay of a tar from an index: it gives as many bytes as the header says, or an error.

use crate::index::blob;
use sluice_image::index::LayerIndex;

/// A longer tar only takes longer.
const LIMIT: u64 = 4 << 20;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(index) = LayerIndex::from_blob(blob(data)) else { return };
    let header = *index.header();
    if header.tar_size.get() > LIMIT {
        return;
    }
    let mut bytes = 0;
    let content = |at: u64, buffer: &mut [u8]| {
        assert!(at + buffer.len() as u64 <= header.store_size.get().max(at), "outside the layer's file");
        buffer.fill(1);
        Ok(())
    };
    if index.replay_tar(content, |piece| bytes += piece.len() as u64).is_ok() {
        assert_eq!(bytes, header.tar_size.get());
    }
    assert!(bytes <= LIMIT);
}
