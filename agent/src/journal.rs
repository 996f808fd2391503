//! What happened to images on this node, in the words that users of image streaming know: kept for `sluice events`, and in
//! the log.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::commands::size;

/// Events kept for those who ask later.
const KEPT: usize = 1000;
/// Events that may wait for a slow follower before it loses some.
const WAITING: usize = 256;

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reason {
    /// An image is being made ready.
    Pulling,
    /// It is ready.
    Pulled,
    /// It is served from the registry while it is read.
    ImageStreaming,
    /// All of it was on this node.
    ImageLocal,
    /// It is pulled the ordinary way.
    StreamingFellBack,
    /// Starts of it became worse.
    StartRegressed,
    /// A call on a symbolic link failed as kernels with a known fault let it fail.
    RenameFault,
    /// A stream index said what is not so, and is not used any more.
    IndexQuarantined,
}

impl Reason {
    fn is_warning(self) -> bool {
        matches!(
            self,
            Self::StreamingFellBack | Self::StartRegressed | Self::RenameFault | Self::IndexQuarantined
        )
    }
}

/// One event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeEvent {
    /// Milliseconds since 1970.
    pub(crate) time_ms: u64,
    /// `Normal` or `Warning`, as in Kubernetes.
    pub(crate) r#type: String,
    pub(crate) reason: Reason,
    pub(crate) image: String,
    pub(crate) message: String,
}

/// A pull that is under way.
#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) image: String,
    began: Instant,
}

impl Pull {
    pub(crate) fn begin(image: &str) -> Self {
        Self { image: image.to_owned(), began: Instant::now() }
    }
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Journal {
    kept: Mutex<VecDeque<NodeEvent>>,
    followers: broadcast::Sender<NodeEvent>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { kept: Mutex::default(), followers: broadcast::Sender::new(WAITING) }
    }
}

impl Journal {
    /// Writes an event down and tells whoever follows.
    pub(crate) fn emit(&self, reason: Reason, image: &str, message: impl Into<String>) {
        let message = message.into();
        let warning = reason.is_warning();
        if warning {
            tracing::warn!(image, reason = ?reason, "{message}");
        } else {
            tracing::info!(image, reason = ?reason, "{message}");
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = NodeEvent {
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            r#type: if warning { "Warning" } else { "Normal" }.to_owned(),
            reason,
            image: image.to_owned(),
            message,
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Under the lock, so that a follower that begins now sees each event once. No follower is no fault.
        drop(self.followers.send(event));
    }

    pub(crate) fn pulling(&self, pull: &Pull) {
        self.emit(Reason::Pulling, &pull.image, format!("Pulling image \"{}\"", pull.image));
    }

    /// The image is ready, with so much of it on this node.
    pub(crate) fn pulled(&self, pull: &Pull, bytes_local: u64, bytes_total: u64) {
        let seconds = pull.began.elapsed().as_secs_f64();
        let message = format!(
            "Pulled image \"{}\" in {seconds:.1}s ({} of {} fetched)",
            pull.image,
            size(bytes_local),
            size(bytes_total)
        );
        self.emit(Reason::Pulled, &pull.image, message);
    }

    /// What was kept, and what comes.
    pub(crate) fn follow(&self) -> (Vec<NodeEvent>, broadcast::Receiver<NodeEvent>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.iter().cloned().collect(), self.followers.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn followers_see_each_event_once_and_old_ones_go() {
        let journal = Journal::default();
        for number in 0..=KEPT {
            journal.emit(Reason::Pulling, "image", number.to_string());
        }
        let (kept, mut coming) = journal.follow();
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept[0].message, "1");
        journal.emit(Reason::StreamingFellBack, "image", "why");
        let event = coming.recv().await.expect("an event");
        assert_eq!((event.r#type.as_str(), event.message.as_str()), ("Warning", "why"));
    }
}
