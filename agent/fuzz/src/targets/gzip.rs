//! The gzip decoder against zlib-rs: what one accepts the other accepts with the same output, and decoding begun at any
//! checkpoint gives the rest.

use crate::decode::{LIMIT, decode, from_checkpoints};
use sluice_image::decode::Compression;
use std::io::Read;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    if mode & 1 == 0 {
        members(bytes, usize::from(mode >> 1));
    } else {
        deflate(bytes, usize::from(mode >> 1));
    }
}

/// Whole members, headers and trailers included.
fn members(bytes: &[u8], piece: usize) {
    let (ours, output) = decode(Compression::Gzip, bytes, piece);
    let mut theirs = Vec::new();
    let accepted = flate2::read::MultiGzDecoder::new(bytes).take(LIMIT as u64).read_to_end(&mut theirs);
    if accepted.is_ok() && !bytes.is_empty() {
        // An error behind the limit may cost one of them the last step's output.
        let common = output.len().min(theirs.len());
        assert!(output[..common] == theirs[..common]);
        if theirs.len() < LIMIT {
            assert_eq!(output.len(), theirs.len());
            assert!(ours.is_ok(), "{ours:?}");
        }
    }
    from_checkpoints(Compression::Gzip, bytes, piece);
}

/// A deflate stream, so that the fuzzer need not find checksums.
fn deflate(bytes: &[u8], piece: usize) {
    let member = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255], bytes].concat();
    let (_, output) = decode(Compression::Gzip, &member, piece);
    let mut theirs = vec![0; LIMIT];
    let mut inflate = flate2::Decompress::new(false);
    // An error is as good: what came out before it counts.
    let _status = inflate.decompress(bytes, &mut theirs, flate2::FlushDecompress::Sync);
    theirs.truncate(inflate.total_out() as usize);
    let common = output.len().min(theirs.len());
    assert_eq!(output[..common], theirs[..common]);
    from_checkpoints(Compression::Gzip, &member, piece);
}
