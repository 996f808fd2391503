//! The two SHA-256 digests of a layer, on a thread of their own, beside decoding, parsing and chunk digests.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::IndexError;

/// Bytes handed to the digest thread at a time.
const HASH_PIECE: usize = 256 * 1024;

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
        let (queue, pieces) = sync_channel::<(bool, Vec<u8>)>(8);
        let (give_back, spare) = sync_channel(8);
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
        self.compressed.extend_from_slice(bytes);
        if self.compressed.len() >= HASH_PIECE {
            let spare = self.spare();
            let piece = std::mem::replace(&mut self.compressed, spare);
            self.send(false, piece);
        }
    }

    pub(super) fn tar(&mut self, bytes: &[u8]) {
        self.tar.extend_from_slice(bytes);
        if self.tar.len() >= HASH_PIECE {
            let spare = self.spare();
            let piece = std::mem::replace(&mut self.tar, spare);
            self.send(true, piece);
        }
    }

    fn spare(&self) -> Vec<u8> {
        self.spare.try_recv().unwrap_or_default()
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
