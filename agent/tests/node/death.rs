//! `kill -9` of the daemon is a pause: mounts stay, reads go on, nothing is fetched twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::rig::{MANY, Node, assert_content, ended, large, one_of_many, wait_until};

#[test]
fn readers_do_not_notice_that_daemons_die() {
    let node = Node::indexed("");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let (over, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = std::thread::spawn({
        let (over, reads, dir) = (Arc::clone(&over), Arc::clone(&reads), dir.clone());
        move || {
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                let number = reads.fetch_add(1, Ordering::Relaxed) as usize % MANY;
                assert_content(&dir.join(format!("data/many/{number}")), &one_of_many(number));
                assert_content(&dir.join("data/large"), &large());
                longest = longest.max(start.elapsed());
                nix::fcntl::posix_fadvise(
                    std::fs::File::open(dir.join("data/large")).unwrap(),
                    0,
                    0,
                    nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
                )
                .unwrap();
            }
            longest
        }
    });
    for _ in 0..5 {
        node.kill_daemon();
        node.ok(&["gc"]); // Any command starts the next daemon.
        let before = reads.load(Ordering::Relaxed);
        wait_until("reads go on", || reads.load(Ordering::Relaxed) > before + 1);
    }
    over.store(true, Ordering::Relaxed);
    let longest = reader.join().expect("no read failed");
    eprintln!("longest read across 5 deaths: {longest:?}");
    // Generous: the machine may be busy with other tests.
    assert!(longest < Duration::from_secs(10));
    let complaint = node.complaint(&["rm", &node.image()]);
    assert!(complaint.contains("in use"), "the next daemon knows the mount: {complaint}");
    node.ok(&["umount", &dir.to_string_lossy()]);
    assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
}

/// In the kernel it waits for the reads under way, and cannot end before they are answered.
#[test]
fn readers_do_not_notice_that_a_daemon_dies_while_it_hands_over() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    let mut caught = 0;
    // A hand-over takes some 20 ms, which a busy machine looks away for.
    for _ in 0..20 {
        node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ends = Ends(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let file = std::fs::File::open(dir.join("data/large")).unwrap();
                    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                    nix::fcntl::posix_fadvise(file, 0, 0, advice).unwrap();
                    assert_content(&dir.join("data/large"), &large());
                }
            });
            let pid = node.daemon_pid();
            let mut pull = node.command(&["pull", &node.image()]).spawn().unwrap();
            while pull.try_wait().unwrap().is_none() && !is_handing_over(pid) {}
            if is_handing_over(pid) {
                let daemon = nix::unistd::Pid::from_raw(pid);
                nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGKILL).unwrap();
                caught += 1;
            }
            ended("the pull", pull);
            node.ok(&["pull", &node.image()]);
        });
        assert_content(&dir.join("data/large"), &large());
        node.ok(&["umount", &dir.to_string_lossy()]);
        node.ok(&["rm", &node.image()]);
        if caught == 2 {
            return;
        }
    }
    panic!("killed {caught} times during a hand-over");
}

/// Whether one of its threads is in `LOOP_CHANGE_FD` (proc_pid_syscall(5), linux/loop.h).
fn is_handing_over(pid: i32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok()).any(|call| {
        let mut words = call.split(' ');
        words.next() == Some(&nix::libc::SYS_ioctl.to_string()) && words.nth(1) == Some("0x4c06")
    })
}

