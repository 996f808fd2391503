//! Decompression of layers, as a stream that offers checkpoints, and of single spans between checkpoints.
//!
//! The stream says after each step whether decoding could begin anew at that place. A span's decoder is the same machine,
//! begun there. gzip (RFC 1952, any number of members), zstd (RFC 8878, any number of frames, skippable ones
//! included) and plain tar.

mod gzip;
pub mod members;
mod zstd;

pub(crate) use self::gzip::first_output;
use crate::records::{SpanKind, SpanRecord};

/// Deflate's window: what a decoder must know of the bytes before it.
pub const WINDOW: usize = 32 * 1024;
/// Largest span accepted, in bytes of tar: beyond, a layer has no random access.
pub const MAX_SPAN: u64 = 64 << 20;
/// Largest zstd frame of a window accepted.
pub const MAX_WINDOW_FRAME: u32 = 64 * 1024;

/// Why bytes could not be decoded. Offsets are in the compressed layer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not what the format allows.
    #[error("{format} data is damaged at compressed offset {offset}: {what}")]
    Damaged {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The stream ends too early.
    #[error("{format} data ends early, at compressed offset {offset}")]
    Truncated {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// Where it ends.
        offset: u64,
    },
    /// A span does not give what the index says.
    #[error("span at compressed offset {offset} does not decode as the index says: {what}")]
    Span {
        /// Where the span begins.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Compression {
    /// Plain tar.
    None = 0,
    /// gzip.
    Gzip = 1,
    /// zstd.
    Zstd = 2,
}

impl Compression {
    /// Tells by the first bytes (4 suffice), as container engines do; media types often lie.
    pub fn sniff(bytes: &[u8]) -> Self {
        match bytes {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable zstd frame.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// From its number in an index.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::None, Self::Gzip, Self::Zstd].into_iter().find(|one| *one as u8 == number)
    }
}

/// What one step of a decoder did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Decoding could begin anew here, after this step's output.
    pub boundary: bool,
}

/// A place where decoding can begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// See [`SpanRecord::compressed_offset`].
    pub compressed_offset: u64,
    /// See [`SpanRecord::bits`].
    pub bits: u8,
    /// How decoding begins here.
    pub kind: SpanKind,
    /// The last output before this place (at most [`WINDOW`] bytes), if decoding needs it.
    pub window: Option<Vec<u8>>,
}

/// A streaming decoder.
#[derive(Debug)]
pub enum Decoder {
    /// Plain bytes: offset of the next, and the last step's.
    Plain {
        /// Bytes consumed so far.
        offset: u64,
        /// The last step's output.
        output: Vec<u8>,
    },
    /// gzip.
    Gzip(Box<gzip::GzipDecoder>),
    /// zstd.
    Zstd(Box<zstd::ZstdDecoder>),
    /// Members or frames listed by a table of contents.
    Members(Box<members::MembersDecoder>),
}

/// Plain tar is cut into steps of this size, so that checkpoints fall often enough.
const PLAIN_STEP: usize = 256 * 1024;

impl Decoder {
    /// A decoder at the beginning of a layer.
    pub fn new(compression: Compression) -> Result<Self, DecodeError> {
        Self::at_member(compression, 0)
    }

    /// Takes bytes from the front of `input`; what comes out stands in [`Self::output`] until the next step. A step that
    /// neither consumes nor outputs needs more input.
    pub fn step(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        match self {
            Self::Plain { offset, output } => {
                let taken = input.len().min(PLAIN_STEP);
                output.clear();
                output.extend_from_slice(input.get(..taken).unwrap_or(input));
                *offset += taken as u64;
                Ok(Step { consumed: taken, boundary: taken > 0 })
            }
            Self::Gzip(decoder) => decoder.step(input),
            Self::Zstd(decoder) => decoder.step(input),
            Self::Members(decoder) => decoder.step(input),
        }
    }

    /// Output of the last step.
    pub fn output(&self) -> &[u8] {
        match self {
            Self::Plain { output, .. } => output,
            Self::Gzip(decoder) => decoder.output(),
            Self::Zstd(decoder) => decoder.output(),
            Self::Members(decoder) => decoder.output(),
        }
    }

