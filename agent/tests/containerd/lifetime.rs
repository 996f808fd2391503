//! Containers and snapshots over restarts of containerd and of the agent, commits, removal and collection.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use sluice_kernel::mount::is_mount_point;

use crate::images::{Layer, varied};
use crate::rig::{Rig, ok};

#[test]
fn a_container_outlives_restarts_of_containerd_and_of_the_agent() {
    let mut rig = Rig::new("");
    rig.images.add("app", varied(10), &["sh"]);
    rig.index("app");
    rig.ctr_pull("app");
    rig.start("app", "long");
    assert_eq!(rig.exec("long", "echo mine > /own; cat /data/top"), "the top\n");
    rig.wait_until_local("app");

    rig.end_containerd();
    rig.start_containerd();
    assert_eq!(rig.exec("long", "cat /own /data/top"), "mine\nthe top\n");

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        rig.end_agent(signal);
        // All of the image is here: the kernel reads it without the agent.
        assert_eq!(
            rig.exec("long", "cat /own /data/top; sha256sum < /big | cat > /dev/null"),
            "mine\nthe top\n"
        );
        rig.start_agent();
        assert_eq!(rig.exec("long", "cat /own /data/top"), "mine\nthe top\n");
        let id = format!("after-{signal}");
        assert_eq!(
            rig.run("sluice", "app", &id, "cat /data/top; ls /own 2>&1 | cat"),
            "the top\nls: cannot access '/own': No such file or directory\n"
        );
    }

    // The stopped container's snapshot can be mounted again: its image was acquired for it.
    rig.ctr(&["tasks", "rm", "--force", &rig.id("long")]);
    rig.ctr(&["tasks", "start", "--detach", &rig.id("long")]);
    assert_eq!(rig.exec("long", "cat /own /data/top"), "mine\nthe top\n");
    rig.stop("long");
}

#[test]
fn an_agent_that_comes_back_serves_incomplete_images_to_new_containers() {
    let mut rig = Rig::new("[stream]\nfill = false\n");
    rig.images.add("app", varied(11), &["sh"]);
    rig.index("app");
    rig.ctr_pull("app");
    rig.start("app", "before");
    // Its programs are read; what else is in the image is not.
    assert_eq!(
        rig.exec("before", "cat /etc/passwd | cat > /dev/null; sha256sum /etc/passwd | cat > /dev/null"),
        ""
    );
    rig.end_agent(Signal::SIGKILL);
    rig.start_agent();
    // The container that was there goes on, with what it never read before.
    assert_eq!(rig.exec("before", "cat /data/top"), "the top\n");
    assert_eq!(rig.run("sluice", "app", "after", "cat /data/top"), "the top\n");
    rig.stop("before");
}

#[test]
fn a_container_is_committed_and_run_again() {
    let rig = Rig::new("");
    rig.images.add("app", varied(12), &["sh"]);
    rig.ctr_pull("app");
    rig.start("app", "worker");
    rig.exec("worker", "echo new > /data/new; mv /opaque /moved");
    let worker = rig.id("worker");
    rig.ctr(&["tasks", "rm", "--force", &worker]);
    let snapshots =
        |arguments: &[&str]| rig.ctr(&[&["snapshots", "--snapshotter", "sluice"][..], arguments].concat());
    let diff = snapshots(&["diff", &worker]);
    assert!(!diff.is_empty(), "a diff is a tar");
    snapshots(&["commit", "saved", &worker]);
    assert!(snapshots(&["info", "saved"]).contains("Committed"));
    let usage = snapshots(&["usage", "saved"]);
    assert!(usage.contains("saved"), "{usage}");
    snapshots(&["prepare", "again", "saved"]);
    let target = rig.path("again");
    std::fs::create_dir(&target).unwrap();
    let mount = snapshots(&["mounts", target.to_str().unwrap(), "again"]);
    ok(&std::process::Command::new("sh").arg("-c").arg(mount.trim()).output().unwrap());
    assert_eq!(std::fs::read_to_string(target.join("data/new")).unwrap(), "new\n");
    assert_eq!(std::fs::read_to_string(target.join("moved/above")).unwrap(), "seen");
    assert!(!target.join("opaque").exists());
    sluice_kernel::unmount(&target, Default::default()).unwrap();
    rig.ctr(&["containers", "rm", &worker]);
}

