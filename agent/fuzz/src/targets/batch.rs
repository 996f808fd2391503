//! Job documents, and the small languages in them.

use sluice_batch::{Bind, Plan, Seconds, docker_options, parse, to_kubernetes};

/// See the module text.
pub(super) fn run(data: &[u8]) {
    if let Ok(job) = parse(data) {
        let checked = [false, true].map(|relaxed| job.check(relaxed).is_ok());
        assert!(checked[1] || !checked[0], "what the rules allow the relaxed ones do, too");
        if checked[1] {
            drop(Plan::of(&job, 2));
            drop(to_kubernetes(&job, "job-1"));
        }
    }
    if let Ok(text) = std::str::from_utf8(data) {
        drop(docker_options(text));
        drop(Bind::parse(text));
        drop(Seconds::parse(text));
    }
}
