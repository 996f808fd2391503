//! Driving the decoders.

use sluice_image::decode::{Checkpoint, Compression, DecodeError, Decoder};
use sluice_image::records::{SpanKind, SpanRecord};

/// Output looked at: more only takes longer.
pub const LIMIT: usize = 1 << 20;
/// Checkpoints tried per input.
const CHECKPOINTS: usize = 4;

/// Decodes in pieces; at most [`LIMIT`] bytes, and what came before an error.
pub fn decode(compression: Compression, bytes: &[u8], piece: usize) -> (Result<(), DecodeError>, Vec<u8>) {
    let mut out = Vec::new();
    let result = Decoder::new(compression)
        .and_then(|mut decoder| run(&mut decoder, bytes, piece, &mut out, &mut |_, _| {}));
    (result, out)
}

/// Decodes anew from checkpoints: what comes out is the rest of the whole.
pub fn from_checkpoints(compression: Compression, bytes: &[u8], piece: usize) {
    let mut found: Vec<(usize, Checkpoint)> = Vec::new();
    let mut out = Vec::new();
    let Ok(mut decoder) = Decoder::new(compression) else { return };
    let result = run(&mut decoder, bytes, piece, &mut out, &mut |at, checkpoint| {
        if found.len() < CHECKPOINTS && at < LIMIT {
            found.push((at, checkpoint));
        }
    });
    for (at, checkpoint) in found {
        let window =
            checkpoint.window.as_ref().map(|window| zstd::bulk::compress(window, 1).expect("compress"));
        let span = SpanRecord {
            compressed_offset: checkpoint.compressed_offset.into(),
            tar_offset: 0.into(),
            window_offset: 0.into(),
            window_len: 0.into(),
            bits: checkpoint.bits,
            kind: checkpoint.kind as u8,
            reserved: [0; 2],
        };
        let start = usize::try_from(checkpoint.compressed_offset).expect("inside the input");
        let mut rest = Vec::new();
        let mut again = Decoder::at_span(&span, &window.unwrap_or_default()).expect("a checkpoint of ours");
        let ended = run(&mut again, &bytes[start..], usize::MAX, &mut rest, &mut |_, _| {});
        let common = rest.len().min(out.len() - at);
        assert_eq!(rest[..common], out[at..at + common]);
        // A member's checksum cannot be checked from its middle, so errors may only vanish.
        if result.is_ok()
            && out.len() < LIMIT
            && (start < bytes.len() || span.kind == SpanKind::DeflateBlock as u8)
        {
            assert!(ended.is_ok(), "{ended:?}");
            assert_eq!(rest.len(), out.len() - at);
        }
    }
}

/// A span of listed pieces: the list, then what they are made of. How the bytes are cut does not matter.
pub fn members(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let Some((list_len, rest)) = rest.split_first() else { return };
    let (list, compressed) = rest.split_at(rest.len().min(usize::from(*list_len)));
    let span = SpanRecord {
        compressed_offset: 0.into(),
        tar_offset: 0.into(),
        window_offset: 0.into(),
        window_len: 0.into(),
        bits: 0,
        kind: if kind % 2 == 0 { SpanKind::GzipMembers } else { SpanKind::ZstdFrames } as u8,
        reserved: [0; 2],
    };
    let window = zstd::bulk::compress(list, 1).expect("compress");
    let outputs = [usize::MAX, usize::from(kind / 2)].map(|piece| {
        let mut out = Vec::new();
        let ended = Decoder::at_span(&span, &window)
            .and_then(|mut decoder| run(&mut decoder, compressed, piece, &mut out, &mut |_, _| {}));
        (ended.is_ok(), out)
    });
    if outputs.iter().any(|(ended, _)| *ended) {
        assert_eq!(outputs[0], outputs[1]);
    }
}

fn run(
    decoder: &mut Decoder,
    bytes: &[u8],
    piece: usize,
    out: &mut Vec<u8>,
    at_checkpoint: &mut dyn FnMut(usize, Checkpoint),
) -> Result<(), DecodeError> {
    let mut idle = 0;
    for mut input in bytes.chunks(piece.max(1)) {
        loop {
            let step = decoder.step(input)?;
            input = input.get(step.consumed..).expect("no more than there is");
            let output = decoder.output();
            out.extend_from_slice(output.get(..output.len().min(LIMIT - out.len())).expect("in range"));
            if out.len() == LIMIT {
                return Ok(());
            }
            let nothing = step.consumed == 0 && output.is_empty();
            if step.boundary
                && let Some(checkpoint) = decoder.checkpoint()
            {
                at_checkpoint(out.len(), checkpoint);
            }
            if nothing && !step.boundary {
                break;
            }
            idle = if nothing { idle + 1 } else { 0 };
            assert!(idle < 100, "boundaries without progress");
        }
    }
    decoder.finish()
}
