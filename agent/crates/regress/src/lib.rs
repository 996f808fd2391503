//! What became worse from one set of container starts to another, with what confidence, in words.
//!
//! Pure: [`compare`] takes starts and gives a [`Report`]. Single starts prove nothing, so measures are compared by their medians, by
//! a rank test that assumes no distribution ([`stats`]), and only beyond thresholds that somebody would care about
//! ([`Limits`]). What a start does that none did before (files, failing calls) is found by counting.
#![warn(clippy::indexing_slicing)]

mod compare;
mod junit;
mod start;
pub mod stats;

pub use compare::{Finding, Kind, Limits, Measured, Report, compare};
pub use junit::junit;
pub use start::{Measure, Start};
