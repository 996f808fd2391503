//! The disk that the soak serves itself: nobody waits for it once the soak is gone. Needs root and FUSE.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.join("fuse")).stderr(Stdio::null()).status());
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Serves `room`'s disk; says when it is mounted.
fn serve(room: &Path) -> Child {
    fs::create_dir_all(room.join("fuse")).unwrap();
    fs::File::create(room.join("disk.img")).unwrap().set_len(1 << 20).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("soak-disk")
        .args(["disk.img", "fuse"].map(|name| room.join(name)))
        .arg(room)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    answer(&mut server);
    server
}

fn answer(server: &mut Child) -> String {
    let mut line = String::new();
    BufReader::with_capacity(1, server.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_whose_owner_is_gone_fails_what_waits_for_it_and_goes() {
    let room = Scratch(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("disk-{}", std::process::id())));
    let mut server = serve(&room.0);
    // An hour a request: whoever asks waits for ever.
    writeln!(
        server.stdin.as_mut().unwrap(),
        r#"{{"slow_ms":3600000,"failing_reads_one_in":0,"failing_writes_one_in":0}}"#
    )
    .unwrap();
    assert_eq!(answer(&mut server).trim(), r#"{"reads":0,"writes":0}"#);
    let mut reader = Command::new("dd")
        .arg(format!("if={}", room.0.join("fuse/disk").display()))
        .args(["of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stat = format!("/proc/{}/stat", reader.id());
    wait_until("the read waits", || {
        let stat = fs::read_to_string(&stat).unwrap();
        // Interruptible or not, by kernel; before that it is running or loading its program.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['D', 'S']))
            && fs::read_to_string(format!("/proc/{}/stack", reader.id())).unwrap().contains("fuse")
    });
    drop(server.stdin.take());
    assert!(!reader.wait().unwrap().success(), "there was nothing to read");
    assert!(server.wait().unwrap().success());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(room.0.to_str().unwrap()), "{mounts}");
}
