//! Profiles, which come from registries: the bytes as they are, and as the plain text inside. What is read must be readable again,
//! and equal.

use sluice_trace::Profile;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(profile) = Profile::decode(data) else { return };
    let plan = profile.plan();
    let encoded = profile.encode().expect("in memory");
    let again = Profile::decode(&encoded).expect("what was written");
    assert_eq!(again, profile);
    assert_eq!(again.plan(), plan);
}
