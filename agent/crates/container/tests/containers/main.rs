//! Real containers, by runc and by crun: what is inside, what comes out, and that nothing stays.
//!
//! Needs root, overlayfs, and both runtimes; a missing one fails the tests.

mod isolation;
mod lifetime;
mod process;
mod root;
