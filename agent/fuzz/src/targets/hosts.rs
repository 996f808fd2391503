//! containerd's `hosts.toml`: each endpoint is an address.

use sluice_registry::outside;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let file = crate::scratch::file("hosts.toml", data);
    if let Ok(bases) = outside::hosts(&file, "registry.example") {
        assert!(!bases.is_empty() && bases.iter().all(|base| base.ends_with('/')));
    }
}
