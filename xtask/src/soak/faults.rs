//! One fault after the other, in an order that the seed decides: of the registry, of the node's disk, of the daemon.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Tally;
use super::random::Random;
use super::world::World;

/// What can go wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The registry is gone for a while.
    Refused,
    /// Of the registry: as docs/trials.md has them.
    Registry(&'static str),
    /// The daemon is killed; the next command starts another.
    Killed,
    /// It is stopped in good order.
    Stopped,
    /// The disk is full.
    Full,
    /// A byte of a layer's file that nobody reads is changed behind our back; `sluice fsck` is to find it.
    Flipped,
    /// A layer's file is removed behind our back.
    Removed,
}

const FAULTS: [(&str, Fault); 20] = [
    ("refused", Fault::Refused),
    ("stalled", Fault::Registry(r#"{"path":"/blobs/","stall":true,"one_in":3}"#)),
    ("reset", Fault::Registry(r#"{"truncate_at":0,"one_in":2}"#)),
    ("truncated", Fault::Registry(r#"{"path":"/blobs/","truncate_at":70000,"one_in":2}"#)),
    ("200 to a range", Fault::Registry(r#"{"path":"/blobs/","ignore_ranges":true}"#)),
    ("wrong length", Fault::Registry(r#"{"path":"/blobs/","wrong_length":true,"one_in":2}"#)),
    ("wrong bytes", Fault::Registry(r#"{"path":"/blobs/","flip":true,"times":1}"#)),
    ("401", Fault::Registry(r#"{"status":401,"one_in":2}"#)),
    ("403", Fault::Registry(r#"{"path":"/blobs/","status":403,"one_in":2}"#)),
    ("429", Fault::Registry(r#"{"status":429,"retry_after":1,"one_in":2}"#)),
    ("500", Fault::Registry(r#"{"status":500,"one_in":2}"#)),
    ("503", Fault::Registry(r#"{"status":503}"#)),
    ("redirect to a dead address", Fault::Registry(r#"{"redirect":"http://127.0.0.1:1/","one_in":2}"#)),
    (
        "redirect to a name without address",
        Fault::Registry(r#"{"redirect":"http://sluice.invalid/","one_in":2}"#),
    ),
    ("slow loris", Fault::Registry(r#"{"path":"/blobs/","bytes_per_second":20000,"one_in":2}"#)),
    ("killed", Fault::Killed),
    ("stopped", Fault::Stopped),
    ("disk full", Fault::Full),
    ("flipped on disk", Fault::Flipped),
    ("removed from disk", Fault::Removed),
];
/// A fault lasts from this many milliseconds on.
const SHORTEST_MS: u64 = 200;
const LONGEST_MS: u64 = 2500;
/// Between two faults.
const PAUSE_MS: u64 = 500;

/// Injects until `end`; after that nothing is wrong any more.
pub(crate) fn inject(world: &World, tally: &Tally, random: &mut Random, end: Instant) {
    while Instant::now() < end {
        let Some((name, fault)) = random.pick(&FAULTS) else { return };
        let duration = Duration::from_millis(SHORTEST_MS + random.below(LONGEST_MS - SHORTEST_MS));
        let done = match fault {
            Fault::Refused => world.outage(duration).map(|()| true),
            Fault::Registry(faults) => registry(world, faults, duration),
            Fault::Killed => kill(world),
            Fault::Stopped => world.sluice(&["stop"]).map(|_| true),
            Fault::Full => world.fill_disk(duration).map(|()| true),
            Fault::Flipped => flip(world, tally, random),
            Fault::Removed => remove(world, random),
        };
        match done {
            Ok(true) => tally.fault(name),
            Ok(false) => {}
            Err(error) => tally.violated(format!("fault `{name}`: {error:#}")),
        }
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
    }
}

fn registry(world: &World, faults: &str, duration: Duration) -> Result<bool> {
    let faults: Value = serde_json::from_str(faults)?;
    world.faults(&faults)?;
    std::thread::sleep(duration);
    world.faults(&json!({}))?;
    Ok(true)
}

/// `kill -9` of the daemon.
fn kill(world: &World) -> Result<bool> {
    let Some(pid) = world.status().as_ref().and_then(|status| status.get("pid")?.as_u64()) else {
        return Ok(false);
    };
    crate::run::output(std::process::Command::new("kill").args(["-9", &pid.to_string()])).map(|_| true)
}

/// Everybody is sent home first: the kernel reads a complete layer's file by itself, and has nothing to compare it with.
fn flip(world: &World, tally: &Tally, random: &mut Random) -> Result<bool> {
    let _alone = world.quiet.write();
    let before = world.fsck()?;
    let dirs = world.layer_dirs()?;
    let Some(dir) = random.pick(&dirs) else { return Ok(false) };
    let file = std::fs::File::options().read(true).write(true).open(dir.join("data"))?;
    let len = file.metadata()?.len();
    let mut byte = [0];
    let at = random.below(len);
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x40], at)?;
    file.sync_data()?;
    let found = world.fsck()?;
    let again = world.fsck()?;
    if !again.trim_end().ends_with(" 0 problems") {
        tally.violated(format!("fsck does not mend: {before} {found} {again}"));
    }
    Ok(true)
}

fn remove(world: &World, random: &mut Random) -> Result<bool> {
    let _alone = world.quiet.write();
    let dirs = world.layer_dirs()?;
    let Some(dir) = random.pick(&dirs) else { return Ok(false) };
    let name = random.pick(&["data", "chunks", "extents"]).copied().unwrap_or("data");
    std::fs::remove_file(dir.join(name)).context("cannot remove")?;
    Ok(true)
}
