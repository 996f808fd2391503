//! One fault after the other, in an order that the seed decides: of the registry, of names and the clock, of the node's disk, of the
//! daemon.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::Tally;
use super::disk::server::DiskFaults;
use super::of_node;
use super::random::Random;
use super::world::World;

/// What can go wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The registry is gone for a while.
    Refused,
    /// Of the registry: as docs/trials.md has them.
    Registry(&'static str),
    /// The registry's name has no address, and connections that are there break.
    NoNames,
    /// The daemon's clock is wrong by so much.
    Clock(&'static str),
    /// Of the disk. Contents in the page cache are dropped if reads are to fail.
    Disk(DiskFaults),
    /// The disk is full.
    Full,
    /// A byte of a layer's file that nobody reads is changed behind our back; `sluice fsck` is to find it.
    Flipped,
    /// A layer's file is removed behind our back.
    Removed,
    /// The daemon is killed.
    Killed,
    /// It is stopped in good order, and started again.
    Stopped,
    /// Its program is replaced before that.
    Upgraded,
    /// It may have no more memory than it has.
    NoMemory,
}

const NO_DISK_FAULT: DiskFaults =
    DiskFaults { slow_ms: 0, failing_reads_one_in: 0, failing_writes_one_in: 0 };
const FAULTS: [(&str, Fault); 29] = [
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
    ("redirect to an address that expires", Fault::Registry(r#"{"expires_ms":40}"#)),
    ("slow loris", Fault::Registry(r#"{"path":"/blobs/","bytes_per_second":20000,"one_in":2}"#)),
    ("no names", Fault::NoNames),
    ("clock a day ahead", Fault::Clock("+1d")),
    ("clock an hour behind", Fault::Clock("-1h")),
    ("disk slow", Fault::Disk(DiskFaults { slow_ms: 25, ..NO_DISK_FAULT })),
    ("reads of the disk fail", Fault::Disk(DiskFaults { failing_reads_one_in: 3, ..NO_DISK_FAULT })),
    ("writes to the disk fail", Fault::Disk(DiskFaults { failing_writes_one_in: 3, ..NO_DISK_FAULT })),
    ("disk full", Fault::Full),
    ("flipped on disk", Fault::Flipped),
    ("removed from disk", Fault::Removed),
    ("killed", Fault::Killed),
    ("stopped", Fault::Stopped),
    ("upgraded", Fault::Upgraded),
    ("no memory", Fault::NoMemory),
];
/// A fault lasts from this many milliseconds on.
const SHORTEST_MS: u64 = 200;
const LONGEST_MS: u64 = 2500;
/// Between two faults.
const PAUSE_MS: u64 = 500;

/// The faults that are asked for: these, or all if none is named, without those.
pub(crate) fn wanted(
    registry_only: bool,
    these: &[String],
    without: &[String],
) -> Result<Vec<(&'static str, Fault)>> {
    let names = FAULTS.map(|(name, _)| name);
    if let Some(unknown) = these.iter().chain(without).find(|name| !names.contains(&name.as_str())) {
        bail!("there is no fault `{unknown}`; there are {}", names.join(", "));
    }
    let of_registry = |fault: &Fault| matches!(fault, Fault::Registry(_) | Fault::Refused | Fault::NoNames);
    let named = |list: &[String], name: &str| list.iter().any(|one| one == name);
    let is_wanted = |(name, fault): &(&str, Fault)| {
        (!registry_only || of_registry(fault))
            && (these.is_empty() || named(these, name))
            && !named(without, name)
    };
    Ok(FAULTS.into_iter().filter(is_wanted).collect())
}

/// Injects until `end`; after that nothing is wrong any more.
pub(crate) fn inject(
    world: &World,
    tally: &Tally,
    random: &mut Random,
    end: Instant,
    faults: &[(&'static str, Fault)],
) {
    while Instant::now() < end {
        let Some(&(name, fault)) = random.pick(faults) else { return };
        let duration = Duration::from_millis(SHORTEST_MS + random.below(LONGEST_MS - SHORTEST_MS));
        let done = match fault {
            Fault::Refused => world.outage(duration).map(|()| true),
            Fault::Registry(faults) => registry(world, faults, duration),
            Fault::NoNames => no_names(world, duration),
            Fault::Clock(offset) => clock(world, offset, duration),
            Fault::Disk(faults) => disk(world, faults, duration),
            Fault::Full => world.fill_disk(duration).map(|()| true),
            Fault::Flipped => of_node::flip(world, tally, random),
            Fault::Removed => of_node::remove(world, random),
            Fault::Killed => of_node::kill(world),
            Fault::Stopped => of_node::restart(world),
            Fault::Upgraded => world.replace_binary().and_then(|()| of_node::restart(world)),
            Fault::NoMemory => of_node::take_memory(world, duration),
        };
        match done {
            Ok(true) => tally.fault(name),
            Ok(false) => {}
            Err(error) => tally.violated(&format!("fault `{name}`: {error:#}")),
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

/// Connections that are there need no name: they break, too.
fn no_names(world: &World, duration: Duration) -> Result<bool> {
    world.names(false)?;
    let done = registry(world, r#"{"truncate_at":0,"one_in":2}"#, duration);
    world.names(true)?;
    done
}

/// The library that makes the clock wrong looks at it once a second: a jump there, and one back.
fn clock(world: &World, offset: &str, duration: Duration) -> Result<bool> {
    world.clock(offset)?;
    std::thread::sleep(duration + Duration::from_secs(1));
    world.clock("+0")?;
    Ok(true)
}

fn disk(world: &World, faults: DiskFaults, duration: Duration) -> Result<bool> {
    let before = world.disk(faults)?;
    if faults.failing_reads_one_in > 0 {
        world.forget_pages()?;
    }
    std::thread::sleep(duration);
    let after = world.disk(NO_DISK_FAULT)?;
    let failed = (after.reads + after.writes) - (before.reads + before.writes);
    // One that met no request is none.
    Ok(faults.slow_ms > 0 || failed > 0)
}
