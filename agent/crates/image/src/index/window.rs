//! Windows that keep only those of their bytes that are used.
//!
//! What follows a checkpoint copies few of the 32 KiB before it. The others may as well be zero, and then take next to no room
//! in an index: for the same size it has several times as many checkpoints.
//!
//! Only the first 32 KiB of output reach the window. Which bytes they reach is found without a look into the deflate: they are decoded
//! with every byte of the window replaced by the low half of its position, and again with the high half. What comes out twice is a
//! position; a literal comes out equal both times, as do positions whose halves are equal, so those 128 are always kept.

use crate::decode::{Checkpoint, WINDOW, first_output};

/// A window whose use is not known yet.
#[derive(Debug)]
pub(super) struct OpenWindow {
    /// Number of the span that begins with it.
    pub(super) span: usize,
    bits: u8,
    window: Vec<u8>,
    /// From the span's first byte.
    compressed: Vec<u8>,
    produced: usize,
}

impl OpenWindow {
    /// `shared` is the byte that the checkpoint shares with the block before, if it does.
    pub(super) fn new(span: usize, checkpoint: &Checkpoint, window: Vec<u8>, shared: u8) -> Self {
        let compressed = if checkpoint.bits > 0 { vec![shared] } else { Vec::new() };
        Self { span, bits: checkpoint.bits, window, compressed, produced: 0 }
    }

    /// Takes what the decoder consumed next, and how much that gave; says whether all is known.
    pub(super) fn follow(&mut self, consumed: &[u8], produced: usize) -> bool {
        self.compressed.extend_from_slice(consumed);
        self.produced += produced;
        self.produced >= WINDOW
    }

    /// The window with zeros for what is not used; as it was if that cannot be told.
    pub(super) fn close(mut self) -> Vec<u8> {
        let with = |half: fn(usize) -> u8| {
            let window: Vec<u8> = (0..self.window.len()).map(half).collect();
            first_output(self.bits, &window, &self.compressed)
        };
        let halves = (with(|position| position as u8), with(|position| (position >> 8) as u8));
        if let (Ok(low), Ok(high)) = halves {
            let mut used = vec![false; self.window.len()];
            for (low, high) in low.iter().zip(&high) {
                if let Some(used) = used.get_mut(usize::from(u16::from_le_bytes([*low, *high]))) {
                    *used = true;
                }
            }
            for (position, byte) in self.window.iter_mut().enumerate() {
                let ambiguous = position % 257 == 0;
                if !ambiguous && !used.get(position).copied().unwrap_or(true) {
                    *byte = 0;
                }
            }
        }
        self.window
    }
}
