//! References to images, as people and clusters write them: what is understood, written out, is the same reference.

use sluice_registry::Client;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = Client::parse(text) else { return };
    let again = Client::parse(&reference.to_string()).expect("what was written");
    assert_eq!(again, reference);
}
