//! Independent gzip members or zstd frames, each beginning with one piece of content: what eStargz and zstd:chunked are made of.
//!
//! Their table of contents says where contents begin, but not what stands between them. So a span of such a layer lists its
//! pieces, and what stands between two contents comes out as zeros, as many as the stand-in tar has there.

use std::collections::VecDeque;

use super::{Compression, DecodeError, Decoder, Step, WINDOW};

/// Most zeros that one step puts out.
const ZEROS: [u8; 16 * 1024] = [0; 16 * 1024];

/// One piece of a span: a member's or frame's beginning, and what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Piece {
    /// Bytes of the layer blob from this piece's first to the next one's.
    pub compressed: u64,
    /// Bytes of content that decoding from its first byte gives; 0: nothing is decoded.
    pub content: u64,
    /// Bytes of the tar after the content: they come out as zeros.
    pub gap: u64,
}

/// Puts pieces into the form in which a span's window holds them, before compression; at most [`WINDOW`] bytes.
#[derive(Debug, Default)]
pub struct PieceList(Vec<u8>);

impl PieceList {
    /// Adds a piece, unless the list is full.
    pub fn push(&mut self, piece: Piece) -> bool {
        let before = self.0.len();
        for number in [piece.compressed, piece.content, piece.gap] {
            crate::varint::put(&mut self.0, number);
        }
        let fits = self.0.len() <= WINDOW;
        if !fits {
            self.0.truncate(before);
        }
        fits
    }

    /// Bytes so far.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

fn read_list(mut bytes: &[u8]) -> Option<VecDeque<Piece>> {
    let mut pieces = VecDeque::new();
    while !bytes.is_empty() {
        let mut number = || crate::varint::take(&mut bytes);
        pieces.push_back(Piece { compressed: number()?, content: number()?, gap: number()? });
    }
    Some(pieces)
}

/// See the module text.
#[derive(Debug)]
pub struct MembersDecoder {
    compression: Compression,
    /// The piece that passes: what is left of it.
    piece: Piece,
    next: VecDeque<Piece>,
    inner: Option<Box<Decoder>>,
    offset: u64,
    output: Output,
}

/// What the last step put out.
#[derive(Debug, Clone, Copy)]
enum Output {
    Content(usize),
    Zeros(usize),
}

impl MembersDecoder {
    /// At `offset` of the blob; `list` is a [`PieceList`]'s bytes. `None`: they are no list.
    pub(super) fn new(compression: Compression, offset: u64, list: &[u8]) -> Option<Self> {
        let next = read_list(list)?;
        Some(Self {
            compression,
            piece: Piece::default(),
            next,
            inner: None,
            offset,
            output: Output::Zeros(0),
        })
    }

    pub(super) fn output(&self) -> &[u8] {
        match (self.output, &self.inner) {
            (Output::Content(len), Some(inner)) => inner.output().get(..len).unwrap_or(&[]),
            (Output::Zeros(len), _) => ZEROS.get(..len).unwrap_or(&[]),
            (Output::Content(_), None) => &[],
        }
    }

    pub(super) fn step(&mut self, input: &[u8]) -> Result<Step, DecodeError> {
        self.output = Output::Zeros(0);
        if self.piece == Piece::default() {
            let Some(piece) = self.next.pop_front() else { return Ok(Step { consumed: 0, boundary: false }) };
            self.piece = piece;
            self.inner = if piece.content == 0 {
                None
            } else {
                Some(Box::new(Decoder::at_member(self.compression, self.offset)?))
            };
        }
        let available = usize::try_from(self.piece.compressed).unwrap_or(usize::MAX).min(input.len());
        let input = input.get(..available).unwrap_or(input);
        let consumed = if self.piece.content > 0 {
            self.content(input)?
        } else if self.piece.compressed > 0 {
            input.len()
        } else {
            let zeros = usize::try_from(self.piece.gap).unwrap_or(usize::MAX).min(ZEROS.len());
            self.piece.gap -= zeros as u64;
            self.output = Output::Zeros(zeros);
            0
        };
        self.piece.compressed -= consumed as u64;
        self.offset += consumed as u64;
        // Said also without output, so that the next piece is begun: the list is finite.
        Ok(Step { consumed, boundary: self.piece == Piece::default() })
    }

    fn content(&mut self, input: &[u8]) -> Result<usize, DecodeError> {
        let Some(inner) = &mut self.inner else { return Ok(0) };
        let step = inner.step(input)?;
        let taken = inner.output().len().min(usize::try_from(self.piece.content).unwrap_or(usize::MAX));
        self.output = Output::Content(taken);
        self.piece.content -= taken as u64;
        let idle = step.consumed == 0 && taken == 0 && !step.boundary;
        // Another member in the piece is no continuation: each piece's content is in one.
        let ended = step.boundary && self.piece.content > 0 && inner.is_between_members();
        if ended || (idle && self.piece.compressed == 0) {
            return Err(DecodeError::Truncated { format: "embedded table's", offset: self.offset });
        }
        Ok(step.consumed)
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.piece == Piece::default() && self.next.is_empty() {
            return Ok(());
        }
        Err(DecodeError::Truncated { format: "embedded table's", offset: self.offset })
    }
}