    /// The place after the last step, if it was a boundary.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        match self {
            Self::Plain { offset, .. } => {
                Some(Checkpoint { compressed_offset: *offset, bits: 0, kind: SpanKind::Plain, window: None })
            }
            Self::Gzip(decoder) => decoder.checkpoint(),
            Self::Zstd(decoder) => decoder.checkpoint(),
            Self::Members(_) => None,
        }
    }

    /// Says that the input has ended.
    pub fn finish(&self) -> Result<(), DecodeError> {
        match self {
            Self::Plain { .. } => Ok(()),
            Self::Gzip(decoder) => decoder.finish(),
            Self::Zstd(decoder) => decoder.finish(),
            Self::Members(decoder) => decoder.finish(),
        }
    }

    /// A decoder at the first byte of a member or frame, which stands at `offset`.
    fn at_member(compression: Compression, offset: u64) -> Result<Self, DecodeError> {
        Ok(match compression {
            Compression::None => Self::Plain { offset, output: Vec::new() },
            Compression::Gzip => Self::Gzip(Box::new(gzip::GzipDecoder::new(offset))),
            Compression::Zstd => Self::Zstd(Box::new(zstd::ZstdDecoder::new(offset)?)),
        })
    }

    /// Whether the last step ended a member or frame.
    fn is_between_members(&self) -> bool {
        !matches!(self.checkpoint().map(|at| at.kind), None | Some(SpanKind::DeflateBlock | SpanKind::Plain))
    }

    /// A decoder at a span. `window_frame` is the span's zstd-compressed window, empty if it has none.
    pub fn at_span(span: &SpanRecord, window_frame: &[u8]) -> Result<Self, DecodeError> {
        let offset = span.compressed_offset.get();
        let wrong = |what| DecodeError::Span { offset, what };
        match span.kind {
            kind if kind == SpanKind::Plain as u8 => Ok(Self::Plain { offset, output: Vec::new() }),
            kind if kind == SpanKind::GzipMember as u8 => {
                Ok(Self::Gzip(Box::new(gzip::GzipDecoder::new(offset))))
            }
            kind if kind == SpanKind::ZstdFrame as u8 => {
                Ok(Self::Zstd(Box::new(zstd::ZstdDecoder::new(offset)?)))
            }
            kind if kind == SpanKind::GzipMembers as u8 || kind == SpanKind::ZstdFrames as u8 => {
                let list = ::zstd::bulk::decompress(window_frame, WINDOW)
                    .map_err(|_io| wrong("its list of pieces is damaged"))?;
                let compression =
                    if kind == SpanKind::GzipMembers as u8 { Compression::Gzip } else { Compression::Zstd };
                members::MembersDecoder::new(compression, offset, &list)
                    .map(|decoder| Self::Members(Box::new(decoder)))
                    .ok_or_else(|| wrong("its list of pieces is damaged"))
            }
            kind if kind == SpanKind::DeflateBlock as u8 => {
                let window = if window_frame.is_empty() {
                    Vec::new()
                } else {
                    ::zstd::bulk::decompress(window_frame, WINDOW)
                        .map_err(|_io| wrong("its window is damaged"))?
                };
                if span.bits > 7 {
                    return Err(wrong("its bit offset is above 7"));
                }
                Ok(Self::Gzip(Box::new(gzip::GzipDecoder::at_block(offset, span.bits, &window))))
            }
            _ => Err(wrong("its kind is unknown")),
        }
    }
}

/// Decodes one span: `compressed` begins at the span's compressed offset and reaches at least to the next span's
/// (one byte beyond when that has `bits`). Appends exactly `tar_len` bytes to `out`, never more.
pub fn decode_span(
    span: &SpanRecord,
    window_frame: &[u8],
    compressed: &[u8],
    tar_len: u64,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let wrong = |what| DecodeError::Span { offset: span.compressed_offset.get(), what };
    if tar_len > MAX_SPAN {
        return Err(wrong("it is longer than any span may be"));
    }
    let mut decoder = Decoder::at_span(span, window_frame)?;
    let mut input = compressed;
    let mut left = usize::try_from(tar_len).map_err(|_io| wrong("it is longer than memory"))?;
    out.reserve(left);
    while left > 0 {
        let step = decoder.step(input)?;
        input = input.get(step.consumed..).unwrap_or(&[]);
        let output = decoder.output();
        if step.consumed == 0 && output.is_empty() && !step.boundary {
            return Err(wrong("it ends early"));
        }
        let taken = output.len().min(left);
        out.extend_from_slice(output.get(..taken).unwrap_or(output));
        left -= taken;
    }
    Ok(())
}
