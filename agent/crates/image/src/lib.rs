//! Image formats, pure: decoders, tar, stream index, layer layout, merge, EROFS writer.
//!
//! Everything here is a function of bytes: no network, no mounts, no clock. What reads outside bytes
//! states its limits and never panics.
#![warn(clippy::indexing_slicing)]

pub mod decode;
pub mod entry;
pub mod erofs;
pub mod index;
pub mod merge;
pub mod parts;
pub mod records;
pub mod tar;
mod varint;

pub use oci_spec::image::Digest;
