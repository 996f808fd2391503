//! The distribution protocol.

use std::convert::Infallible;
use std::io::SeekFrom;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LINK, LOCATION, RANGE,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::layout::MAX_MANIFEST;
use crate::trial::{Body, Flushes, Trial};
use crate::{Faults, Shared, upload};

/// What an address that expires carries: until when it is good, in milliseconds since 1970.
const EXPIRES: &str = "expires";
/// Bytes read from a file at once.
const PIECE: usize = 64 * 1024;

/// Answers one request.
pub(crate) async fn handle(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    connection: &Arc<Flushes>,
) -> Response<Body> {
    shared.counters.request();
    let path = request.uri().path().to_owned();
    if let Some(rest) = path.strip_prefix("/_sluice/") {
        return control(rest, request, &shared).await;
    }
    let mut trial = Trial::of(&shared, &path);
    let blob = request.method() == Method::GET && path.contains("/blobs/");
    let response = match trial.hits(|faults| faults.status.is_some()) {
        Some(faults) => refusal(faults),
        None => route(&path, request, &shared, &mut trial).await,
    };
    trial.send(response, blob, connection)
}

/// The status that was asked for.
fn refusal(faults: &Faults) -> Response<Body> {
    let status = faults.status.and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = error(status, "FAULT", "a fault that was asked for");
    if let Some(seconds) = faults.retry_after {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(challenge) = &faults.challenge {
        set(&mut response, WWW_AUTHENTICATE.as_str(), challenge);
    }
    response
}

/// Splits `NAME/KIND/REST`, where NAME may hold slashes, at the last kind.
fn split<'a>(path: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    let at = path.rfind(kind)?;
    Some((path.get(..at)?, path.get(at + kind.len()..)?))
}

/// The repository that a path speaks of.
fn repository_of(path: &str) -> Option<&str> {
    let path = path.strip_prefix("/v2/")?;
    let kinds = ["/blobs/", "/manifests/", "/tags/", "/referrers/"];
    kinds.iter().find_map(|kind| split(path, kind)).map(|(repository, _)| repository)
}

async fn route(
    path: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    trial: &mut Trial,
) -> Response<Body> {
    if let Some(refused) = shared.gate.refuses(&request, repository_of(path)) {
        return refused;
    }
    let Some(path) = path.strip_prefix("/v2/").or((path == "/v2").then_some("")) else {
        return error(StatusCode::NOT_FOUND, "UNSUPPORTED", "this is a registry; its API is under /v2/");
    };
    if path.is_empty() {
        return json_answer(StatusCode::OK, "application/json", &json!({}));
    }
    if let Some((repository, rest)) = split(path, "/blobs/uploads") {
        return upload::upload(repository, rest.trim_matches('/'), request, shared).await;
    }
    if let Some((repository, digest)) = split(path, "/blobs/") {
        return match *request.method() {
            Method::GET | Method::HEAD => blob(repository, digest, &request, shared, trial).await,
            _ => error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "blobs are read or uploaded"),
        };
    }
    if let Some((repository, name)) = split(path, "/manifests/") {
        return match *request.method() {
            Method::GET | Method::HEAD => manifest(repository, name, &request, shared).await,
            Method::PUT => put_manifest(repository.to_owned(), name.to_owned(), request, shared).await,
            Method::DELETE => match shared.layouts.delete_manifest(repository, name) {
                Ok(true) => empty(StatusCode::ACCEPTED),
                Ok(false) => error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest"),
                Err(failure) => internal(&failure),
            },
            _ => error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "not for manifests"),
        };
    }
    let query = request.uri().query().unwrap_or("");
    if let Some((repository, "list")) = split(path, "/tags/") {
        return tags(repository, query, shared);
    }
    if let Some((repository, digest)) = split(path, "/referrers/").filter(|_| shared.referrers_api) {
        return referrers(repository, digest, query, shared);
    }
    error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such path")
}