/// Another version takes over, at a place of its own and then in the same place; who reads notices nothing.
#[test]
fn an_upgrade_fails_no_read() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let out = node.path("out");
    let script = "echo up; for n in $(cat /mnt/numbers); do until [ -e /mnt/$n ]; do sleep 0.05; done; \
                  sha256sum /data/many/$n > /dev/null || exit 1; done; sha256sum /data/large";
    let shared = node.room("shared");
    std::fs::write(shared.join("numbers"), "0 1 2").unwrap();
    let volume = format!("{}:/mnt", shared.display());
    let mut command = node.command(&["run", "-v", &volume, &node.image(), "sh", "-c", script]);
    let container = command.stdout(std::fs::File::create(&out).unwrap()).spawn().unwrap();
    wait_until("the container is up", || std::fs::read_to_string(&out).unwrap().contains("up"));

    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let number = reads.fetch_add(1, Ordering::Relaxed) as usize % MANY;
                assert_content(&dir.join(format!("data/many/{number}")), &one_of_many(number));
            }
        });
        let program = node.path("sluice");
        for (round, named) in [true, false, false].into_iter().enumerate() {
            let new = node.path("sluice.new");
            std::fs::copy(env!("CARGO_BIN_EXE_sluice"), &new).unwrap();
            std::fs::rename(&new, &program).unwrap();
            let (pid, since) = (node.daemon_pid(), node.status()["since_ms"].clone());
            let named = named.then(|| program.to_string_lossy().into_owned());
            node.ok(&[&["upgrade"][..], &named.as_deref().into_iter().collect::<Vec<_>>()].concat());
            let status = node.status();
            assert_eq!(status["program"], program.to_str().unwrap());
            assert_ne!(status["since_ms"], since);
            assert_eq!(node.daemon_pid(), pid, "whoever watches it sees the same process");
            std::fs::write(shared.join(round.to_string()), "").unwrap();
            let before = reads.load(Ordering::Relaxed);
            wait_until("reads go on", || reads.load(Ordering::Relaxed) > before + 1);
        }
    });
    assert!(ended("the container", container).success(), "{}", node.log());
    assert!(std::fs::read_to_string(&out).unwrap().contains(&crate::rig::sha256(&large())));
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Ends what waits for it, also when an assertion fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// It is asked before anything ends.
#[test]
fn what_cannot_follow_is_no_upgrade() {
    let node = Node::indexed("");
    let dir = node.room("mount");
    assert!(node.complaint(&["upgrade"]).contains("no daemon runs"));
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let daemon = node.status()["since_ms"].clone();
    for (program, reason) in
        [("/bin/true", "another program"), ("/etc/passwd", "cannot run"), ("/no/file", "cannot find")]
    {
        let complaint = node.complaint(&["upgrade", program]);
        assert!(complaint.contains(reason), "{complaint}");
    }
    // A configuration that the next daemon would not take.
    std::fs::write(node.path("config.toml"), "nonsense = 1\n").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(["--config", "/dev/null", "upgrade", "--root"]).arg(node.path("root"));
    let output = command.arg("--state").arg(node.path("state")).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && complaint.contains("nonsense"), "{complaint}");
    std::fs::write(node.path("config.toml"), "").unwrap();
    assert_eq!(node.status()["since_ms"], daemon);
    node.ok(&["umount", &dir.to_string_lossy()]);
}

#[test]
fn a_container_outlives_a_stopped_daemon() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let out = node.path("out");
    let script = "echo up; while [ ! -e /mnt/go ]; do sleep 0.05; done; sha256sum /data/large";
    let shared = node.room("shared");
    let volume = format!("{}:/mnt", shared.display());
    let mut command = node.command(&["run", "-v", &volume, &node.image(), "sh", "-c", script]);
    let mut child = command.stdout(std::fs::File::create(&out).unwrap()).spawn().unwrap();
    wait_until("the container is up", || std::fs::read_to_string(&out).unwrap().contains("up"));
    node.ok(&["stop"]);
    std::fs::write(shared.join("go"), "").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    node.ok(&["gc"]);
    assert!(child.wait().unwrap().success(), "{}", node.log());
    assert!(std::fs::read_to_string(&out).unwrap().contains(&crate::rig::sha256(&large())));
}

