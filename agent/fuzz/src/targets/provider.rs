//! Credentials of kubelet's making: the configuration of its providers, an answer of one, a pull secret.

use crate::credentials;

/// See the module text.
pub(super) fn run(data: &[u8]) {
    let Some((mode, text)) = data.split_first() else { return };
    match mode % 3 {
        0 => credentials::configuration(text),
        1 => credentials::answer(text),
        _ => credentials::pull_secret(text),
    }
}
