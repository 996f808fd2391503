//! The two SHA-256 digests of a layer, on a thread of their own, beside decoding, parsing and chunk digests.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::IndexError;

/// Bytes handed to the digest thread at a time, and how many times they may wait: several layers are indexed at once, and where SHA-256
/// is what takes longest all that may wait does.
const HASH_PIECE: usize = 128 * 1024;
const PIECES_WAITING: usize = 3;

/// The digest thread and its queue.
#[derive(Debug)]
pub(super) struct Hashing {
    compressed: Vec<u8>,
    tar: Vec<u8>,
    queue: Option<SyncSender<(bool, Vec<u8>)>>,
    spare: Receiver<Vec<u8>>,
    thread: std::thread::JoinHandle<LayerDigests>,
}

/// SHA-256 of the blob and of the tar.
#[derive(Debug, Default)]
pub(super) struct LayerDigests {
    pub(super) compressed: [u8; 32],
    pub(super) tar: [u8; 32],
}

impl Hashing {
    pub(super) fn start() -> Result<Self, IndexError> {
        let (queue, pieces) = sync_channel::<(bool, Vec<u8>)>(PIECES_WAITING);
        let (give_back, spare) = sync_channel(PIECES_WAITING);
        let digests = move || {
            let mut contexts = [
                ring::digest::Context::new(&ring::digest::SHA256),
                ring::digest::Context::new(&ring::digest::SHA256),
            ];
            for (is_tar, mut piece) in pieces {
                if let Some(context) = contexts.get_mut(usize::from(is_tar)) {
                    context.update(&piece);
                }
                piece.clear();
                // Nobody may want the buffer back any more.
                drop(give_back.try_send(piece));
            }
            let [compressed, tar] = contexts.map(|context| {
                let mut digest = [0; 32];
                digest.copy_from_slice(context.finish().as_ref());
                digest
            });
            LayerDigests { compressed, tar }
        };
        let thread = std::thread::Builder::new().name("layer-digests".to_owned()).spawn(digests);
        let thread = thread.map_err(IndexError::Thread)?;
        Ok(Self { compressed: Vec::new(), tar: Vec::new(), queue: Some(queue), spare, thread })
    }

    pub(super) fn compressed(&mut self, bytes: &[u8]) {
        let open = std::mem::take(&mut self.compressed);
        self.compressed = self.take(false, open, bytes);
    }

    pub(super) fn tar(&mut self, bytes: &[u8]) {
        let open = std::mem::take(&mut self.tar);
        self.tar = self.take(true, open, bytes);
    }

    /// Sends `bytes` behind `open` in whole pieces; what is left for the next. No piece grows beyond its size.
    fn take(&self, is_tar: bool, mut open: Vec<u8>, mut bytes: &[u8]) -> Vec<u8> {
        while !bytes.is_empty() {
            if open.capacity() == 0 {
                open = self.spare.try_recv().unwrap_or_else(|_none| Vec::with_capacity(HASH_PIECE));
            }
            let room = HASH_PIECE.saturating_sub(open.len());
            let (now, rest) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
            open.extend_from_slice(now);
            bytes = rest;
            if open.len() >= HASH_PIECE {
                self.send(is_tar, std::mem::take(&mut open));
            }
        }
        open
    }

    fn send(&self, is_tar: bool, piece: Vec<u8>) {
        if let Some(queue) = &self.queue {
            // The thread ends only when the queue is dropped, or by a panic, which `finish` passes on.
            drop(queue.send((is_tar, piece)));
        }
    }

    pub(super) fn finish(mut self) -> LayerDigests {
        let (compressed, tar) = (std::mem::take(&mut self.compressed), std::mem::take(&mut self.tar));
        self.send(false, compressed);
        self.send(true, tar);
        self.queue = None;
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_its_digest_is_bounded_whatever_the_size_of_what_comes() {
        let (queue, pieces) = sync_channel(64);
        let (_give_back, spare) = sync_channel(1);
        let thread = std::thread::spawn(LayerDigests::default);
        let mut hashing =
            Hashing { compressed: Vec::new(), tar: Vec::new(), queue: Some(queue), spare, thread };
        let sent: Vec<u8> = (0..5_000_000_u32).map(|at| (at % 251) as u8).collect();
        // Of all sizes up to more than a megabyte.
        for (number, part) in sent.chunks(1_234_567).flat_map(|part| part.chunks(1_000_000)).enumerate() {
            if number % 2 == 0 { hashing.tar(part) } else { hashing.compressed(part) }
        }
        let _digests = hashing.finish();
        let (mut total, mut largest) = (0, 0);
        for (_, piece) in pieces {
            total += piece.len();
            largest = largest.max(piece.capacity());
        }
        assert_eq!((total, largest), (sent.len(), HASH_PIECE));
    }

    #[test]
    fn a_panic_of_the_digest_thread_is_not_taken_for_digests() {
        let (queue, pieces) = sync_channel(8);
        let (_give_back, spare) = sync_channel(8);
        let thread = std::thread::spawn(move || -> LayerDigests {
            drop(pieces);
            panic!("the digest thread is broken")
        });
        let mut hashing =
            Hashing { compressed: Vec::new(), tar: Vec::new(), queue: Some(queue), spare, thread };
        hashing.tar(&[1; 2 * HASH_PIECE]);
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hashing.finish()));
        assert!(finished.is_err(), "{finished:?}");
    }
}