/// Tags in order, in pages if asked for.
fn tags(repository: &str, query: &str, shared: &Arc<Shared>) -> Response<Body> {
    if !shared.layouts.has_repository(repository) {
        return error(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such repository");
    }
    let mut tags = match shared.layouts.tags(repository) {
        Ok(tags) => tags,
        Err(failure) => return internal(&failure),
    };
    if let Some(last) = parameter(query, "last") {
        tags.retain(|tag| *tag > last);
    }
    let mut next = None;
    if let Some(text) = parameter(query, "n") {
        let Ok(count) = text.parse::<usize>() else {
            return error(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", "n is no number");
        };
        let more = tags.len() > count;
        tags.truncate(count);
        next = tags.last().filter(|_| more).map(|last| {
            let last: String = url::form_urlencoded::byte_serialize(last.as_bytes()).collect();
            format!("</v2/{repository}/tags/list?n={count}&last={last}>; rel=\"next\"")
        });
    }
    let list = json!({ "name": repository, "tags": tags });
    let mut response = json_answer(StatusCode::OK, "application/json", &list);
    if let Some(next) = next {
        set(&mut response, LINK.as_str(), &next);
    }
    response
}

fn referrers(repository: &str, digest: &str, query: &str, shared: &Arc<Shared>) -> Response<Body> {
    let wanted = parameter(query, "artifactType");
    let manifests = match shared.layouts.referrers(repository, digest, wanted.as_deref()) {
        Ok(manifests) => manifests,
        Err(failure) => return internal(&failure),
    };
    let list = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    });
    let mut response = json_answer(StatusCode::OK, "application/vnd.oci.image.index.v1+json", &list);
    if wanted.is_some() {
        response.headers_mut().insert("oci-filters-applied", HeaderValue::from_static("artifactType"));
    }
    response
}

pub(crate) fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

async fn manifest(
    repository: &str,
    name: &str,
    request: &Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let unknown = || error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest");
    let (digest, media_type) = match shared.layouts.manifest(repository, name) {
        Ok(Some(found)) => found,
        Ok(None) => return unknown(),
        Err(failure) => return internal(&failure),
    };
    let Some(path) = shared.layouts.blob(repository, &digest) else { return unknown() };
    let bytes = match tokio::fs::read(&path).await {
        Ok(bytes) => bytes,
        Err(failure) if failure.kind() == std::io::ErrorKind::NotFound => return unknown(),
        Err(failure) => return internal(&failure),
    };
    let len = bytes.len();
    let head = request.method() == Method::HEAD;
    let mut response = with_body(StatusCode::OK, if head { Bytes::new() } else { bytes.into() });
    set(&mut response, CONTENT_TYPE.as_str(), &media_type);
    set(&mut response, "docker-content-digest", &digest);
    set(&mut response, CONTENT_LENGTH.as_str(), &len.to_string());
    response
}

