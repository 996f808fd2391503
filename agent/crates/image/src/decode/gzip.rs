//! gzip as a stream of steps: members, deflate blocks, and the places between them.
//!
//! Deflate is `miniz_oxide`'s, which can stop at block boundaries and begin again there; it is within a tenth
//! of zlib-rs's speed and has no unsafe interface.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress, inflate_flags};

use super::{Checkpoint, DecodeError, Step, WINDOW};
use crate::records::SpanKind;

/// Output produced at most by one step, beyond the window kept.
const STEP_OUTPUT: usize = 256 * 1024;
/// Longest member header accepted: the fixed part, an extra field, a name and a comment.
const MAX_HEADER: usize = 256 * 1024;

const FLAGS: u32 = inflate_flags::TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY
    | inflate_flags::TINFL_FLAG_HAS_MORE_INPUT
    | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;

/// See the module text.
pub struct GzipDecoder {
    state: State,
    offset: u64,
    inflate: Box<DecompressorOxide>,
    /// `[window | output of this step | free]`.
    buffer: Vec<u8>,
    output: std::ops::Range<usize>,
    /// Checksum and length of the member so far; none when decoding began inside it.
    check: Option<(crc32fast::Hasher, u64)>,
    members: u64,
}

impl std::fmt::Debug for GzipDecoder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("GzipDecoder")
            .field("state", &self.state)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Header(Vec<u8>),
    Body,
    /// Stopped at the end of a block that is not the last one.
    Boundary,
    Trailer(Vec<u8>),
    /// Zeros after the last member: nothing else may follow, as for gzip(1), which calls it trailing garbage.
    Padding,
}

impl GzipDecoder {
    /// At the first byte of a member, which stands at `offset`.
    pub fn new(offset: u64) -> Self {
        Self {
            state: State::Header(Vec::new()),
            offset,
            inflate: Box::default(),
            buffer: vec![0; WINDOW + STEP_OUTPUT],
            output: 0..0,
            check: None,
            members: 0,
        }
    }

    /// At a block inside a member: `bits` low bits of the byte at `offset` belong to the block before.
    pub fn at_block(offset: u64, bits: u8, window: &[u8]) -> Self {
        let mut decoder = Self::new(offset);
        decoder.state = State::Body;
        if bits > 0 {
            // The first input byte is fed by hand, without its used bits: see `first_bits`.
            decoder.state = State::Header(vec![bits]);
            decoder.members = u64::MAX;
        }
        let window = window.get(window.len().saturating_sub(WINDOW)..).unwrap_or(window);
        if let Some(front) = decoder.buffer.get_mut(..window.len()) {
            front.copy_from_slice(window);
        }
        decoder.output = window.len()..window.len();
        decoder
    }

    pub(super) fn output(&self) -> &[u8] {
        self.buffer.get(self.output.clone()).unwrap_or(&[])
    }

    pub(super) fn step(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        self.make_room();
        let step = match &mut self.state {
            State::Header(_) if self.members == u64::MAX => self.first_bits(input),
            State::Header(_) => self.header(input)?,
            State::Body | State::Boundary => self.body(input)?,
            State::Trailer(_) => self.trailer(input)?,
            State::Padding => self.padding(input)?,
        };
        self.offset += step.consumed as u64;
        Ok(step)
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        match &self.state {
            State::Header(bytes) if self.members > 0 && bytes.is_empty() => Ok(()),
            State::Padding => Ok(()),
            _ => Err(DecodeError::Truncated { format: "gzip", offset: self.offset }),
        }
    }

    pub(super) fn checkpoint(&self) -> Option<Checkpoint> {
        match &self.state {
            State::Boundary => {
                let state = self.inflate.block_boundary_state()?;
                let back = u64::from(state.num_bits > 0);
                let bits = if state.num_bits > 0 { 8 - state.num_bits } else { 0 };
                let start = self.output.end.saturating_sub(WINDOW);
                let window = self.buffer.get(start..self.output.end).unwrap_or(&[]).to_vec();
                Some(Checkpoint {
                    compressed_offset: self.offset - back,
                    bits,
                    kind: SpanKind::DeflateBlock,
                    window: Some(window),
                })
            }
            State::Header(bytes) if bytes.is_empty() => Some(Checkpoint {
                compressed_offset: self.offset,
                bits: 0,
                kind: SpanKind::GzipMember,
                window: None,
            }),
            _ => None,
        }
    }

    /// Moves the window to the front when little room is left; forgets the last step's output.
    fn make_room(&mut self) {
        let end = self.output.end;
        if self.buffer.len() - end < STEP_OUTPUT / 2 {
            let start = end.saturating_sub(WINDOW);
            self.buffer.copy_within(start..end, 0);
            self.output = end - start..end - start;
        } else {
            self.output = end..end;
        }
    }

    /// Feeds the byte that two blocks share, without the bits of the first.
    fn first_bits(&mut self, input: &[u8]) -> Step {
        let (State::Header(used), Some(first)) = (&self.state, input.first()) else {
            return Step { consumed: 0, boundary: false };
        };
        let used = used.first().copied().unwrap_or(0);
        *self.inflate = DecompressorOxide::from_block_boundary_state(&BlockBoundaryState {
            num_bits: 8 - used,
            bit_buf: first >> used,
            ..BlockBoundaryState::default()
        });
        self.state = State::Body;
        self.members = 0;
        Step { consumed: 1, boundary: false }
    }

