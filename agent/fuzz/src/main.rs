//! The targets under libFuzzer; the environment says which one. `cargo xtask fuzz` builds it, with coverage.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use sluice_fuzz::{TARGETS, Target};

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("SLUICE_FUZZ_TARGET").expect("SLUICE_FUZZ_TARGET names a target");
        TARGETS.iter().find(|(own, _)| *own == name).expect("there is such a target").1
    });
    target(data);
});
