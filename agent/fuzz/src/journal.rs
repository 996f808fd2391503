//! Stands in for the program's events, of which its messages only carry any: they come from the daemon, never from outside.

use serde::{Deserialize, Serialize};

/// Any event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeEvent(serde_json::Value);