#[test]
fn a_fill_goes_on_where_it_was_killed() {
    let node = Node::indexed("");
    node.ok(&["mount", &node.image(), &node.room("mount").to_string_lossy()]);
    for pause_ms in [0, 5, 10, 20, 40, 80, 5, 10] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        node.kill_daemon();
        assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
    }
    node.wait_for_state("local");
    assert_content(&node.path("mount/data/large"), &large());
    node.ok(&["umount", &node.path("mount").to_string_lossy()]);
}

#[test]
fn a_killed_server_of_block_files_is_replaced() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert_content(&dir.join("data/many/7"), &one_of_many(7));
    node.kill_daemon_for_good();
    node.kill_block_server();
    node.ok(&["gc"]);
    assert_content(&dir.join("data/large"), &large());
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// What a user is told is mounted is mounted, whoever looks for what is not used at that moment.
#[test]
fn gc_takes_nothing_that_is_about_to_be_mounted() {
    let node = Node::indexed("");
    node.ok(&["pull", &node.image()]);
    let dir = node.room("mount");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                node.ok(&["gc"]);
            }
        });
        for number in 0..20 {
            node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
            assert_content(&dir.join(format!("data/many/{number}")), &one_of_many(number));
            node.ok(&["umount", &dir.to_string_lossy()]);
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// A layer that began anew while it was read has two block files: the next daemon serves both.
#[test]
fn a_layer_whose_file_was_lost_in_use_is_read_across_daemons() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    for layer in std::fs::read_dir(node.path("root/layers")).unwrap() {
        std::fs::remove_file(layer.unwrap().path().join("chunks")).unwrap();
    }
    assert!(!node.run(&["fsck"]).status.success(), "it is noticed");
    for number in [1, 2] {
        node.kill_daemon();
        assert_content(&dir.join(format!("data/many/{number}")), &one_of_many(number));
    }
    assert_content(&dir.join("data/large"), &large());
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Whether a layer is filled or not: a crash loses nothing of it, and the server of block files reads it without asking the daemon.
#[test]
fn what_was_read_is_soon_recorded() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    let asked = || node.status()["reads"]["from_disk"].as_u64().unwrap();
    wait_until("the daemon is not asked for what was read", || {
        let path = dir.join("data/large");
        assert_content(&path, &large());
        let before = asked();
        let file = std::fs::File::open(&path).unwrap();
        let forget = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, forget).unwrap();
        assert_content(&path, &large());
        asked() == before
    });
    assert_eq!(node.status()["images"][0]["state"], "streaming", "the server reads it");
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Nobody but a reader needs it.
#[test]
fn a_killed_daemon_is_followed_by_the_next() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    for number in [7, 8, 9] {
        let daemon = node.daemon_pid();
        node.kill_daemon();
        assert_content(&dir.join(format!("data/many/{number}")), &one_of_many(number));
        // It answers reads before it answers commands.
        crate::rig::wait_until("it answers", || node.run(&["status"]).status.success());
        assert_ne!(node.daemon_pid(), daemon);
    }
    assert_content(&dir.join("data/large"), &large());
    node.ok(&["umount", &dir.to_string_lossy()]);
    node.ok(&["stop"]);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(node.ok(&["stop"]).lines().count(), 1, "one that was told to stop is not");
}

/// Whoever asks while its keeper starts the next one waits for that, and is not told that none runs.
#[test]
fn a_question_meets_the_next_daemon() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    for _ in 0..5 {
        let daemon = node.daemon_pid();
        node.kill_daemon();
        assert_ne!(node.daemon_pid(), daemon);
        node.ok(&["node", "status"]);
    }
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// The daemon that lives on takes it for what it is.
#[test]
fn a_server_of_block_files_that_dies_alone_is_replaced() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    assert_content(&dir.join("data/many/7"), &one_of_many(7));
    let daemon = node.daemon_pid();
    node.kill_block_server();
    // Reads of what is not local fail until there is another one.
    wait_until("the image is read again", || std::fs::read(dir.join("data/large")).is_ok());
    assert_content(&dir.join("data/large"), &large());
    assert_eq!(node.daemon_pid(), daemon, "it started over in its place");
    assert!(node.log().contains("the daemon starts over"), "{}", node.log());
    node.ok(&["umount", &dir.to_string_lossy()]);
}

