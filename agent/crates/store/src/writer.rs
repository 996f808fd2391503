//! Write-behind: a thread with a ring writes verified chunks to their layers' files, while whoever brought them goes on.
//!
//! A chunk is in [`Memory`] while it is queued, so its reader has it at once. The queue is bounded; when it is full whoever has a chunk
//! writes it by itself, which is what holds background work back. Where a kernel has no rings that is the way of all chunks.
//! A write that fails leaves its chunk in memory, as when it fails in its caller's hands.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::memory::Memory;

/// Bytes that may be queued, over all layers.
const QUEUE_BYTES: u64 = 8 << 20;
/// Entries of the ring: what the queue holds in chunks of the usual size, and some.
const ENTRIES: u32 = 64;

/// A chunk to be written. Its bytes are in `memory`, too.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) file: Arc<File>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) start: u64,
    pub(crate) bytes: Bytes,
}

/// Where chunks are queued. See the module text.
#[derive(Debug)]
pub(crate) struct Queue {
    /// None where there is no ring, and at the end.
    jobs: Mutex<Option<UnboundedSender<Job>>>,
    bytes: AtomicU64,
    settling: Mutex<()>,
    settled: Condvar,
}

impl Queue {
    /// One to which nothing can be added.
    pub(crate) fn closed() -> Self {
        Self {
            jobs: Mutex::new(None),
            bytes: AtomicU64::new(0),
            settling: Mutex::default(),
            settled: Condvar::new(),
        }
    }

    /// Queues a chunk if there is room; `hold` has it held in memory, or says that it need not be queued.
    pub(crate) fn add(&self, job: Job, hold: impl FnOnce(&Job) -> bool) -> bool {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(jobs) = jobs.as_ref() else { return false };
        let len = job.bytes.len() as u64;
        let fits = |queued: u64| queued.checked_add(len).filter(|sum| *sum <= QUEUE_BYTES);
        if self.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_err() {
            return false;
        }
        if !hold(&job) {
            self.gone(len);
            return false;
        }
        if let Err(refused) = jobs.send(job) {
            // The thread is gone, for whatever reason.
            let Job { file, memory, start, bytes } = refused.0;
            memory.tried(start, file.write_all_at(&bytes, start));
            self.gone(len);
        }
        true
    }

    /// Bytes queued.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Waits until nothing is queued.
    pub(crate) fn settle(&self) {
        let settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.settled.wait_while(settling, |()| self.bytes() > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn gone(&self, len: u64) {
        self.bytes.fetch_sub(len, Ordering::AcqRel);
        // Taken so that nobody is between looking and waiting.
        drop(self.settling.lock().unwrap_or_else(PoisonError::into_inner));
        self.settled.notify_all();
    }

    fn tried(&self, job: &Job, written: io::Result<()>) {
        if let Err(error) = written.as_ref()
            && !crate::space::is_full(error)
        {
            tracing::warn!(offset = job.start, size = job.bytes.len(), %error, "cannot write to the layer store; keeping bytes in memory");
        }
        job.memory.tried(job.start, written);
        self.gone(job.bytes.len() as u64);
    }
}

/// The thread. Dropped, it ends once all is written.
#[derive(Debug)]
pub(crate) struct Writer {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts it for a queue, if the kernel lets us have a ring.
    pub(crate) fn start(queue: Arc<Queue>) -> Self {
        let (jobs, received) = unbounded_channel();
        let (started, ready) = std::sync::mpsc::channel();
        let own = Arc::clone(&queue);
        let run = move || run(&own, received, &started);
        let thread = std::thread::Builder::new().name("store-writer".to_owned()).spawn(run);
        let ready = match &thread {
            Ok(_) => ready.recv().unwrap_or_else(|_ended| Err(io::ErrorKind::BrokenPipe.into())),
            Err(error) => Err(error.kind().into()),
        };
        match ready {
            Ok(()) => *queue.jobs.lock().unwrap_or_else(PoisonError::into_inner) = Some(jobs),
            Err(error) => {
                tracing::info!(%error, "no ring for the layer store: whoever brings bytes writes them");
            }
        }
        // Why there is none was said.
        Self { queue, thread: thread.ok() }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the layer store's writer ended by a panic");
        }
    }
}

fn run(
    queue: &Arc<Queue>,
    mut jobs: UnboundedReceiver<Job>,
    started: &std::sync::mpsc::Sender<io::Result<()>>,
) {
    let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES));
    let (runtime, ready) = match runtime {
        Ok(runtime) => (Some(runtime), Ok(())),
        Err(error) => (None, Err(error)),
    };
    if started.send(ready).is_err() {
        return;
    }
    let Some(runtime) = runtime else { return };
    runtime.block_on(async {
        let mut under_way = Vec::new();
        while let Some(job) = jobs.recv().await {
            under_way.retain(|one: &tokio::task::JoinHandle<()>| !one.is_finished());
            let queue = Arc::clone(queue);
            under_way.push(tokio_uring::spawn(async move {
                let written = write(&job).await;
                queue.tried(&job, written);
            }));
        }
        for one in under_way {
            if let Err(error) = one.await {
                tracing::error!(%error, "a write of the layer store ended by a panic");
            }
        }
    });
}

/// Writes a chunk by the ring; by this thread if the ring cannot (a kernel before 5.6, say).
async fn write(job: &Job) -> io::Result<()> {
    // The same open file, which is the one that is flushed.
    let file = tokio_uring::fs::File::from_std(job.file.try_clone()?);
    let (written, _bytes) = file.write_all_at(job.bytes.clone(), job.start).await;
    match written {
        Err(error) if error.kind() != io::ErrorKind::StorageFull => {
            tracing::debug!(offset = job.start, %error, "a write by the ring failed; it is tried once more");
            job.file.write_all_at(&job.bytes, job.start)
        }
        written => written,
    }
}
