//! zstd as a stream of steps; a checkpoint is possible between frames.

use zstd::stream::raw::{DParameter, Decoder, Operation};

use super::{Checkpoint, DecodeError, Step};
use crate::records::SpanKind;

/// Output produced at most by one step.
const STEP_OUTPUT: usize = 256 * 1024;
/// Largest window accepted, as a power of two: what `zstd` itself accepts without `--long` (128 MiB).
const WINDOW_LOG_MAX: u32 = 27;

/// See the module text.
pub struct ZstdDecoder {
    decoder: Decoder<'static>,
    offset: u64,
    buffer: Vec<u8>,
    output: usize,
    between_frames: bool,
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
        let offset = self.offset;
        let damaged = |what| DecodeError::Damaged { format: "zstd", offset, what };
        if self.between_frames {
            self.decoder.reinit().map_err(|_io| damaged("no decoder"))?;
        }
        let status = self
            .decoder
            .run_on_buffers(input, &mut self.buffer)
            .map_err(|_io| damaged("invalid frame, or a window above 128 MiB"))?;
        self.output = status.bytes_written;
        self.offset += status.bytes_read as u64;
        self.between_frames = status.remaining == 0;
        self.pending = !self.between_frames && status.bytes_written == self.buffer.len();
        self.frames += u64::from(self.between_frames);
        Ok(Step { consumed: status.bytes_read, boundary: self.between_frames })
    }

    pub(super) fn checkpoint(&self) -> Option<Checkpoint> {
        self.between_frames.then_some(Checkpoint {
            compressed_offset: self.offset,
            bits: 0,
            kind: SpanKind::ZstdFrame,
            window: None,
        })
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.between_frames && self.frames > 0 {
            return Ok(());
        }
        Err(DecodeError::Truncated { format: "zstd", offset: self.offset })
    }
}
