//! `sluice doctor` says what this node can do.

use std::process::Command;

use serde_json::Value;

fn doctor(prefix: &[&str]) -> (Value, Option<i32>) {
    let program = env!("CARGO_BIN_EXE_sluice");
    let mut words = prefix.iter().copied().chain([program, "doctor", "--json"]);
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let found = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (found, output.status.code())
}

fn check<'a>(found: &'a Value, list: &str, name: &str) -> &'a Value {
    let all = found[list].as_array().unwrap();
    all.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{name}: {found:#}"))
}

#[test]
fn a_healthy_node_can_stream_and_its_probes_have_levels() {
    let (found, code) = doctor(&[]);
    assert_eq!((code, &found["streaming"]), (Some(0), &Value::Bool(true)), "{found:#}");
    for name in ["FUSE", "loop devices", "EROFS", "EROFS with several devices", "overlayfs"] {
        assert_eq!(check(&found, "checks", name)["ok"], true, "{found:#}");
    }
    // Unless it is configured otherwise; whether the kernel has more is said beside it.
    assert_eq!(check(&found, "checks", "way of block files")["reason"], "classic, by the configuration");
    let zero_copy = check(&found, "checks", "FUSE over io_uring, zero copy");
    assert!(!zero_copy["reason"].as_str().unwrap().contains("cannot be asked"), "{found:#}");
    // Every operation on symbolic links and pipes works, on our mounts and where the fault would show.
    for name in ["symbolic links on streamed images", "kernel's handling of symbolic links"] {
        let check = check(&found, "links", name);
        assert_eq!(check["ok"], true, "{found:#}");
        assert!(!check["reason"].as_str().unwrap().contains("could not be tried"), "{found:#}");
    }
    let probes = found["probes"].as_array().unwrap();
    assert_eq!(probes.len(), 7, "{found:#}");
    assert!(probes.iter().all(|one| one["level"].is_string()), "{found:#}");
    let left = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!left.contains("sluice-doctor-"), "{left}");
}

#[test]
fn a_node_that_cannot_stream_says_why_and_exits_with_an_error() {
    let without_devices = "mount -t tmpfs none /dev && exec \"$@\"";
    let (found, code) = doctor(&["unshare", "--mount", "sh", "-c", without_devices, "sh"]);
    assert_eq!((code, &found["streaming"]), (Some(1), &Value::Bool(false)), "{found:#}");
    let fuse = check(&found, "checks", "FUSE");
    assert!(fuse["ok"] == false && fuse["needed"] == true, "{found:#}");
    assert!(fuse["reason"].as_str().unwrap().contains("/dev/fuse"), "{found:#}");
}
