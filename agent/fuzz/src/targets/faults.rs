//! Faults of the embedded registry: what is read, written, is read again.

use sluice_registry_server::Faults;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Ok(faults) = serde_json::from_slice::<Faults>(data) else { return };
    let again = serde_json::to_vec(&faults).expect("written");
    assert_eq!(serde_json::from_slice::<Faults>(&again).expect("what was written"), faults);
}
