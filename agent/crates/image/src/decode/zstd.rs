//! zstd as a stream of steps; a checkpoint is possible between frames.

use zstd::stream::raw::{DParameter, Decoder, Operation};

use super::{Checkpoint, DecodeError, Step};
use crate::records::SpanKind;

/// Output produced at most by one step.
const STEP_OUTPUT: usize = 256 * 1024;
/// Largest window accepted, as a power of two: what `zstd` itself accepts without `--long` (128 MiB).
const WINDOW_LOG_MAX: u32 = 27;
/// Bytes that tell what a frame is.
const MAGIC_LEN: usize = 4;

/// See the module text.
pub struct ZstdDecoder {
    decoder: Decoder<'static>,
    offset: u64,
    buffer: Vec<u8>,
    output: usize,
    between_frames: bool,
    /// First bytes of a frame, as long as they are fewer than a magic number.
    magic: Vec<u8>,
    frames: u64,
    /// The decoder may hold output that did not fit.
    pending: bool,
}

impl std::fmt::Debug for ZstdDecoder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ZstdDecoder").field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl ZstdDecoder {
    /// At the first byte of a frame, which stands at `offset`.
    pub fn new(offset: u64) -> Result<Self, DecodeError> {
        let failed = |_: std::io::Error| DecodeError::Damaged { format: "zstd", offset, what: "no decoder" };
        let mut decoder = Decoder::new().map_err(failed)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(failed)?;
        Ok(Self {
            decoder,
            offset,
            buffer: vec![0; STEP_OUTPUT],
            output: 0,
            between_frames: true,
            magic: Vec::with_capacity(MAGIC_LEN),
            frames: 0,
            pending: false,
        })
    }

    pub(super) fn output(&self) -> &[u8] {
        self.buffer.get(..self.output).unwrap_or(&[])
    }

    pub(super) fn step(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        self.output = 0;
        if input.is_empty() && !self.pending {
            return Ok(Step { consumed: 0, boundary: false });
        }
        if !self.between_frames {
            return self.run(input);
        }
        let taken = input.len().min(MAGIC_LEN - self.magic.len());
        self.magic.extend_from_slice(input.get(..taken).unwrap_or(input));
        self.offset += taken as u64;
        if self.magic.len() == MAGIC_LEN {
            let magic = std::mem::replace(&mut self.magic, Vec::with_capacity(MAGIC_LEN));
            // The library may know formats from before 1.0 too, whose decoders nobody should feed with outside bytes.
            if !matches!(magic.as_slice(), [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18]) {
                return Err(self.damaged("no frame here"));
            }
            self.decoder.reinit().map_err(|_io| self.damaged("no decoder"))?;
            let begun = self.run(&magic)?;
            self.offset -= begun.consumed as u64;
            if begun.consumed != MAGIC_LEN || begun.boundary {
                return Err(self.damaged("no frame here"));
            }
        }
        Ok(Step { consumed: taken, boundary: false })
    }

    fn run(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        let status = self
            .decoder
            .run_on_buffers(input, &mut self.buffer)
            .map_err(|_io| self.damaged("invalid frame, or a window above 128 MiB"))?;
        self.output = status.bytes_written;
        self.offset += status.bytes_read as u64;
        self.between_frames = status.remaining == 0;
        self.pending = !self.between_frames && status.bytes_written == self.buffer.len();
        self.frames += u64::from(self.between_frames);
        Ok(Step { consumed: status.bytes_read, boundary: self.between_frames })
    }

    fn damaged(&self, what: &'static str) -> DecodeError {
        DecodeError::Damaged { format: "zstd", offset: self.offset, what }
    }

    pub(super) fn checkpoint(&self) -> Option<Checkpoint> {
        (self.between_frames && self.magic.is_empty()).then_some(Checkpoint {
            compressed_offset: self.offset,
            bits: 0,
            kind: SpanKind::ZstdFrame,
            window: None,
        })
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.between_frames && self.magic.is_empty() && self.frames > 0 {
            return Ok(());
        }
        Err(DecodeError::Truncated { format: "zstd", offset: self.offset })
    }
}
