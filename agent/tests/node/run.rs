//! `sluice run`: what the container sees, and what it says.

use crate::rig::{LARGE, Node, large, sha256, wait_until};

#[test]
fn a_container_runs_while_most_of_its_image_is_in_the_registry() {
    let node = Node::indexed("[stream]\nfill = false\n");
    node.bytes_sent();
    assert_eq!(
        node.shell("echo hello; cat /data/changed; ls /data/gone 2>/dev/null | wc -l"),
        "hello\nafter0\n"
    );
    let fetched = node.bytes_sent();
    assert!(fetched < LARGE as u64 / 2, "{fetched} bytes were fetched");
    let status = node.status();
    assert_eq!(status["images"][0]["state"], "streaming", "{status}");
}

#[test]
fn options_reach_the_container() {
    let node = Node::indexed("");
    let image = node.image();
    let shared = node.room("shared");
    std::fs::write(shared.join("note"), "from outside\n").unwrap();
    let volume = format!("{}:/mnt:ro", shared.display());
    let script =
        "id -u; id -G; echo $FROM $ADDED; pwd; cat /mnt/note; touch /mnt/x 2>/dev/null || echo read-only";
    let said = node.ok(&[
        "run",
        "-e",
        "ADDED=by hand",
        "-w",
        "/data",
        "-u",
        "app",
        "-v",
        &volume,
        "--network",
        "none",
        &image,
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(said, "1000\n1000 2000\nimage by hand\n/data\nfrom outside\nread-only\n");
    assert_eq!(node.ok(&["run", &image]), "from the image\n");
}

#[test]
fn the_exit_code_is_the_containers() {
    let node = Node::indexed("");
    let output = node.run(&["run", &node.image(), "sh", "-c", "exit 37"]);
    assert_eq!(output.status.code(), Some(37));
}

#[test]
fn a_signal_reaches_the_container() {
    let node = Node::indexed("");
    let script = "trap 'echo got it; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let mut command = node.command(&["run", &node.image(), "sh", "-c", script]);
    let out = node.path("out");
    let mut child = command.stdout(std::fs::File::create(&out).unwrap()).spawn().unwrap();
    wait_until("the container is up", || std::fs::read_to_string(&out).unwrap().contains("up"));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "up\ngot it\n");
}

#[test]
fn what_a_container_writes_is_kept_when_asked_for() {
    let node = Node::indexed("");
    let output = node.run(&[
        "run",
        "--keep",
        &node.image(),
        "sh",
        "-c",
        "echo mine > /data/new; echo more >> /data/changed",
    ]);
    let said = String::from_utf8(output.stderr).unwrap();
    let upper = said.lines().find_map(|line| line.split_once(" is in ")).expect("it says where").1;
    assert_eq!(std::fs::read_to_string(format!("{upper}/data/new")).unwrap(), "mine\n");
    assert_eq!(std::fs::read_to_string(format!("{upper}/data/changed")).unwrap(), "aftermore\n");
    assert_eq!(node.shell("cat /data/changed; ls /data/new 2>/dev/null || echo clean"), "afterclean\n");
}

#[test]
fn an_image_becomes_local_under_a_running_container() {
    let node = Node::indexed("");
    let sum = sha256(&large());
    let script = "echo up; for i in 1 2 3 4 5 6 7 8; do sha256sum /data/large; sleep 0.2; done";
    let said = node.shell(script);
    for line in said.lines().skip(1) {
        assert_eq!(line, format!("{sum}  /data/large"));
    }
    assert_eq!(said.lines().count(), 9);
    node.wait_for_state("local");
    assert!(node.log().contains("the kernel reads it from now on"), "{}", node.log());
    node.bytes_sent();
    assert_eq!(node.shell("sha256sum /data/large"), format!("{sum}  /data/large\n"));
    assert!(node.bytes_sent() < 1000, "only the image's configuration is asked for");
}

#[test]
fn standalone_needs_no_daemon() {
    let node = Node::indexed("");
    let said = node.ok(&["--standalone", "run", &node.image(), "cat", "/data/changed"]);
    assert_eq!(said, "after");
    assert!(!node.path("state/sluice.sock").exists() || !node.run(&["status"]).status.success());
}

#[test]
fn a_killed_commands_container_is_cleaned_up_when_it_ends() {
    let node = Node::indexed("");
    let shared = node.room("shared");
    let volume = format!("{}:/mnt", shared.display());
    let script =
        "echo up > /mnt/up; while [ ! -e /mnt/go ]; do sleep 0.05; done; cat /data/changed > /mnt/read";
    let mut command = node.command(&["run", "-v", &volume, &node.image(), "sh", "-c", script]);
    let mut child = command.spawn().unwrap();
    wait_until("the container is up", || shared.join("up").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    node.kill_daemon();
    node.ok(&["gc"]);
    let containers = || std::fs::read_dir(node.path("root/containers")).unwrap().flatten().count();
    assert_eq!(containers(), 2, "the runtime's directory, and the container's, which still runs");
    std::fs::write(shared.join("go"), "").unwrap();
    wait_until("the container has ended", || shared.join("read").exists());
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(std::fs::read(shared.join("read")).unwrap(), b"after");
    node.kill_daemon();
    node.ok(&["gc"]);
    assert_eq!(containers(), 1, "{}", node.log());
}
