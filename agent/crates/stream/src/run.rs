//! One run: consecutive spans fetched by one GET and decoded as they arrive. A transfer that breaks goes on where it broke.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use sluice_image::decode::Decoder;
use sluice_image::records::{DigestAlgorithm, SpanRecord};
use sluice_store::Layer;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::claims::{RunState, Ticket};
use crate::cutter::Cutter;
use crate::{BlobSource, Lane, Scheduler, SourceError, StreamError};

/// Bytes of a body that may wait for the decoder; then the transfer waits.
const WAITING_BYTES: u32 = 512 * 1024;
/// A source that sends nothing for so long is taken to have failed.
const STALL: Duration = Duration::from_secs(30);
/// Bytes left of a body that are read although nobody wants them.
const WORTH_READING: u64 = 16 * 1024;
const RESUME_PAUSE: Duration = Duration::from_millis(100);

/// What is to be fetched.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) span: SpanRecord,
    /// On its way, as the body is: neither waits for the other.
    pub(crate) window: JoinHandle<Result<Vec<u8>, SourceError>>,
    pub(crate) compressed: Range<u64>,
    /// Where each span of the run begins in the tar, and where the run ends.
    pub(crate) tar: Vec<u64>,
    pub(crate) first_span: usize,
    pub(crate) algorithm: DigestAlgorithm,
    pub(crate) lane: Lane,
    /// What came was wrong: it is asked for elsewhere.
    pub(crate) elsewhere: bool,
    /// How long a broken transfer is tried to go on before the run fails.
    pub(crate) patience: Duration,
}

/// Who is told how a run goes.
pub(crate) trait Progress: Sync {
    /// So many bytes came.
    fn came(&self, bytes: u64);
    /// The transfer broke, and is taken up again.
    fn broke(&self, error: &SourceError);
}

/// A piece of the body; its permit bounds how much waits.
type Piece = (Bytes, Option<OwnedSemaphorePermit>);

/// Fetches and stores a run; every stored chunk wakes who waits.
pub(crate) async fn fetch(
    run: Run,
    layer: Arc<Layer>,
    source: &dyn BlobSource,
    scheduler: &Scheduler,
    (state, ticket): (&RunState, Ticket),
    told: &dyn Progress,
) -> Result<(), StreamError> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (digest, compressed) = (layer.digest().to_owned(), run.compressed.clone());
    let mut transfer = Transfer::new(&run, source, told);
    let mut pausing = scheduler.pausing(run.lane);
    // Gone when this future is dropped: the decoder does not wait for space then.
    let alive = Arc::new(());
    let wanted = Arc::downgrade(&alive);
    let runtime = Handle::current();
    let decoding = tokio::task::spawn_blocking(move || {
        let mut run = run;
        let window = runtime.block_on(&mut run.window);
        let window =
            window.unwrap_or_else(|error| Err(SourceError { message: error.to_string(), transient: false }));
        let window = window.map_err(|source| StreamError::Fetch {
            layer: layer.digest().to_owned(),
            start: run.compressed.start,
            end: run.compressed.end,
            source,
        })?;
        decode(&run, &window, &layer, receiver, &ticket, &wanted)
    });
    let room = Arc::new(Semaphore::new(WAITING_BYTES as usize));
    let failed = loop {
        if !state.urgent() {
            pausing.while_others_are_blocked(state).await;
        }
        match transfer.next().await {
            None => break None,
            Some(Err(error)) => break Some(error),
            Some(Ok(piece)) => {
                told.came(piece.len() as u64);
                let len = u32::try_from(piece.len()).unwrap_or(WAITING_BYTES).min(WAITING_BYTES);
                // The semaphore is never closed.
                let permit = tokio::select! {
                    permit = Arc::clone(&room).acquire_many_owned(len) => permit.ok(),
                    () = sender.closed() => break None,
                };
                if sender.send((piece, permit)).is_err() {
                    break None; // The decoder has all it needs, or failed: it says so below.
                }
            }
        }
    };
    drop(sender);
    transfer.read_the_rest().await;
    let decoded = decoding
        .await
        .map_err(|error| StreamError::Store { layer: digest.clone(), message: error.to_string() })?;
    drop(alive);
    match (decoded, failed) {
        (Ok(()), _) => Ok(()),
        // A body that broke off explains a decoder that had too little.
        (Err(_), Some(source)) => {
            Err(StreamError::Fetch { layer: digest, start: compressed.start, end: compressed.end, source })
        }
        (Err(error), None) => Err(error),
    }
}

/// A body that goes on after transient failures.
struct Transfer<'a> {
    source: &'a dyn BlobSource,
    told: &'a dyn Progress,
    left: Range<u64>,
    lane: Lane,
    elsewhere: bool,
    patience: Duration,
    body: Option<BoxStream<'static, Result<Bytes, SourceError>>>,
    last_byte: Instant,
}

