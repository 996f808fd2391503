//! Requests on the daemon's control socket: what is read, written, is read again as the same.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % 8 {
        0 => both_ways::<api::AcquireRequest>(body),
        1 => both_ways::<api::ProfileRequest>(body),
        2 => both_ways::<api::ImageRequest>(body),
        3 => both_ways::<api::ReleaseRequest>(body),
        4 => both_ways::<api::StopRequest>(body),
        5 => both_ways::<api::EventsRequest>(body),
        6 => both_ways::<api::NodeRequest>(body),
        _ => both_ways::<api::Event>(body),
    }
}

fn both_ways<T: Serialize + DeserializeOwned>(body: &[u8]) {
    let Ok(request) = serde_json::from_slice::<T>(body) else { return };
    let text = serde_json::to_vec(&request).expect("written");
    let again: T = serde_json::from_slice(&text).expect("what was written");
    assert_eq!(serde_json::to_vec(&again).expect("written"), text);
}