async fn blob(
    repository: &str,
    digest: &str,
    request: &Request<Incoming>,
    shared: &Arc<Shared>,
    trial: &mut Trial,
) -> Response<Body> {
    let unknown = || error(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob");
    if let Some(target) =
        trial.hits(|faults| faults.redirect.is_some()).and_then(|faults| faults.redirect.clone())
    {
        let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
        set(&mut response, LOCATION.as_str(), &target);
        return response;
    }
    match parameter(request.uri().query().unwrap_or(""), EXPIRES).map(|text| text.parse::<u128>()) {
        Some(Ok(until)) if until >= now_ms() => {}
        Some(_) => return error(StatusCode::FORBIDDEN, "DENIED", "this address has expired"),
        None => {
            let lasts = trial.hits(|faults| faults.expires_ms.is_some()).and_then(|faults| faults.expires_ms);
            if let Some(ms) = lasts {
                let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
                let location = format!("{}?{EXPIRES}={}", request.uri().path(), now_ms() + u128::from(ms));
                set(&mut response, LOCATION.as_str(), &location);
                return response;
            }
        }
    }
    let Some(path) = shared.layouts.blob(repository, digest) else { return unknown() };
    let size = match tokio::fs::metadata(&path).await {
        Ok(meta) => meta.len(),
        Err(failure) if failure.kind() == std::io::ErrorKind::NotFound => return unknown(),
        Err(failure) => return internal(&failure),
    };
    let head = request.method() == Method::HEAD;
    let header = request.headers().get(RANGE).and_then(|value| value.to_str().ok());
    let wanted = header.map(|header| parse_range(header, size)).filter(|_| !head);
    let wanted = wanted.filter(|_| trial.hits(|faults| faults.ignore_ranges).is_none());
    let (start, end, partial) = match wanted {
        None | Some(Range::Ignored) => (0, size, false),
        Some(Range::Wanted(start, end)) => (start, end, true),
        Some(Range::Unsatisfiable) => {
            let mut response =
                error(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the blob is shorter");
            set(&mut response, CONTENT_RANGE.as_str(), &format!("bytes */{size}"));
            return response;
        }
    };
    let mut response = if head {
        empty(StatusCode::OK)
    } else {
        match file_body(&path, start, end).await {
            Ok(body) => Response::new(body),
            Err(failure) => return internal(&failure),
        }
    };
    *response.status_mut() = if partial { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    set(&mut response, CONTENT_TYPE.as_str(), "application/octet-stream");
    set(&mut response, ACCEPT_RANGES.as_str(), "bytes");
    set(&mut response, "docker-content-digest", digest);
    let more = u64::from(!head && trial.hits(|faults| faults.wrong_length).is_some());
    set(&mut response, CONTENT_LENGTH.as_str(), &(end - start + more).to_string());
    if partial {
        set(&mut response, CONTENT_RANGE.as_str(), &format!("bytes {start}-{}/{size}", end - 1 + more));
    }
    response
}

fn now_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

enum Range {
    Wanted(u64, u64),
    Ignored,
    Unsatisfiable,
}

/// RFC 9110 §14: one range; several are answered with the whole, as is what is not understood.
fn parse_range(header: &str, size: u64) -> Range {
    let Some((first, last)) = header.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return Range::Ignored;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(start), _) if start >= size => Range::Unsatisfiable,
        (Ok(start), Ok(end)) if end >= start => Range::Wanted(start, end.saturating_add(1).min(size)),
        (Ok(start), Err(_)) if last.is_empty() => Range::Wanted(start, size),
        (Err(_), Ok(count)) if first.is_empty() && count > 0 && size > 0 => {
            Range::Wanted(size.saturating_sub(count), size)
        }
        _ => Range::Ignored,
    }
}

/// Streams a part of a file.
async fn file_body(path: &Path, start: u64, end: u64) -> std::io::Result<Body> {
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(SeekFrom::Start(start)).await?;
    let stream = futures::stream::unfold((file, end - start), |(mut file, left)| async move {
        if left == 0 {
            return None;
        }
        let mut buffer = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
        if let Err(failure) = file.read_exact(&mut buffer).await {
            return Some((Err(failure), (file, 0)));
        }
        let left = left - buffer.len() as u64;
        Some((Ok(Frame::data(Bytes::from(buffer))), (file, left)))
    });
    Ok(BodyExt::boxed_unsync(StreamBody::new(stream)))
}

async fn put_manifest(
    repository: String,
    name: String,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let media_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned();
    if !name.contains(':') && !is_tag(&name) {
        return error(StatusCode::BAD_REQUEST, "TAG_INVALID", "not a tag");
    }
    let limited = http_body_util::Limited::new(request.into_body(), MAX_MANIFEST);
    let bytes = match limited.collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(failure) if failure.is::<http_body_util::LengthLimitError>() => {
            return error(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", "a manifest has at most 4 MiB");
        }
        Err(failure) => return error(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", &failure.to_string()),
    };
    let digest = format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, &bytes)));
    if name.contains(':') && name != digest {
        return error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the manifest has another digest");
    }
    let (layouts, stated) = (Arc::clone(shared), digest.clone());
    let stored = tokio::task::spawn_blocking(move || {
        let subject = layouts.layouts.put_manifest(&repository, &name, &media_type, &bytes, &stated)?;
        Ok((subject, repository))
    });
    match stored.await.map_err(std::io::Error::other).flatten() {
        Ok((subject, repository)) => {
            let mut response = empty(StatusCode::CREATED);
            set(&mut response, LOCATION.as_str(), &format!("/v2/{repository}/manifests/{digest}"));
            set(&mut response, "docker-content-digest", &digest);
            if let Some(subject) = subject.filter(|_| shared.referrers_api) {
                set(&mut response, "oci-subject", &subject);
            }
            response
        }
        Err(failure) => internal(&failure),
    }
}