#[test]
fn a_removed_image_leaves_nothing() {
    let rig = Rig::new("[images]\ndeny = [\"*/ordinary:*\"]\n");
    rig.images.add("app", varied(13), &["sh"]);
    rig.images.add("ordinary", vec![Layer::new().tools()], &["sh"]);
    rig.ctr_pull("app");
    rig.ctr_pull("ordinary");
    rig.start("app", "user");
    rig.ctr(&["images", "rm", "--sync", &rig.reference("app")]);
    assert_eq!(rig.exec("user", "cat /data/top"), "the top\n", "a removed image's container goes on");
    rig.stop("user");
    rig.ctr(&["images", "rm", "--sync", &rig.reference("ordinary")]);
    // Collection runs by itself after removals; another removal of nothing waits for it.
    rig.ctr(&["content", "prune", "references"]);
    rig.wait("the snapshots are gone", || {
        rig.ctr(&["snapshots", "--snapshotter", "sluice", "ls"]).lines().count() == 1
    });
    rig.wait("the image is forgotten", || rig.status()["images"].as_array().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(rig.path("root/containerd/snapshots")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(rig.path("root/layers")).unwrap().count(), 0);
    let images: Vec<_> = std::fs::read_dir(rig.path("state/images")).unwrap().flatten().collect();
    assert!(images.iter().all(|entry| !is_mount_point(&entry.path()).unwrap()), "{images:?}");
}

#[test]
fn an_upgrade_under_twenty_containers_of_five_images_that_started_at_once() {
    let mut rig = Rig::new("[stream]\nfill = false\n");
    let names: Vec<String> = (0..5).map(|number| format!("app{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        let own = Layer::new().text("own", &format!("{name}\n"));
        rig.images.add(name, varied(20 + number as u64).into_iter().chain([own]).collect(), &["sh"]);
        rig.index(name);
    }
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| rig.ctr_pull(name));
        }
    });
    // Each reads, until it is told to stop, what it read before and what nobody read yet.
    let script = "sha256sum < /data/kept > /first; until [ -e /stop ]; do \
                  sha256sum < /data/kept > /now; cat /own /data/top > /read; \
                  [ \"$(cat /first)\" = \"$(cat /now)\" ] || echo bad >> /errors; sleep 1; done 2>> /errors; \
                  sha256sum < /big > /last 2>> /errors; sleep infinity";
    std::thread::scope(|scope| {
        for number in 0..20 {
            let (rig, name) = (&rig, &names[number % 5]);
            scope.spawn(move || rig.start_with(name, &format!("c{number}"), script));
        }
    });
    let running = |rig: &Rig| {
        let list = rig.ctr(&["tasks", "ls"]);
        let of_rig = list.lines().filter(|line| line.starts_with(&rig.id("c")));
        let mut tasks: Vec<String> =
            of_rig.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        tasks.sort();
        tasks
    };
    let before = running(&rig);
    assert_eq!(before.iter().filter(|line| line.ends_with("RUNNING")).count(), 20, "{before:?}");
    // An agent that is told to go, and one that is killed in the middle of what it does.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        rig.end_agent(signal);
        rig.start_agent();
    }
    for number in 0..20 {
        rig.exec(&format!("c{number}"), "echo > /stop");
    }
    for number in 0..20 {
        let id = format!("c{number}");
        rig.wait("the last file is read", || !rig.exec(&id, "cat /last 2>&1 | cat").starts_with("cat:"));
        let said = rig.exec(&id, "until [ -s /last ]; do sleep 1; done; cat /own /errors");
        assert_eq!(said, format!("{}\n", names[number % 5]));
    }
    assert_eq!(running(&rig), before, "the same processes all along");
    for number in 0..20 {
        rig.stop(&format!("c{number}"));
    }
}

#[test]
fn nobody_is_refused_while_agents_come_and_go() {
    let mut rig = Rig::new("");
    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (socket, config, state) = (rig.path("c.sock"), rig.path("config.toml"), rig.path("state"));
    // A failed assertion must not leave the others waiting for the end.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ask = |command: &mut std::process::Command| {
        let _ends = Ends(&stop);
        while !stop.load(Ordering::Relaxed) {
            ok(&command.output().unwrap());
            asked.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut ctr = std::process::Command::new("ctr");
            ask(ctr.arg("--address").arg(&socket).args(["snapshots", "--snapshotter", "sluice", "ls"]));
        });
        scope.spawn(|| {
            let mut sluice = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"));
            ask(sluice.arg("--config").arg(&config).arg("--state").arg(&state).args(["node", "status"]));
        });
        let _ends = Ends(&stop);
        for _ in 0..3 {
            rig.end_agent(Signal::SIGTERM);
            // Questions come in meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(500));
            rig.start_agent();
            let so_far = asked.load(Ordering::Relaxed);
            rig.wait("both go on", || asked.load(Ordering::Relaxed) > so_far + 4);
        }
    });
}

#[test]
fn systemd_is_told_when_the_sockets_are_open() {
    let dir = tempfile::Builder::new().prefix("slc").tempdir().unwrap();
    let listener = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify")).unwrap();
    listener.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let mut daemon = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"))
        .arg("--root")
        .arg(dir.path().join("root"))
        .arg("--state")
        .arg(dir.path().join("state"))
        .arg("daemon")
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .spawn()
        .unwrap();
    let mut message = [0; 64];
    let len = listener.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"READY=1");
    for socket in ["sluice.sock", "snapshotter.sock"] {
        std::os::unix::net::UnixStream::connect(dir.path().join("state").join(socket)).unwrap();
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().try_into().unwrap()), Signal::SIGTERM)
        .unwrap();
    assert!(daemon.wait().unwrap().success());
}