/// Layers have the same names on all nodes: what another one's dead server left is not ours to move.
#[test]
fn another_nodes_devices_are_left_alone() {
    let (other, node) = (Node::indexed("[stream]\nfill = false\n"), Node::indexed(""));
    for one in [&other, &node] {
        one.ok(&["mount", &one.image(), &one.room("mount").to_string_lossy()]);
    }
    other.kill_daemon_for_good();
    other.kill_block_server();
    // Out of the tree: their devices' files have the names that ours have.
    let lazy = sluice_kernel::mount::UnmountOptions { lazy: true, force: false };
    sluice_kernel::unmount(&other.path("state/blocks"), lazy).expect("unmounted");
    node.kill_daemon();
    node.ok(&["gc"]);
    node.wait_for_state("local");
    node.ok(&["umount", &node.path("mount").to_string_lossy()]);
    // It would still have devices otherwise.
    drop(node);
    let log = other.ok(&["node", "drain"]);
    assert_eq!(log, "");
}

#[test]
fn drain_ends_also_what_a_killed_daemon_left() {
    let node = Node::indexed("");
    let dir = node.room("mount");
    node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
    node.kill_daemon();
    node.ok(&["node", "drain"]);
    wait_until("nothing is left", || node.leftovers().is_empty());
}

/// Neither the kernel nor the server of block files goes on reading what it was told is there.
#[test]
fn damage_that_fsck_found_is_not_read_by_who_has_the_image_mounted() {
    for (config, local) in
        [("", true), ("[stream]\nfill = false\n", false), ("[blocks]\none_device = true\n", true)]
    {
        let node = Node::indexed(config);
        let dir = node.room("mount");
        node.ok(&["mount", &node.image(), &dir.to_string_lossy()]);
        if local {
            node.wait_for_state("local");
        } else {
            assert_content(&dir.join("data/large"), &large());
            // What was read is on the disk, and the server reads it from there.
            node.ok(&["stop"]);
            node.ok(&["gc"]);
        }
        let file = std::fs::File::open(dir.join("data/large")).unwrap();
        let forget = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, forget).unwrap();
        drop(file);
        damage(&node, &large()[500_000..500_064]);
        node.faults(&serde_json::json!({ "path": "/blobs/", "status": 503 }));
        let readers = [false, true].map(|kill| {
            let found = node.run(&["fsck"]);
            assert_eq!(found.status.success(), kill, "{found:?}");
            if kill {
                node.kill_daemon();
            }
            let path = dir.join("data/large");
            let reader = std::thread::spawn(move || assert_content(&path, &large()));
            std::thread::sleep(Duration::from_millis(700));
            assert!(!reader.is_finished(), "{config}: damaged bytes were read, or others from nowhere");
            reader
        });
        node.faults(&serde_json::json!({}));
        readers.into_iter().for_each(|reader| reader.join().expect("the right bytes"));
        node.ok(&["umount", &dir.to_string_lossy()]);
        assert!(node.ok(&["fsck"]).ends_with(" 0 problems\n"));
    }
}

/// Flips a bit where a layer of the store has these bytes.
fn damage(node: &Node, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    for layer in std::fs::read_dir(node.path("root/layers")).unwrap() {
        let path = layer.unwrap().path().join("data");
        let content = std::fs::read(&path).unwrap();
        if let Some(at) = content.windows(bytes.len()).position(|window| window == bytes) {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[bytes[0] ^ 1], at as u64).unwrap();
            return file.sync_all().unwrap();
        }
    }
    panic!("no layer has these bytes");
}
