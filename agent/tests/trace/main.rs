//! What recorded starts say: lists, exports to programs that are not ours, the page in a real browser, comparisons, metrics.
//!
//! Root, FUSE and loop devices are needed, and what `cargo xtask test` installs: a browser, promtool, Python with an OTLP receiver.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::let_underscore_must_use,
    reason = "tests end at the first surprise, and say why"
)]

mod browser;
mod commands;
mod metrics;
mod otlp;
mod perfetto;
mod regress;
mod report;
#[path = "../node/rig.rs"]
#[allow(dead_code, reason = "the other suite uses the rest")]
mod rig;
