//! Uploads of blobs: in one request, or in a session of several.

use std::sync::Arc;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONTENT_RANGE, LOCATION};
use hyper::{Method, Request, Response, StatusCode};
use tokio::io::AsyncWriteExt;

use crate::Shared;
use crate::serve::{empty, error, internal, parameter, set};
use crate::trial::Body;

/// Answers a request for `/v2/REPOSITORY/blobs/uploads/SESSION`.
pub(crate) async fn upload(
    repository: &str,
    session: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let digest = parameter(request.uri().query().unwrap_or(""), "digest");
    match (request.method().clone(), digest) {
        // Without a digest a session begins.
        (Method::POST, None) => match shared.layouts.begin_session() {
            Ok(session) => progress(StatusCode::ACCEPTED, repository, &session, 0),
            Err(failure) => internal(&failure),
        },
        (Method::POST, Some(digest)) => {
            let session = match shared.layouts.begin_session() {
                Ok(session) => session,
                Err(failure) => return internal(&failure),
            };
            let response = finish(repository, &session, &digest, request, shared).await;
            // Nobody knows this session: what is left of it after a failure is nobody's.
            match shared.layouts.remove_session(&session) {
                Err(failure) if failure.kind() != std::io::ErrorKind::NotFound => internal(&failure),
                _ => response,
            }
        }
        (Method::PATCH, _) => patch(repository, session, request, shared).await,
        (Method::PUT, Some(digest)) => finish(repository, session, &digest, request, shared).await,
        (Method::GET, _) => match size(session, shared).await {
            Ok(size) => progress(StatusCode::NO_CONTENT, repository, session, size),
            Err(failure) => internal(&failure),
        },
        (Method::DELETE, _) => match shared.layouts.remove_session(session) {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(failure) => internal(&failure),
        },
        _ => error(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", "an upload ends with PUT and a digest"),
    }
}

fn progress(status: StatusCode, repository: &str, session: &str, size: u64) -> Response<Body> {
    let mut response = empty(status);
    set(&mut response, LOCATION.as_str(), &format!("/v2/{repository}/blobs/uploads/{session}"));
    set(&mut response, "range", &format!("0-{}", size.saturating_sub(1)));
    response
}

async fn size(session: &str, shared: &Arc<Shared>) -> std::io::Result<u64> {
    let path = shared.layouts.session(session).ok_or(std::io::ErrorKind::NotFound)?;
    Ok(tokio::fs::metadata(path).await?.len())
}

async fn patch(
    repository: &str,
    session: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let size = match size(session, shared).await {
        Ok(size) => size,
        Err(failure) => return internal(&failure),
    };
    let stated = request.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = stated.and_then(|range| range.trim_start_matches("bytes ").split_once('-'));
    if start.is_some_and(|(start, _)| start.parse() != Ok(size)) {
        return progress(StatusCode::RANGE_NOT_SATISFIABLE, repository, session, size);
    }
    match append(session, request, shared).await {
        Ok(size) => progress(StatusCode::ACCEPTED, repository, session, size),
        Err(failure) => internal(&failure),
    }
}

/// Appends a request's body to an upload session; its size so far. A body that breaks off leaves nothing behind.
async fn append(session: &str, request: Request<Incoming>, shared: &Arc<Shared>) -> std::io::Result<u64> {
    let path = shared.layouts.session(session).ok_or(std::io::ErrorKind::NotFound)?;
    let mut file = tokio::fs::OpenOptions::new().append(true).open(&path).await?;
    let before = file.metadata().await?.len();
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        let data = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(failure) => {
                file.set_len(before).await?;
                return Err(std::io::Error::other(failure));
            }
        };
        file.write_all(&data).await?;
    }
    file.flush().await?;
    Ok(file.metadata().await?.len())
}

async fn finish(
    repository: &str,
    session: &str,
    digest: &str,
    request: Request<Incoming>,
    shared: &Arc<Shared>,
) -> Response<Body> {
    if let Err(failure) = append(session, request, shared).await {
        return internal(&failure);
    }
    let owned = (Arc::clone(shared), repository.to_owned(), session.to_owned(), digest.to_owned());
    let stored = tokio::task::spawn_blocking(move || {
        let (shared, repository, session, digest) = owned;
        shared.layouts.take_session(&repository, &session, &digest)
    });
    match stored.await.map_err(std::io::Error::other).flatten() {
        Ok(true) => {
            let mut response = empty(StatusCode::CREATED);
            set(&mut response, LOCATION.as_str(), &format!("/v2/{repository}/blobs/{digest}"));
            set(&mut response, "docker-content-digest", digest);
            response
        }
        Ok(false) => error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the bytes have another digest"),
        Err(failure) => internal(&failure),
    }
}
