//! What a profile says a start will touch, fetched before it is asked for; and start packs, which hold exactly that.
//!
//! A [`Profile`](sluice_trace::Profile) speaks of files by their content; here a [`WantedRange`] is a place in a layer's local file.
//! [`fetch`] brings wanted ranges in their order, in the prefetch lane: behind all demand, before the background fill. A
//! start pack ([`PackWriter`], [`PackTable`]) is one blob of chunks and parts of chunks in that order. Whatever comes is verified by the
//! layer's index before anybody sees it, so neither profile nor pack need be trusted. Nothing here delays a start.
//!
//! Of a start of which nothing is known an [`ImageTree`] tells what it will probably read, and [`ElfBytes`] what a program needs.
#![warn(clippy::indexing_slicing)]

mod elf;
mod fetch;
mod guess;
mod pack;
mod ranges;

pub use elf::{Elf, ElfBytes, ElfNeeds};
pub use fetch::{Fetched, Limits, Pace, fetch};
pub use guess::{FilePlace, ImageTree};
pub use pack::{Head, Item, PACK_HEAD, PACK_VERSION, PackError, PackFrame, PackTable, PackWriter};
pub use ranges::{FileAt, LayerFiles, WantedRange, overlapping, served, wanted};
