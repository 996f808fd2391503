//! The distribution protocol.

use std::convert::Infallible;
use std::io::SeekFrom;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::{Faults, Shared};

type Body = UnsyncBoxBody<Bytes, std::io::Error>;
const PIECE: usize = 128 * 1024;
const MAX_MANIFEST: usize = 4 << 20;

/// Answers one request.
pub(crate) async fn handle(request: Request<Incoming>, shared: Arc<Shared>) -> Response<Body> {
    shared.counters.request();
    let path = request.uri().path().to_owned();
    if let Some(rest) = path.strip_prefix("/_sluice/") {
        return control(rest, request, &shared).await;
    }
    let Some(rest) = path.strip_prefix("/v2/").or((path == "/v2").then_some("")) else {
        return error(StatusCode::NOT_FOUND, "UNSUPPORTED", "this is a registry; its API is under /v2/");
    };
    if rest.is_empty() {
        return json_answer(StatusCode::OK, "application/json", &json!({}));
    }
    let faults = shared.faults_for(&path);
    if let Some(status) = faults.as_ref().and_then(|faults| StatusCode::from_u16(faults.status?).ok()) {
        let mut response = error(status, "FAULT", "a fault that was asked for");
        if let Some(seconds) = faults.as_ref().and_then(|faults| faults.retry_after) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        return response;
    }
    route(rest, request, &shared, faults).await
}

/// Splits `NAME/KIND/REST`, where NAME may hold slashes, at the last kind.
fn split<'a>(path: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    let at = path.rfind(kind)?;
    Some((path.get(..at)?, path.get(at + kind.len()..)?))
}

async fn route(
    path: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    faults: Option<Faults>,
) -> Response<Body> {
    if let Some((repository, rest)) = split(path, "/blobs/uploads") {
        return upload(repository, rest.trim_matches('/'), request, shared).await;
    }
    if let Some((repository, digest)) = split(path, "/blobs/") {
        return match *request.method() {
            Method::GET | Method::HEAD => blob(repository, digest, &request, shared, faults).await,
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
    if let Some((repository, "list")) = split(path, "/tags/") {
        let tags = shared.layouts.tags(repository);
        return json_answer(StatusCode::OK, "application/json", &json!({ "name": repository, "tags": tags }));
    }
    if let Some((repository, digest)) = split(path, "/referrers/").filter(|_| shared.referrers_api) {
        let query = request.uri().query().unwrap_or("");
        let wanted = url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "artifactType");
        let wanted = wanted.map(|(_, value)| value.into_owned());
        let manifests = shared.layouts.referrers(repository, digest, wanted.as_deref());
        let list = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
        });
        let mut response = json_answer(StatusCode::OK, "application/vnd.oci.image.index.v1+json", &list);
        if wanted.is_some() {
            response.headers_mut().insert("oci-filters-applied", HeaderValue::from_static("artifactType"));
        }
        return response;
    }
    error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such path")
}

async fn manifest(
    repository: &str,
    name: &str,
    request: &Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let found = shared.layouts.manifest(repository, name);
    let Some((digest, media_type)) = found else {
        return error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest");
    };
    let Some(path) = shared.layouts.blob(repository, &digest) else {
        return error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest");
    };
    match tokio::fs::read(&path).await {
        Ok(bytes) => {
            let len = bytes.len();
            let head = request.method() == Method::HEAD;
            shared.counters.sent(if head { 0 } else { len as u64 }, false);
            let mut response = with_body(StatusCode::OK, if head { Bytes::new() } else { bytes.into() });
            set(&mut response, CONTENT_TYPE.as_str(), &media_type);
            set(&mut response, "docker-content-digest", &digest);
            set(&mut response, CONTENT_LENGTH.as_str(), &len.to_string());
            response
        }
        Err(_) => error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest"),
    }
}

