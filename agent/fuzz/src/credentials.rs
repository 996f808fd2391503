//! The program's modules that read credentials: it has no library that they could come from.

use std::os::unix::fs::PermissionsExt;
use std::sync::Once;

use crate::scratch;

#[path = "../../src/credentials/matching.rs"]
mod matching;
#[path = "../../src/credentials/provider.rs"]
mod provider;
#[path = "../../src/credentials/secrets.rs"]
mod secrets;

const HOSTS: [&str; 2] = ["registry.example", "registry.example:5000"];

/// Any configuration of providers. None of them is run.
pub(crate) fn configuration(text: &[u8]) {
    let file = scratch::file("providers.yaml", text);
    drop(provider::Providers::read(&file, scratch::dir()));
}

/// Any answer of a provider.
pub(crate) fn answer(text: &[u8]) {
    static READY: Once = Once::new();
    READY.call_once(|| {
        let answer = scratch::dir().join("answer");
        let script = format!("#!/bin/sh\nexec cat {}\n", answer.display());
        let program = scratch::file("provider", script.as_bytes());
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).expect("executable");
        scratch::file(
            "one.yaml",
            br#"{"providers":[{"name":"provider","matchImages":["*.example"],"defaultCacheDuration":"0s","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}]}"#,
        );
    });
    scratch::file("answer", text);
    let providers = provider::Providers::read(&scratch::dir().join("one.yaml"), scratch::dir());
    providers.expect("a configuration").get(HOSTS[0], "app");
}

/// Any pull secret.
pub(crate) fn pull_secret(text: &[u8]) {
    let file = scratch::file("secrets/one", text);
    let secrets = secrets::Secrets::new(file.parent().expect("a directory").to_path_buf());
    for host in HOSTS {
        secrets.get(host, "team/app");
    }
}