    fn header(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        let State::Header(bytes) = &mut self.state else { return Ok(Step { consumed: 0, boundary: false }) };
        let had = bytes.len();
        // Some writers pad the end with zeros. Decoding may begin there, too, behind the last member.
        if (self.members > 0 || self.offset > 0) && had == 0 && input.first() == Some(&0) {
            self.state = State::Padding;
            return self.padding(input);
        }
        bytes.extend_from_slice(input.get(..input.len().min(MAX_HEADER)).unwrap_or(input));
        match header_len(bytes) {
            Err(what) => Err(self.damaged(what)),
            Ok(Some(len)) => {
                self.state = State::Body;
                *self.inflate = DecompressorOxide::new();
                self.check = Some((crc32fast::Hasher::new(), 0));
                Ok(Step { consumed: len - had, boundary: false })
            }
            Ok(None) if bytes.len() > MAX_HEADER => Err(self.damaged("member header is too long")),
            Ok(None) => {
                let consumed = bytes.len() - had;
                Ok(Step { consumed, boundary: false })
            }
        }
    }

    fn body(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        let start = self.output.end;
        let limit = self.buffer.len().min(start + STEP_OUTPUT);
        let Some(room) = self.buffer.get_mut(..limit) else {
            return Err(self.damaged("no room for output"));
        };
        let (status, consumed, produced) = decompress(&mut self.inflate, input, room, start, FLAGS);
        self.output = start..start + produced;
        if let Some((crc, length)) = &mut self.check {
            crc.update(self.buffer.get(self.output.clone()).unwrap_or(&[]));
            *length += produced as u64;
        }
        self.state = State::Body;
        match status {
            TINFLStatus::Done => self.state = State::Trailer(Vec::new()),
            TINFLStatus::BlockBoundary => self.state = State::Boundary,
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => {}
            _ => return Err(self.damaged("invalid deflate block")),
        }
        Ok(Step { consumed, boundary: self.state == State::Boundary })
    }

    fn trailer(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        let State::Trailer(bytes) = &mut self.state else { return Ok(Step { consumed: 0, boundary: false }) };
        let taken = input.len().min(8 - bytes.len());
        bytes.extend_from_slice(input.get(..taken).unwrap_or(input));
        let Ok(trailer) = <[u8; 8]>::try_from(bytes.as_slice()) else {
            return Ok(Step { consumed: taken, boundary: false });
        };
        if let Some((crc, length)) = self.check.take() {
            let expected = u64::from(crc.finalize()) | (length & 0xffff_ffff) << 32;
            if u64::from_le_bytes(trailer) != expected {
                return Err(self.damaged("member checksum or length does not match"));
            }
        }
        self.members += 1;
        self.state = State::Header(Vec::new());
        Ok(Step { consumed: taken, boundary: true })
    }

    fn padding(&self, input: &[u8]) -> Result<Step, DecodeError> {
        if input.iter().any(|byte| *byte != 0) {
            return Err(self.damaged("bytes after the last member"));
        }
        Ok(Step { consumed: input.len(), boundary: false })
    }

    fn damaged(&self, what: &'static str) -> DecodeError {
        DecodeError::Damaged { format: "gzip", offset: self.offset, what }
    }
}

/// The first [`WINDOW`] bytes that come out of a block inside a member, or fewer if `compressed` holds no more; see [`GzipDecoder::at_block`].
pub(crate) fn first_output(bits: u8, window: &[u8], mut compressed: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = GzipDecoder::at_block(0, bits, window);
    // No more is decoded than asked for.
    decoder.buffer.truncate(window.len() + WINDOW);
    let mut output = Vec::with_capacity(WINDOW);
    while output.len() < WINDOW && decoder.check.is_none() {
        let step = decoder.step(compressed)?;
        output.extend_from_slice(decoder.output());
        if step.consumed == 0 && decoder.output().is_empty() {
            break;
        }
        compressed = compressed.get(step.consumed..).unwrap_or(&[]);
    }
    Ok(output)
}

/// Length of the member header at the front of `bytes` (RFC 1952 §2.3), `None` if more bytes are needed.
fn header_len(bytes: &[u8]) -> Result<Option<usize>, &'static str> {
    let magic_len = bytes.len().min(3);
    if bytes.get(..magic_len) != [0x1f, 0x8b, 8].get(..magic_len) {
        return Err("no gzip member here");
    }
    let Some(flags) = bytes.get(3) else { return Ok(None) };
    if flags & 0xe0 != 0 {
        return Err("reserved header flags are set");
    }
    let mut at = 10;
    if flags & 4 != 0 {
        let Some([low, high]) = bytes.get(at..at + 2) else { return Ok(None) };
        at += 2 + usize::from(u16::from_le_bytes([*low, *high]));
    }
    for flag in [8, 16] {
        if flags & flag != 0 {
            let Some(end) = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == 0)) else {
                return Ok(None);
            };
            at += end + 1;
        }
    }
    if flags & 2 != 0 {
        at += 2;
    }
    Ok((bytes.len() >= at).then_some(at))
}