/// The distribution specification's tags.
fn is_tag(name: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    name.bytes().next().is_some_and(word)
        && name.len() <= 128
        && name.bytes().all(|byte| word(byte) || b".-".contains(&byte))
}

/// `/_sluice/`: counters and faults.
async fn control(path: &str, request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    match (request.method(), path) {
        (&Method::GET, "stats") => {
            json_answer(StatusCode::OK, "application/json", &json!(shared.counters.read()))
        }
        (&Method::GET, "token") => shared.gate.token(&request),
        (&Method::POST, "reset") => {
            shared.counters.reset();
            empty(StatusCode::NO_CONTENT)
        }
        (&Method::POST, "faults") => {
            let limited = http_body_util::Limited::new(request.into_body(), 64 * 1024);
            let bytes = match limited.collect().await {
                Ok(collected) => collected.to_bytes(),
                Err(failure) => return error(StatusCode::BAD_REQUEST, "FAULT", &failure.to_string()),
            };
            match serde_json::from_slice(&bytes) {
                Ok(faults) => {
                    *shared.faults.write().unwrap_or_else(PoisonError::into_inner) = faults;
                    empty(StatusCode::NO_CONTENT)
                }
                Err(failure) => error(StatusCode::BAD_REQUEST, "FAULT", &failure.to_string()),
            }
        }
        _ => error(StatusCode::NOT_FOUND, "UNSUPPORTED", "stats, reset or faults"),
    }
}

fn with_body(status: StatusCode, bytes: Bytes) -> Response<Body> {
    let full = http_body_util::Full::new(bytes).map_err(|never: Infallible| match never {});
    let mut response = Response::new(BodyExt::boxed_unsync(full));
    *response.status_mut() = status;
    response
}

pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    with_body(status, Bytes::new())
}

pub(crate) fn json_answer(status: StatusCode, media_type: &str, value: &serde_json::Value) -> Response<Body> {
    let mut response = with_body(status, value.to_string().into());
    set(&mut response, CONTENT_TYPE.as_str(), media_type);
    response
}

pub(crate) fn error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    json_answer(status, "application/json", &json!({ "errors": [{ "code": code, "message": message }] }))
}

pub(crate) fn internal(failure: &std::io::Error) -> Response<Body> {
    match failure.kind() {
        std::io::ErrorKind::NotFound => error(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload"),
        std::io::ErrorKind::InvalidInput if failure.get_ref().is_some() => {
            error(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", &failure.to_string())
        }
        std::io::ErrorKind::InvalidInput => {
            error(StatusCode::BAD_REQUEST, "NAME_INVALID", "not a repository or digest")
        }
        _ => error(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &failure.to_string()),
    }
}

pub(crate) fn set(response: &mut Response<Body>, name: &str, value: &str) {
    let name = hyper::header::HeaderName::from_bytes(name.as_bytes());
    if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
        response.headers_mut().insert(name, value);
    }
}
