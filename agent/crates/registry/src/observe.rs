//! Who wants to know of the requests that a task makes: each is a round trip.

use std::sync::Arc;
use std::time::Instant;

/// Told when an answer began, or did not come, with the time of the request.
pub type Observer = Arc<dyn Fn(Instant) + Send + Sync>;

tokio::task_local! {
    static OBSERVER: Observer;
}

/// Runs `work`, whose requests `observer` is told of; not those of tasks that it begins.
pub async fn observed<T>(observer: Observer, work: impl Future<Output = T>) -> T {
    OBSERVER.scope(observer, work).await
}

/// A request that began then was answered.
pub(crate) fn answered(began: Instant) {
    // An error means that nobody wants to know.
    OBSERVER.try_with(|observer| observer(began)).unwrap_or_default();
}
