//! Daemons that are killed, disks that are full, clocks that jump, while an image is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::node::{Node, checked, wait_until};

/// A link slow enough that reading the image takes a while.
const SLOW: [&str; 4] = ["--rate", "8mbit", "--delay", "5ms"];

/// Reads the whole image in another thread.
fn read_all(root: PathBuf, sums: PathBuf) -> JoinHandle<Result<String>> {
    std::thread::spawn(move || {
        checked(Command::new("busybox").args(["sha256sum", "-c"]).arg(sums).current_dir(root))
    })
}

fn sums(node: &Node) -> Result<PathBuf> {
    let path = node.path("sums");
    fs::copy(node.path("images/SUMS"), &path)?;
    Ok(path)
}

fn joined(reader: JoinHandle<Result<String>>) -> Result<()> {
    match reader.join() {
        Ok(read) => read.map(|_| ()),
        Err(_) => bail!("the reader panicked"),
    }
}

/// `kill -9` of the daemon while its image is read: the next one goes on, and the reader notices nothing.
pub(super) fn killed(broken: bool) -> Result<()> {
    let config = if broken { "[blocks]\npatience_s = 5\n" } else { "" };
    let node = Node::new(Path::new("/var/tmp/killed"), config, &SLOW)?;
    let mounted = node.mount()?;
    let reader = read_all(mounted.clone(), sums(&node)?);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        let daemon = node.status()?.get("pid").and_then(serde_json::Value::as_i64).context("no pid")?;
        if broken {
            // Nobody comes after it.
            kill(Pid::from_raw(keeper_of(daemon)?), Signal::SIGKILL)?;
        }
        kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
        if broken {
            return joined(reader);
        }
        wait_until("the next daemon answers", || Ok(node.run(&["gc"])?.status.success()))?;
    }
    joined(reader)?;
    node.ok(&["umount", &mounted.to_string_lossy()])?;
    let said = node.ok(&["fsck"])?;
    ensure!(said.ends_with(" 0 problems\n"), "{said}");
    Ok(())
}

/// The process that would start the next daemon.
fn keeper_of(daemon: i64) -> Result<i32> {
    let status = fs::read_to_string(format!("/proc/{daemon}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?.trim();
    let words = fs::read_to_string(format!("/proc/{parent}/cmdline"))?;
    ensure!(words.contains("keep-daemon"), "the daemon's parent is {words}");
    Ok(parent.parse()?)
}

/// No room on the store's disk: everything is readable all the same, and complete once there is room.
pub(super) fn store_full(broken: bool) -> Result<()> {
    let room = Path::new("/var/tmp/full");
    fs::create_dir_all(room.join("node/root"))?;
    checked(
        Command::new("busybox")
            .args(["dd", "if=/dev/zero", "bs=1M", "count=0", "seek=64"])
            .arg(format!("of={}", room.join("disk").display())),
    )?;
    checked(Command::new("mkfs.ext4").args(["-q", "-F", "-J", "size=4"]).arg(room.join("disk")))?;
    checked(Command::new("mount").args(["-o", "loop"]).arg(room.join("disk")).arg(room.join("node/root")))?;
    let node = Node::new(&room.join("node"), "[store]\nreserve_mib = 4\n", &SLOW)?;
    // All but a few MiB: the image has more.
    let ballast = room.join("node/root/ballast");
    checked(Command::new("fallocate").args(["-l", "48M"]).arg(&ballast)).context("ballast")?;
    let mounted = node.mount()?;
    joined(read_all(mounted.clone(), sums(&node)?))?;
    let full = node.status()?.get("disk_full").cloned();
    ensure!(full == Some(true.into()), "the disk is not full: {full:?}");
    joined(read_all(mounted, sums(&node)?))?;
    if !broken {
        fs::remove_file(ballast)?;
    }
    wait_until("the image is complete", || Ok(node.of_image("state")? == "local"))?;
    let said = node.ok(&["fsck"])?;
    ensure!(said.ends_with(" 0 problems\n"), "{said}");
    Ok(())
}

/// The wall clock jumps by a year, forth and back, while the image is read.
pub(super) fn clock(broken: bool) -> Result<()> {
    // No time-out may end early or late by the jump; so those that count must be short when nothing can come.
    let config =
        if broken { "[stream]\noutage_timeout_s = 3\n" } else { "[stream]\noutage_timeout_s = 120\n" };
    let mut node = Node::new(Path::new("/var/tmp/clock"), config, &SLOW)?;
    let mounted = node.mount()?;
    let sums = sums(&node)?;
    if broken {
        // One file is enough, where each read fails in its own time.
        let all = fs::read_to_string(&sums)?;
        fs::write(&sums, all.lines().find(|line| line.ends_with("/large")).context("no large file")?)?;
    }
    let reader = read_all(mounted, sums);
    let start = seconds()?;
    if broken {
        node.end_registry()?;
    }
    const YEAR: u64 = 365 * 86_400;
    for time in [start + YEAR, start - YEAR, start + 60] {
        std::thread::sleep(Duration::from_millis(700));
        checked(Command::new("busybox").args(["date", "-u", "-s", &format!("@{time}")]))?;
        let now = seconds()?;
        ensure!(now.abs_diff(time) < 60, "the clock did not jump: {now} and not {time}");
        node.status()?;
    }
    joined(reader)?;
    wait_until("the image is complete", || Ok(node.of_image("state")? == "local"))
}

fn seconds() -> Result<u64> {
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs())
}
