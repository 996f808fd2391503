//! What registries say in headers: `WWW-Authenticate` and `Retry-After`.

use sluice_registry::outside;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, header)) = data.split_first() else { return };
    if mode & 1 == 0 {
        if let Some(realm) = outside::challenge(header) {
            assert!(realm.len() <= header.len());
        }
    } else {
        outside::retry_after(header);
    }
}
