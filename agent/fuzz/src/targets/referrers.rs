//! Lists of referrers: anybody who can push writes in them.

use sluice_registry::outside;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let found = outside::referrers(data, "application/vnd.sluice.index.v1");
    assert!(found.len() <= data.len());
}
