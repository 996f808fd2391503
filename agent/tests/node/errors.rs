//! Errors name what, where, and what to do.

use serde_json::json;

use crate::rig::Node;

#[test]
fn complaints_are_readable() {
    let node = Node::indexed("");
    let address = &node.address;
    let none = format!("{address}/none:latest");
    let no_tag = format!("{address}/image:none");
    for (arguments, wanted) in [
        (vec!["run", "UPPER CASE"], vec!["UPPER CASE", "reference"]),
        (vec!["run", &none], vec!["404", "none", "no such image"]),
        (vec!["run", &no_tag], vec!["404", "none", "no such image"]),
        (vec!["run", "127.0.0.1:1/image"], vec!["127.0.0.1:1", "refused"]),
        (vec!["mount", &none, "/nonexistent"], vec!["/nonexistent"]),
        (vec!["status", "nothing"], vec!["nothing"]),
    ] {
        let complaint = node.complaint(&arguments);
        for word in &wanted {
            assert!(complaint.to_lowercase().contains(&word.to_lowercase()), "{arguments:?}: {complaint}");
        }
        assert_eq!(complaint.lines().filter(|line| line.starts_with("sluice:")).count(), 1, "{complaint}");
        assert!(!complaint.contains("panicked"), "{complaint}");
    }
}

#[test]
fn a_refusal_by_the_registry_is_told() {
    let node = Node::new("");
    for (status, wanted) in [(401, "credentials"), (403, "403"), (500, "500")] {
        node.faults(&json!({ "status": status }));
        let complaint = node.complaint(&["check", &node.image()]);
        assert!(complaint.contains(wanted) && complaint.contains(&node.address), "{status}: {complaint}");
    }
}

#[test]
fn a_configuration_that_is_not_understood_is_named() {
    let node = Node::new("[stream]\noutage = 1\n");
    let complaint = node.complaint(&["status"]);
    assert!(complaint.contains("config.toml") && complaint.contains("outage"), "{complaint}");
    std::fs::write(node.path("config.toml"), "").unwrap();
}

#[test]
fn a_machine_without_ca_certificates_reaches_plain_registries() {
    let node = Node::new("");
    let (nothing, nowhere) = (node.path("no-certificates"), node.room("no-directory-of-certificates"));
    std::fs::write(&nothing, "").unwrap();
    let mut command = node.command(&["run", &node.image(), "cat", "/data/changed"]);
    command.env("SSL_CERT_FILE", &nothing).env("SSL_CERT_DIR", &nowhere);
    let output = command.output().expect("sluice starts");
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), node.log());
    assert_eq!(output.stdout, b"after");
    assert!(node.log().contains("ca-certificates"), "{}", node.log());
}
