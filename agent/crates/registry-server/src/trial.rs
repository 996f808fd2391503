//! Faults on answers, and the count of what was sent: one wrapper around every body.
//!
//! Faults act on the bytes of a body, wherever they come from; a fault is counted when it first changes something that the
//! client sees.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::Response;
use hyper::body::{Body as _, Frame, SizeHint};
use hyper::header::CONTENT_LENGTH;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{Faults, Shared};

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The faults that one request may meet.
#[derive(Debug)]
pub(crate) struct Trial {
    shared: Arc<Shared>,
    faults: Option<Faults>,
    counted: bool,
}

impl Trial {
    pub(crate) fn of(shared: &Arc<Shared>, path: &str) -> Self {
        Self { shared: Arc::clone(shared), faults: shared.faults_for(path), counted: false }
    }

    /// Whether a fault takes effect on this request: it is asked for, and its `times` are not used up.
    pub(crate) fn hits(&mut self, applies: impl FnOnce(&Faults) -> bool) -> Option<&Faults> {
        if !self.faults.as_ref().is_some_and(applies) {
            return None;
        }
        if !self.counted {
            self.counted = self.shared.count_fault();
            if !self.counted {
                self.faults = None;
            }
        }
        self.faults.as_ref()
    }

    /// Counts an answer's body while it is sent, and damages it as asked for.
    pub(crate) fn send(
        mut self,
        response: Response<Body>,
        blob: bool,
        connection: &Arc<Flushes>,
    ) -> Response<Body> {
        let len = body_len(&response);
        // An answer to HEAD states a length but has no body.
        let has_body = response.status().is_success() && !response.body().is_end_stream();
        let mut damage = Damage::default();
        if has_body && self.hits(|faults| faults.flip && len > 0).is_some() {
            damage.flip_at = Some(len / 2);
        }
        let cut = |faults: &Faults| faults.truncate_at.unwrap_or(if faults.stall { len / 2 } else { len });
        if has_body && let Some(faults) = self.hits(|faults| cut(faults) < len) {
            damage.end_at = Some(cut(faults));
            damage.stall = faults.stall;
        }
        if has_body && blob && self.hits(|faults| faults.wrong_length).is_some() {
            // The body ends where the bytes do, one before what was stated.
            damage.end_at.get_or_insert(len.saturating_sub(1));
        }
        let pace = if has_body { self.hits(|faults| faults.bytes_per_second.is_some()) } else { None };
        damage.bytes_per_second = pace.and_then(|faults| faults.bytes_per_second);
        response.map(|inner| {
            let connection = Arc::clone(connection);
            let shared = self.shared;
            let (waiting, late) = (None, BytesMut::new());
            let sent =
                Sent { inner, shared, blob, sent: 0, damage, connection, ending: false, waiting, late };
            BodyExt::boxed_unsync(sent)
        })
    }
}

fn body_len(response: &Response<Body>) -> u64 {
    let stated = response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    stated.or(response.body().size_hint().exact()).unwrap_or(0)
}

#[derive(Debug, Default)]
struct Damage {
    flip_at: Option<u64>,
    end_at: Option<u64>,
    /// At `end_at` nothing happens any more, instead of the connection's end.
    stall: bool,
    bytes_per_second: Option<u32>,
}

/// How often a slow body sends a piece.
const SLOW_PIECE: Duration = Duration::from_millis(100);

/// A body on its way.
struct Sent {
    inner: Body,
    shared: Arc<Shared>,
    blob: bool,
    sent: u64,
    damage: Damage,
    connection: Arc<Flushes>,
    ending: bool,
    /// Until the next piece of a slow body may go.
    waiting: Option<Pin<Box<tokio::time::Sleep>>>,
    /// What of the last piece a slow body has not sent yet.
    late: BytesMut,
}

impl Sent {
    /// What is left of a piece of the body after the damage.
    fn damaged(&self, mut data: Bytes) -> Bytes {
        if let Some(end) = self.damage.end_at {
            data.truncate(usize::try_from(end.saturating_sub(self.sent)).unwrap_or(usize::MAX));
        }
        let at = self.damage.flip_at.and_then(|at| at.checked_sub(self.sent));
        let Some(at) = at.and_then(|at| usize::try_from(at).ok()).filter(|at| *at < data.len()) else {
            return data;
        };
        let mut changed = BytesMut::from(data);
        if let Some(byte) = changed.get_mut(at) {
            *byte ^= 0x10;
        }
        changed.freeze()
    }

    /// The end that was asked for: not before what was sent until here left the process.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.damage.stall {
            return Poll::Pending;
        }
        if !self.ending {
            self.ending = true;
            self.connection.wait(context.waker().clone());
            return Poll::Pending;
        }
        if self.connection.waits() {
            return Poll::Pending;
        }
        let cut = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "cut off as asked for");
        Poll::Ready(Some(Err(cut)))
    }
}

impl hyper::body::Body for Sent {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.damage.end_at.is_some_and(|end| self.sent >= end) {
            return self.poll_end(context);
        }
        if let Some(waiting) = &mut self.waiting {
            std::task::ready!(waiting.as_mut().poll(context));
            self.waiting = None;
        }
        let mut data = self.late.split().freeze();
        if data.is_empty() {
            let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(context));
            let Some(Ok(frame)) = frame else { return Poll::Ready(frame) };
            let Ok(next) = frame.into_data() else { return Poll::Ready(None) };
            data = next;
        }
        if let Some(rate) = self.damage.bytes_per_second {
            let most = (rate as usize / 10).max(1);
            self.late.extend_from_slice(data.get(most..).unwrap_or(&[]));
            data.truncate(most);
            self.waiting = Some(Box::pin(tokio::time::sleep(SLOW_PIECE)));
        }
        let data = self.damaged(data);
        self.sent += data.len() as u64;
        self.shared.counters.sent(data.len() as u64, self.blob);
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.damage.end_at.is_none() && self.late.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Who waits until a connection has handed on all that was written to it.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    waiter: Mutex<Option<Waker>>,
}

impl Flushes {
    fn wait(&self, waker: Waker) {
        *self.waiter.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker);
    }

    fn waits(&self) -> bool {
        self.waiter.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn flushed(&self) {
        if let Some(waiter) = self.waiter.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waiter.wake();
        }
    }
}

/// A connection that tells when it is flushed.
#[derive(Debug)]
pub(crate) struct Flushed<T> {
    pub(crate) inner: T,
    pub(crate) flushes: Arc<Flushes>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Flushed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Flushed<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let done = std::task::ready!(Pin::new(&mut self.inner).poll_flush(context));
        self.flushes.flushed();
        Poll::Ready(done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
