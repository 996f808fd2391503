//! Faults of the node: its store tampered with, its daemon killed, restarted, replaced, short of memory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Tally;
use super::random::Random;
use super::world::World;
use crate::run::output;

/// What a daemon without memory may have more than it has, page cache of what it writes included.
const LEFT_BYTES: u64 = 16 << 20;

/// `kill -9` of the daemon; its keeper starts the next one.
pub(super) fn kill(world: &World) -> Result<bool> {
    let Some(pid) = pid(world) else { return Ok(false) };
    output(Command::new("kill").args(["-9", &pid.to_string()])).map(|_| true)
}

fn pid(world: &World) -> Option<u64> {
    world.status()?.get("pid")?.as_u64()
}

/// Stops the daemon and starts another: all workers may be in reads that wait for one, and then no command of theirs does it.
pub(super) fn restart(world: &World) -> Result<bool> {
    world.sluice(&["stop"])?;
    world.sluice(&["gc"]).map(|_| true)
}

/// The daemon in a control group whose limit it reaches. If the kernel ends it for that, it is a daemon that was killed.
pub(super) fn take_memory(world: &World, duration: Duration) -> Result<bool> {
    let Some(pid) = pid(world) else { return Ok(false) };
    let group = Group::make(pid)?;
    std::thread::sleep(duration);
    group.end()?;
    Ok(true)
}

/// A control group of memory, of version 1 or 2.
#[derive(Debug)]
struct Group {
    dir: PathBuf,
    before: PathBuf,
}

impl Group {
    fn make(pid: u64) -> Result<Self> {
        let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let of =
            |mark: &str| own.lines().find_map(|line| line.split_once(mark)).map(|(_, path)| path.to_owned());
        let top = Path::new("/sys/fs/cgroup");
        let (top, limit, path) = match of(":memory:") {
            Some(path) => (top.join("memory"), "memory.limit_in_bytes", path),
            None => (top.to_path_buf(), "memory.max", of("0::").unwrap_or_default()),
        };
        let this = Self {
            dir: top.join(format!("sluice-soak-{}", std::process::id())),
            before: top.join(path.trim_start_matches('/')),
        };
        fs::create_dir_all(&this.dir).context("cannot make a control group")?;
        // What was charged before stays where it was charged.
        fs::write(this.dir.join(limit), LEFT_BYTES.to_string()).context("cannot limit memory")?;
        // One that has just died needs no group.
        drop(fs::write(this.dir.join("cgroup.procs"), pid.to_string()));
        Ok(this)
    }

    fn end(self) -> Result<()> {
        for pid in fs::read_to_string(self.dir.join("cgroup.procs"))?.lines() {
            // The same.
            drop(fs::write(self.before.join("cgroup.procs"), pid));
        }
        // A process that was killed leaves its group when it is gone.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        fs::remove_dir(&self.dir).context("cannot remove the control group")
    }
}

/// Everybody is sent home first: the kernel reads a complete layer's file by itself, and has nothing to compare it with.
pub(super) fn flip(world: &World, tally: &Tally, random: &mut Random) -> Result<bool> {
    let _alone = world.quiet.write();
    let before = world.fsck()?;
    let dirs = world.layer_dirs()?;
    let Some(dir) = random.pick(&dirs) else { return Ok(false) };
    let file = fs::File::options().read(true).write(true).open(dir.join("data"))?;
    let len = file.metadata()?.len();
    let mut byte = [0];
    let at = random.below(len);
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x40], at)?;
    file.sync_data()?;
    let found = world.fsck()?;
    let again = world.fsck()?;
    if !again.trim_end().ends_with(" 0 problems") {
        tally.violated(&format!("fsck does not mend: {before} {found} {again}"));
    }
    Ok(true)
}

pub(super) fn remove(world: &World, random: &mut Random) -> Result<bool> {
    let _alone = world.quiet.write();
    let dirs = world.layer_dirs()?;
    let Some(dir) = random.pick(&dirs) else { return Ok(false) };
    let name = random.pick(&["data", "chunks", "extents"]).copied().unwrap_or("data");
    match fs::remove_file(dir.join(name)) {
        // Removed before, by us or with its layer, and not missed yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).context("cannot remove"),
    }
}
