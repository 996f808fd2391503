//! Traces of container starts, and the profiles that are learned from them.
//!
//! A [`Record`] is one thing that a container did; a trace file holds those of one start, in order; a [`Profile`] holds what several
//! starts of the same image and entry point touched first. Everything here is a function of bytes: no probes, no network,
//! no clock.
#![warn(clippy::indexing_slicing)]

mod level;
mod record;

pub use level::{Capability, Level, Levels};
pub use record::{AccessKind, FailedCall, Process, Record, What};
pub use sluice_events::Call;
