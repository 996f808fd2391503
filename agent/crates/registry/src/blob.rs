//! Ranged reads of blobs: one single-range GET each, bounded whatever the server sends.

use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use crate::client::{Answer, Ask, Client, Needs, Target};
use crate::transport::transport_error;
use crate::{Reference, RegistryError};

/// A server that answers 200 to a range sends the whole blob: this many bytes in front of the range are read past.
const MAX_SKIPPED: u64 = 64 << 20;
/// Whole ranges are tables of contents, configurations, documents.
const MAX_WHOLE: u64 = 512 << 20;

/// A blob of a repository. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blob {
    client: Client,
    reference: Reference,
    digest: String,
    size: u64,
}

impl Client {
    /// A handle to a blob; asks nothing yet.
    pub fn blob(&self, reference: &Reference, digest: &str, size: u64) -> Blob {
        Blob { client: self.clone(), reference: reference.clone(), digest: digest.to_owned(), size }
    }
}

impl Blob {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes of a range, in order. An error ends the stream; dropping it ends the transfer.
    pub fn read(
        &self,
        range: Range<u64>,
        background: bool,
    ) -> BoxStream<'static, Result<Bytes, RegistryError>> {
        let this = self.clone();
        let opened = async move {
            match this.open(range, background).await {
                Ok(body) => body,
                Err(error) => futures::stream::iter([Err(error)]).boxed(),
            }
        };
        futures::stream::once(opened).flatten().boxed()
    }

    /// A range, whole: at most 512 MiB, for whoever says how long it is may lie.
    pub async fn read_all(&self, range: Range<u64>, background: bool) -> Result<Bytes, RegistryError> {
        check_len(&range, &format!("blob {}", self.digest))?;
        let mut out =
            Vec::with_capacity(usize::try_from(range.end.saturating_sub(range.start)).unwrap_or_default());
        let mut body = self.read(range, background);
        while let Some(piece) = body.next().await {
            out.extend_from_slice(&piece?);
        }
        Ok(out.into())
    }

    async fn open(
        self,
        range: Range<u64>,
        background: bool,
    ) -> Result<BoxStream<'static, Result<Bytes, RegistryError>>, RegistryError> {
        if range.is_empty() {
            return Ok(futures::stream::empty().boxed());
        }
        let whole = range == (0..self.size);
        let mut headers = HeaderMap::new();
        if !whole {
            let value = format!("bytes={}-{}", range.start, range.end - 1);
            let value =
                HeaderValue::from_str(&value).map_err(|error| RegistryError::Config(error.to_string()))?;
            headers.insert(RANGE, value);
        }
        let ask = Ask {
            method: Method::GET,
            reference: &self.reference,
            target: Target::Path(format!("blobs/{}", self.digest)),
            headers,
            body: None,
            needs: Needs::Pull,
            background,
        };
        let (answer, skip) =
            self.client.ask_checked(&ask, |answer| self.check(answer, &range, whole)).await?;
        Ok(body(self.client, answer, self.digest, skip, range.end - range.start))
    }

    /// Checks the answer to a range; how many bytes stand before it in the body.
    fn check(&self, answer: &Answer, range: &Range<u64>, whole: bool) -> Result<u64, RegistryError> {
        let wrong = |reason: String| RegistryError::Protocol {
            host: answer.host.clone(),
            what: format!("bytes {}-{} of blob {}", range.start, range.end - 1, self.digest),
            reason,
        };
        match answer.response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let header =
                    answer.response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let want = format!("bytes {}-{}/", range.start, range.end - 1);
                match header {
                    Some(header) if header.starts_with(&want) => Ok(0),
                    other => Err(wrong(format!("it sent the range `{}`", other.unwrap_or("none")))),
                }
            }
            StatusCode::OK if whole => Ok(0),
            StatusCode::OK if range.start <= MAX_SKIPPED => Ok(range.start),
            status => Err(wrong(format!("{status}: it ignores ranges"))),
        }
    }
}

/// Refuses ranges that nobody should hold in memory.
pub(crate) fn check_len(range: &Range<u64>, what: &str) -> Result<(), RegistryError> {
    let len = range.end.saturating_sub(range.start);
    if len > MAX_WHOLE {
        let text = format!("{len} bytes of {what} are more than the {MAX_WHOLE} that are read into memory");
        return Err(RegistryError::Config(text));
    }
    Ok(())
}

/// The `len` bytes behind the first `skip` of a body.
fn body(
    client: Client,
    answer: Answer,
    digest: String,
    skip: u64,
    len: u64,
) -> BoxStream<'static, Result<Bytes, RegistryError>> {
    let Answer { response, host, endpoint, slots } = answer;
    let broken = move |reason: Option<&reqwest::Error>, left: u64| {
        // The next read goes to another endpoint, if there is one.
        client.inner.health.failed(&endpoint.base);
        match reason {
            Some(error) => transport_error(&host, error),
            None => {
                let reason = format!("blob {digest} ended {left} bytes early");
                RegistryError::Unreachable { host: host.clone(), reason }
            }
        }
    };
    let state = Some((response, skip, len, slots, broken));
    futures::stream::unfold(state, |state| async move {
        let (mut response, mut skip, mut left, slots, broken) = state?;
        while left > 0 {
            let mut piece = match response.chunk().await {
                Ok(Some(piece)) => piece,
                Ok(None) => return Some((Err(broken(None, left)), None)),
                Err(error) => return Some((Err(broken(Some(&error), left)), None)),
            };
            let passed = skip.min(piece.len() as u64);
            drop(piece.split_to(passed as usize));
            skip -= passed;
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX).min(piece.len()));
            if !piece.is_empty() {
                left -= piece.len() as u64;
                return Some((Ok(piece), Some((response, skip, left, slots, broken))));
            }
        }
        None
    })
    .boxed()
}
