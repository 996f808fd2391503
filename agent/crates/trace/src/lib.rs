//! Traces of container starts, and the profiles that are learned from them.
//!
//! A [`Record`] is one thing that a container did; a trace file ([`TraceWriter`], [`TraceReader`]) holds those of one start,
//! in order; a [`Profile`] holds what several starts of the same image and entry point touched first, and gives the order
//! in which to fetch it. Everything here is a function of bytes: no probes, no network, no clock. What reads outside
//! bytes states its limits and never panics.
#![warn(clippy::indexing_slicing)]

mod codec;
mod file;
mod header;
mod level;
mod places;
mod profile;
mod ranges;
mod record;
mod sample;
mod summary;
mod varint;

pub use file::{TRACE_VERSION, TraceError, TraceReader, TraceWriter};
pub use header::{Footer, Header, TracedLayer, entry_class};
pub use level::{Capability, Level, Levels};
pub use places::{Place, Places};
pub use profile::{MAX_SAMPLES, PROFILE_VERSION, Planned, Profile, ProfileError, ProfileKey};
pub use ranges::Ranges;
pub use record::{AccessKind, FailedCall, FetchLane, Origin, Phase, Process, Record, What};
pub use sample::{ContentKey, FileFacts, Resolve, Sample, SampleRange};
pub use sluice_events::Call;
pub use summary::{Failure, Fetches, FileUse, Reads, Summarizer, Summary};
