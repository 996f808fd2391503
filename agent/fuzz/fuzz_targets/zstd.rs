//! The stepwise zstd decoder against the `zstd` crate's reader, in pieces of any size and from every frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_fuzz::decode::{LIMIT, decode, from_checkpoints};
use sluice_image::decode::Compression;
use std::io::Read;

fuzz_target!(|data: &[u8]| {
    let Some((piece, bytes)) = data.split_first() else { return };
    let piece = usize::from(*piece);
    let (ours, output) = decode(Compression::Zstd, bytes, piece);
    let Ok(mut reader) = zstd::stream::read::Decoder::new(bytes) else { return };
    let mut theirs = Vec::new();
    if reader.window_log_max(27).is_ok() {
        let accepted = reader.take(LIMIT as u64).read_to_end(&mut theirs).is_ok();
        if accepted && !bytes.is_empty() {
            assert_eq!(output, theirs);
            if theirs.len() < LIMIT {
                assert!(ours.is_ok(), "{ours:?}");
            }
        }
        if ours.is_ok() && output.len() < LIMIT {
            assert!(accepted);
        }
    }
    from_checkpoints(Compression::Zstd, bytes, piece);
});