async fn blob(
    repository: &str,
    digest: &str,
    request: &Request<Incoming>,
    shared: &Arc<Shared>,
    faults: Option<Faults>,
) -> Response<Body> {
    let unknown = || error(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob");
    let Some(path) = shared.layouts.blob(repository, digest) else { return unknown() };
    let Ok(meta) = tokio::fs::metadata(&path).await else { return unknown() };
    let size = meta.len();
    let faults = faults.unwrap_or_default();
    let header =
        request.headers().get(RANGE).and_then(|value| value.to_str().ok()).filter(|_| !faults.ignore_ranges);
    let (start, end, partial) = match header.map(|header| parse_range(header, size)) {
        None | Some(Range::Ignored) => (0, size, false),
        Some(Range::Wanted(start, end)) => (start, end, true),
        Some(Range::Unsatisfiable) => {
            let mut response =
                error(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the blob is shorter");
            set(&mut response, CONTENT_RANGE.as_str(), &format!("bytes */{size}"));
            return response;
        }
    };
    let body = if request.method() == Method::HEAD {
        empty_body()
    } else {
        match file_body(&path, start, end, Arc::clone(shared), faults).await {
            Ok(body) => body,
            Err(failure) => return internal(&failure),
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = if partial { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    set(&mut response, CONTENT_TYPE.as_str(), "application/octet-stream");
    set(&mut response, ACCEPT_RANGES.as_str(), "bytes");
    set(&mut response, "docker-content-digest", digest);
    set(&mut response, CONTENT_LENGTH.as_str(), &(end - start).to_string());
    if partial {
        set(&mut response, CONTENT_RANGE.as_str(), &format!("bytes {start}-{}/{size}", end - 1));
    }
    response
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

/// Streams a part of a file, with the faults that were asked for.
async fn file_body(
    path: &Path,
    start: u64,
    end: u64,
    shared: Arc<Shared>,
    faults: Faults,
) -> std::io::Result<Body> {
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(SeekFrom::Start(start)).await?;
    let total = end - start;
    let stream = futures::stream::unfold((file, 0_u64), move |(mut file, sent)| {
        let (shared, faults) = (Arc::clone(&shared), faults.clone());
        async move {
            if sent == total {
                return None;
            }
            if faults.truncate_at.is_some_and(|limit| sent >= limit) {
                let cut = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "cut off as asked for");
                return Some((Err(cut), (file, total)));
            }
            if faults.stall && sent > 0 {
                futures::future::pending::<()>().await;
            }
            let mut buffer = vec![0; PIECE.min((total - sent) as usize)];
            if let Err(failure) = file.read_exact(&mut buffer).await {
                return Some((Err(failure), (file, total)));
            }
            let middle = (total / 2).checked_sub(sent).and_then(|at| buffer.get_mut(at as usize));
            if let Some(byte) = middle.filter(|_| faults.flip) {
                *byte ^= 0x10;
            }
            let len = buffer.len() as u64;
            shared.counters.sent(len, true);
            Some((Ok(Frame::data(Bytes::from(buffer))), (file, sent + len)))
        }
    });
    Ok(BodyExt::boxed_unsync(StreamBody::new(stream)))
}

async fn upload(
    repository: &str,
    session: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let query: Vec<(String, String)> =
        url::form_urlencoded::parse(request.uri().query().unwrap_or("").as_bytes()).into_owned().collect();
    let digest = query.iter().find(|(key, _)| key == "digest").map(|(_, value)| value.clone());
    let method = request.method().clone();
    let repository = repository.to_owned();
    match (method, digest) {
        // Without a digest a session begins; its name is a file under the root.
        (Method::POST, None) => {
            let begun = shared.layouts.temporary().and_then(|file| file.keep().map_err(|error| error.error));
            match begun {
                Ok((_, path)) => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    accepted(&repository, &name, 0)
                }
                Err(failure) => internal(&failure),
            }
        }
        (Method::POST, Some(digest)) => finish_upload(&repository, None, &digest, request, shared).await,
        (Method::PATCH, _) => match append(session, request, shared).await {
            Ok(size) => accepted(&repository, session, size),
            Err(failure) => internal(&failure),
        },
        (Method::PUT, Some(digest)) => {
            finish_upload(&repository, Some(session), &digest, request, shared).await
        }
        (Method::DELETE, _) => empty(StatusCode::NO_CONTENT),
        _ => error(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", "an upload ends with PUT and a digest"),
    }
}

fn accepted(repository: &str, session: &str, size: u64) -> Response<Body> {
    let mut response = empty(StatusCode::ACCEPTED);
    set(&mut response, LOCATION.as_str(), &format!("/v2/{repository}/blobs/uploads/{session}"));
    set(&mut response, "range", &format!("0-{}", size.saturating_sub(1)));
    response
}

/// Appends a request's body to an upload session; its size so far.
async fn append(session: &str, request: Request<Incoming>, shared: &Arc<Shared>) -> std::io::Result<u64> {
    let path = shared.layouts.session(session).ok_or(std::io::ErrorKind::NotFound)?;
    let mut file = tokio::fs::OpenOptions::new().append(true).open(&path).await?;
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(std::io::Error::other)?;
        if let Some(data) = frame.data_ref() {
            file.write_all(data).await?;
        }
    }
    file.flush().await?;
    Ok(file.metadata().await?.len())
}

async fn finish_upload(
    repository: &str,
    session: Option<&str>,
    digest: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let session = match session {
        Some(session) => session.to_owned(),
        None => match shared.layouts.temporary().and_then(|file| file.keep().map_err(|error| error.error)) {
            Ok((_, path)) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Err(failure) => return internal(&failure),
        },
    };
    if let Err(failure) = append(&session, request, shared).await {
        return internal(&failure);
    }
    let (shared, repository, digest) = (Arc::clone(shared), repository.to_owned(), digest.to_owned());
    let stored = tokio::task::spawn_blocking(move || {
        shared.layouts.take_session(&repository, &session, &digest).map(|fits| (fits, repository, digest))
    });
    match stored.await.map_err(std::io::Error::other).flatten() {
        Ok((true, repository, digest)) => {
            let mut response = empty(StatusCode::CREATED);
            set(&mut response, LOCATION.as_str(), &format!("/v2/{repository}/blobs/{digest}"));
            set(&mut response, "docker-content-digest", &digest);
            response
        }
        Ok((false, ..)) => error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the bytes have another digest"),
        Err(failure) => internal(&failure),
    }
}

async fn put_manifest(
    repository: String,
    name: String,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let media_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned();
    let limited = http_body_util::Limited::new(request.into_body(), MAX_MANIFEST);
    let Ok(bytes) = limited.collect().await.map(http_body_util::Collected::to_bytes) else {
        return error(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", "a manifest has at most 4 MiB");
    };
    let digest = format!("sha256:{}", hex::encode(ring::digest::digest(&ring::digest::SHA256, &bytes)));
    if name.contains(':') && name != digest {
        return error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the manifest has another digest");
    }
    match shared.layouts.put_manifest(&repository, &name, &media_type, &bytes, &digest) {
        Ok(subject) => {
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

/// `/_sluice/`: counters and faults.
async fn control(path: &str, request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    match (request.method(), path) {
        (&Method::GET, "stats") => {
            json_answer(StatusCode::OK, "application/json", &json!(shared.counters.read()))
        }
        (&Method::POST, "reset") => {
            shared.counters.reset();
            empty(StatusCode::NO_CONTENT)
        }
        (&Method::POST, "faults") => {
            let limited = http_body_util::Limited::new(request.into_body(), 64 * 1024);
            let bytes = limited.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
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

fn empty_body() -> Body {
    with_body(StatusCode::OK, Bytes::new()).into_body()
}

fn with_body(status: StatusCode, bytes: Bytes) -> Response<Body> {
    let full = http_body_util::Full::new(bytes).map_err(|never: Infallible| match never {});
    let mut response = Response::new(BodyExt::boxed_unsync(full));
    *response.status_mut() = status;
    response
}

fn empty(status: StatusCode) -> Response<Body> {
    with_body(status, Bytes::new())
}

fn json_answer(status: StatusCode, media_type: &str, value: &serde_json::Value) -> Response<Body> {
    let mut response = with_body(status, value.to_string().into());
    set(&mut response, CONTENT_TYPE.as_str(), media_type);
    response
}

fn error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    json_answer(status, "application/json", &json!({ "errors": [{ "code": code, "message": message }] }))
}

fn internal(failure: &std::io::Error) -> Response<Body> {
    match failure.kind() {
        std::io::ErrorKind::NotFound => error(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload"),
        std::io::ErrorKind::InvalidInput => {
            error(StatusCode::BAD_REQUEST, "NAME_INVALID", "not a repository or digest")
        }
        _ => error(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &failure.to_string()),
    }
}

fn set(response: &mut Response<Body>, name: &str, value: &str) {
    let name = hyper::header::HeaderName::from_bytes(name.as_bytes());
    if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
        response.headers_mut().insert(name, value);
    }
}
