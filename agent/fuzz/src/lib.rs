//! Each parser of outside bytes driven as the product drives it, with properties that must hold, and what these targets share.

#[path = "../../src/api.rs"]
#[allow(dead_code, missing_docs, reason = "the program's own; here only its messages are read")]
mod api;
#[allow(dead_code, reason = "the program uses the rest")]
mod credentials;
pub mod decode;
pub mod index;
mod journal;
#[path = "../../src/pattern.rs"]
mod pattern;
pub mod scratch;
pub mod tar;
mod targets;

pub use targets::{TARGETS, Target};
