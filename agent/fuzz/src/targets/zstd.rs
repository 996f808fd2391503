//! The stepwise zstd decoder against the `zstd` crate's reader, in pieces of any size and from every frame.

use crate::decode::{LIMIT, decode, from_checkpoints};
use sluice_image::decode::Compression;
use std::io::Read;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else { return };
    let piece = usize::from(*piece);
    let (ours, output) = decode(Compression::Zstd, bytes, piece);
    let Ok(mut reader) = zstd::stream::read::Decoder::new(bytes) else { return };
    let mut theirs = Vec::new();
    if reader.window_log_max(27).is_ok() {
        let accepted = reader.take(LIMIT as u64).read_to_end(&mut theirs).is_ok();
        // The library may know formats from before zstd 1.0; ours refuses them.
        let old = bytes.windows(4).any(|four| matches!(four, [0x1e..=0x27, 0xb5, 0x2f, 0xfd]));
        if accepted && !bytes.is_empty() && !old {
            // An error behind the limit may cost one of them the last step's output.
            let common = output.len().min(theirs.len());
            assert!(output[..common] == theirs[..common]);
            if theirs.len() < LIMIT {
                assert_eq!(output.len(), theirs.len());
                assert!(ours.is_ok(), "{ours:?}");
            }
        }
        if ours.is_ok() && output.len() < LIMIT {
            assert!(accepted);
        }
    }
    from_checkpoints(Compression::Zstd, bytes, piece);
}
