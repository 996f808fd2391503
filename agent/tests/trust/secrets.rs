//! No secret is written anywhere but where it belongs.

use base64::Engine;

use crate::rig::Node;

#[test]
fn sockets_are_the_owners_alone() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let node = Node::indexed("");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let mut sockets = 0;
    for entry in std::fs::read_dir(node.path("state")).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        if meta.file_type().is_socket() {
            sockets += 1;
            assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{}", entry.path().display());
        }
    }
    assert!(sockets >= 2, "the daemon's and the block server's at least");
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Capabilities that neither daemon nor block server has: modules, ports, rebooting, the clock, the network's configuration.
const GIVEN_UP: [u32; 5] = [16, 17, 22, 25, 12];

#[test]
fn daemon_and_block_server_give_up_what_they_do_not_need() {
    let node = Node::indexed("");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let state = node.path("state").to_string_lossy().into_owned();
    let mut seen = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if !line.contains(&state) || !(line.contains(" daemon") || line.contains(" block-server")) {
            continue;
        }
        seen += 1;
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("{name}: {status}")).trim().to_owned()
        };
        assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"), "{line}");
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            let bits = u64::from_str_radix(&field(set), 16).unwrap();
            assert!(GIVEN_UP.iter().all(|bit| bits >> bit & 1 == 0), "{line}: {set} {bits:x}");
        }
        let bounding = u64::from_str_radix(&field("CapBnd:"), 16).unwrap();
        let most = if line.contains(" daemon") { 21 } else { 4 };
        assert!(bounding.count_ones() <= most, "{line}: {bounding:x}");
    }
    assert_eq!(seen, 2, "the daemon and the block server");
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn a_password_is_in_no_log_trace_profile_event_or_file() {
    const SECRET: &str = "hunter2-correct-horse";
    let node = Node::indexed("");
    let key = node.path("sign");
    node.ok(&["key", "generate", &key.to_string_lossy()]);
    let private = std::fs::read_to_string(key.with_extension("key")).unwrap();
    let private = private.lines().nth(1).unwrap().to_owned();
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("user:{SECRET}"));
    let docker = node.path("docker.json");
    let text = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{auth}\"}}}}}}", node.address);
    std::fs::write(&docker, text).unwrap();
    let config = format!(
        "[registry]\ndocker_config = {docker:?}\n[trust]\nmode = \"any\"\nsign_key = {:?}\n",
        key.with_extension("key")
    );
    std::fs::write(node.path("config.toml"), config).unwrap();
    // The registry asks for the password and then refuses it: it is used, and complained about.
    let challenge =
        serde_json::json!({ "status": 401, "path": "/manifests/", "challenge": "Basic realm=\"r\"" });
    node.faults(&challenge);
    let mut said = String::new();
    let mut run = |arguments: &[&str]| {
        let output = node.command(arguments).env("SLUICE_LOG", "trace").output().unwrap();
        said += &String::from_utf8_lossy(&output.stdout);
        said += &String::from_utf8_lossy(&output.stderr);
    };
    run(&["check", &node.image()]);
    run(&["run", &node.image(), "cat", "/data/changed"]);
    node.faults(&serde_json::json!({}));
    run(&["index", &node.image()]);
    run(&["run", "-e", "A=1", &node.image(), "cat", "/data/changed"]);
    run(&["profile", "push", "--pack", &node.image()]);
    run(&["events", "--json"]);
    run(&["status", "--json"]);
    said += &node.log();
    assert!(said.contains("after"), "the container ran: {said}");
    let secrets = [SECRET, &auth, &private];
    for secret in secrets {
        assert!(!said.contains(secret), "a secret was shown");
    }
    for dir in ["root", "state", "images"] {
        for path in files_below(&node.path(dir)) {
            let Ok(bytes) = std::fs::read(&path) else { continue };
            let found = |secret: &str| bytes.windows(secret.len()).any(|at| at == secret.as_bytes());
            assert!(!secrets.into_iter().any(found), "a secret is in {}", path.display());
        }
    }
}

fn files_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            // Not what is mounted there: images and block files.
            Ok(kind) if kind.is_dir() && !matches!(entry.file_name().to_str(), Some("blocks")) => {
                found.extend(files_below(&entry.path()));
            }
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}