impl<'a> Transfer<'a> {
    fn new(run: &Run, source: &'a dyn BlobSource, told: &'a dyn Progress) -> Self {
        Self {
            source,
            told,
            left: run.compressed.clone(),
            lane: run.lane,
            elsewhere: run.elsewhere,
            patience: run.patience,
            body: None,
            last_byte: Instant::now(),
        }
    }

    /// A body that is read to its end leaves its connection to the next request.
    async fn read_the_rest(&mut self) {
        if self.left.end - self.left.start > WORTH_READING {
            return;
        }
        if let Some(body) = &mut self.body {
            while let Ok(Some(Ok(_))) = tokio::time::timeout(RESUME_PAUSE, body.next()).await {}
        }
    }

    async fn next(&mut self) -> Option<Result<Bytes, SourceError>> {
        while !self.left.is_empty() {
            let (range, lane) = (self.left.clone(), self.lane);
            let body = self.body.get_or_insert_with(|| {
                if self.elsewhere {
                    self.source.read_elsewhere(range, lane)
                } else {
                    self.source.read(range, lane)
                }
            });
            let error = match tokio::time::timeout(STALL, body.next()).await {
                Ok(Some(Ok(piece))) if piece.len() as u64 > self.left.end - self.left.start => {
                    let message = "more bytes came than were asked for".to_owned();
                    return Some(Err(SourceError { message, transient: false }));
                }
                Ok(Some(Ok(piece))) => {
                    self.left.start += piece.len() as u64;
                    self.last_byte = Instant::now();
                    return Some(Ok(piece));
                }
                Ok(Some(Err(error))) => error,
                Ok(None) => {
                    let message =
                        format!("the transfer ended {} bytes early", self.left.end - self.left.start);
                    SourceError { message, transient: true }
                }
                Err(_elapsed) => SourceError {
                    message: format!("nothing came for {} s", STALL.as_secs()),
                    transient: true,
                },
            };
            self.body = None;
            if !error.transient || self.last_byte.elapsed() >= self.patience {
                return Some(Err(error));
            }
            tracing::debug!(%error, at = self.left.start, "a transfer broke; it goes on from there");
            self.told.broke(&error);
            tokio::time::sleep(RESUME_PAUSE).await;
        }
        None
    }
}

fn decode(
    run: &Run,
    window: &[u8],
    layer: &Layer,
    mut pieces: mpsc::UnboundedReceiver<Piece>,
    ticket: &Ticket,
    wanted: &Weak<()>,
) -> Result<(), StreamError> {
    let mut passed =
        Passed { run, ticket, tar: run.tar.first().copied().unwrap_or(0), span: 0, ended: false };
    let given_up = || wanted.strong_count() == 0;
    let mut cutter = Cutter::new(layer, passed.tar, run.algorithm, ticket, &given_up)?;
    let mut decoder =
        Decoder::at_span(&run.span, window).map_err(|error| cutter.corrupt_here(error.to_string()))?;
    while passed.more() || !cutter.is_ended() {
        let Some((piece, _permit)) = pieces.blocking_recv() else {
            return Err(cutter.corrupt_here(format!("the blob ends at tar offset {}", passed.tar)));
        };
        let mut input: &[u8] = &piece;
        loop {
            let step = decoder.step(input).map_err(|error| cutter.corrupt_here(error.to_string()))?;
            input = input.get(step.consumed..).unwrap_or(&[]);
            let mut output = decoder.output();
            if step.consumed == 0 && output.is_empty() && !step.boundary {
                break;
            }
            while !output.is_empty() {
                // Behind the last span only the rest of a chunk is taken.
                let wanted = if passed.more() { passed.span_left() } else { u64::MAX };
                let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
                let (now, rest) = output.split_at_checked(wanted).unwrap_or((output, &[]));
                cutter.take(now)?;
                output = rest;
                passed.tar += now.len() as u64;
                if !passed.more() && cutter.is_ended() {
                    return cutter.finish();
                }
            }
        }
    }
    cutter.finish()
}

/// How far a run is.
struct Passed<'a> {
    run: &'a Run,
    ticket: &'a Ticket,
    tar: u64,
    /// Counted from the run's first.
    span: usize,
    ended: bool,
}

impl Passed<'_> {
    /// Tar bytes to the end of the present span.
    fn span_left(&self) -> u64 {
        self.run.tar.get(self.span + 1).map_or(0, |end| end.saturating_sub(self.tar))
    }

    /// Whether there are spans to do: goes on to the next when one is done, unless that was the last or somebody else took the
    /// next.
    fn more(&mut self) -> bool {
        while !self.ended && self.span_left() == 0 {
            self.span += 1;
            self.ended =
                self.span + 1 >= self.run.tar.len() || !self.ticket.advance(self.run.first_span + self.span);
        }
        !self.ended
    }
}
