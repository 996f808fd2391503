//! What users of a node do: mount, read, unmount, pull, remove, collect; every byte is compared.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Tally;
use super::random::Random;
use super::world::{Image, World, is_of};

/// Longest read at once.
const LARGEST_READ: u64 = 700_000;

/// Works until `end`, and gives back what it holds.
pub(crate) fn work(world: &World, tally: &Tally, number: u64, mut random: Random, end: Instant) {
    let dir = world.path("mounts").join(format!("worker{number}"));
    let mut mounted: Option<&Image> = None;
    while Instant::now() < end {
        // Not while the store is tampered with in ways that nobody could see through.
        let _quiet = world.quiet.read();
        match (mounted, random.below(12)) {
            (None, 0) => command(world, tally, "gc", &["gc"]),
            (None, 1) => {
                if let Some(image) = random.pick(world.images()) {
                    command(world, tally, "rm", &["rm", &image.reference]);
                }
            }
            (None, 2) => {
                if let Some(image) = random.pick(world.images()) {
                    command(world, tally, "pull", &["pull", &image.reference]);
                }
            }
            (None, _) => {
                mounted = random.pick(world.images()).filter(|image| mount(world, tally, image, &dir))
            }
            (Some(_), 0) if umount(world, tally, &dir) => mounted = None,
            (Some(image), _) => read(world, tally, image, &dir, &mut random),
        }
    }
    if mounted.is_some() {
        umount(world, tally, &dir);
    }
}

/// A command that may be refused: the registry is away, the image is in use, the daemon was just killed.
fn command(world: &World, tally: &Tally, name: &'static str, arguments: &[&str]) {
    tally.operation(if world.sluice(arguments).is_ok() { name } else { "refused command" });
}

fn mount(world: &World, tally: &Tally, image: &Image, dir: &Path) -> bool {
    let mounted = std::fs::create_dir_all(dir)
        .map_err(anyhow::Error::from)
        .and_then(|()| world.sluice(&["mount", &image.reference, &dir.to_string_lossy()]));
    // It may have been mounted although the daemon was killed before it said so.
    let there = mounted.is_ok() || is_mounted(dir);
    tally.operation(if there { "mount" } else { "refused command" });
    if let Err(error) = mounted
        && there
        && !umount(world, tally, dir)
    {
        tally.violated(&format!("a mount that failed cannot be undone: {error:#}"));
    }
    there && is_mounted(dir)
}

fn umount(world: &World, tally: &Tally, dir: &Path) -> bool {
    let mut said = String::new();
    for _ in 0..20 {
        match world.sluice(&["umount", &dir.to_string_lossy()]) {
            Ok(_) => break,
            // A daemon that dies under it leaves the mount undone, or done.
            Err(error) => said = format!("{error:#}"),
        }
        if !is_mounted(dir) {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let gone = !is_mounted(dir);
    if gone {
        tally.operation("umount");
    } else {
        tally.violated(&format!("{} cannot be unmounted: {said}", dir.display()));
    }
    gone
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let wanted = dir.to_string_lossy();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(&wanted))
}

/// One read of a part of a file, compared. It may take long, but neither fail nor lie.
fn read(world: &World, tally: &Tally, image: &Image, dir: &Path, random: &mut Random) {
    let Some((name, source)) = random.pick(&image.files) else { return };
    let len = std::fs::metadata(source).map_or(0, |meta| meta.len());
    let start = random.below(len + 1);
    let range = start..(start + random.below(LARGEST_READ)).min(len);
    tally.operation("read");
    let what =
        |error: &str| format!("{} /{name} {range:?}: {error} ({})", image.name, world.layer(image, name));
    loop {
        // Asked before the read, too: it may last longer than the fault, and the layer is taken back when a loss is found.
        let faults = world.disk_faults();
        let before = world.is_read_by_kernel(image, name);
        match part(&dir.join(name), &range).and_then(|got| Ok(got == part(source, &range)?)) {
            Ok(true) => return,
            Ok(false) => return tally.violated(&what("WRONG BYTES")),
            // The kernel has no other source of the bytes than the layer's file.
            Err(_)
                if world.was_disk_unreadable(faults) && (before || world.is_read_by_kernel(image, name)) =>
            {
                tally.operation("read of a bad disk");
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return tally.violated(&what(&format!("{error:#}"))),
        }
    }
}

fn part(path: &Path, range: &std::ops::Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).context("cannot open")?;
    file.seek(SeekFrom::Start(range.start))?;
    file.take(range.end - range.start).read_to_end(&mut bytes).context("cannot read")?;
    Ok(bytes)
}

/// Mounts an image, waits until it is local, and compares every file.
pub(crate) fn settle(
    world: &World,
    tally: &Tally,
    image: &Image,
    number: usize,
    patience: Duration,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    let dir: PathBuf = world.path("mounts").join(format!("last{number}"));
    std::fs::create_dir_all(&dir)?;
    world.sluice(&["mount", &image.reference, &dir.to_string_lossy()])?;
    loop {
        let status = world.status().context("there is no daemon")?;
        let images = status.get("images").and_then(Value::as_array);
        let found = images
            .and_then(|images| images.iter().find(|one| is_of(one, image)))
            .context("it is not known")?;
        match found.get("state").and_then(Value::as_str) {
            Some("local" | "unpacked") => break,
            _ if Instant::now() > deadline => bail!("it is still {found}"),
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
    }
    for (name, source) in &image.files {
        tally.operation("read");
        let whole = 0..std::fs::metadata(source)?.len();
        if part(&dir.join(name), &whole).with_context(|| name.clone())? != part(source, &whole)? {
            bail!("/{name} has wrong bytes");
        }
    }
    world.sluice(&["umount", &dir.to_string_lossy()]).map(|_| ())
}
