//! Watches the daemon beside the work: memory, descriptors, and whether reads come to an end.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Tally;
use super::world::World;

/// Most that daemon and block server may have resident together, buffers of a debug build included.
pub(crate) const RESIDENT_LIMIT: u64 = 256 << 20;
/// Most descriptors that the two may have.
pub(crate) const DESCRIPTOR_LIMIT: u64 = 1024;
/// A thread that is blocked longer than any fault lasts is never woken again.
const STUCK: Duration = Duration::from_secs(120);
/// All may wait for one layer that comes as slowly as a fault has it: 10 MB at 20 kB/s.
const STALLED: Duration = Duration::from_secs(600);
const INTERVAL: Duration = Duration::from_millis(500);

/// The most that was seen.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Peaks {
    pub(crate) resident_bytes: u64,
    pub(crate) descriptors: u64,
}

/// Looks again and again until the work is over. At `latest` whatever still waits is made to fail.
pub(crate) fn watch(world: &World, tally: &Tally, latest: Instant) -> Peaks {
    let mut peaks = Peaks::default();
    let mut blocked: HashMap<String, (Instant, bool)> = HashMap::new();
    let (mut fat, mut leaking, mut hung) = (false, false, false);
    let mut progress = (0, Instant::now(), false);
    while !tally.is_over() {
        let root = world.path("state").to_string_lossy().into_owned();
        let (mut resident, mut descriptors) = (0, 0);
        for pid in processes(&root) {
            resident += resident_bytes(&pid);
            descriptors += std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |fds| fds.count() as u64);
        }
        peaks.resident_bytes = peaks.resident_bytes.max(resident);
        peaks.descriptors = peaks.descriptors.max(descriptors);
        if resident > RESIDENT_LIMIT && !std::mem::replace(&mut fat, true) {
            tally.violated(&format!("{} MiB are resident", resident >> 20));
        }
        if descriptors > DESCRIPTOR_LIMIT && !std::mem::replace(&mut leaking, true) {
            tally.violated(&format!("{descriptors} descriptors are open"));
        }
        let now = sleeping();
        blocked.retain(|thread, _| now.contains(thread));
        for thread in now {
            let (since, told) = blocked.entry(thread.clone()).or_insert((Instant::now(), false));
            if since.elapsed() > STUCK && !*told {
                *told = true;
                tally.violated(&format!("thread {thread} has been blocked for {} s", STUCK.as_secs()));
            }
        }
        if progress.0 != tally.done() {
            progress = (tally.done(), Instant::now(), false);
        } else if progress.1.elapsed() > STALLED && !std::mem::replace(&mut progress.2, true) {
            tally.violated(&format!("nothing was begun or done for {} s", STALLED.as_secs()));
        }
        if Instant::now() > latest && !std::mem::replace(&mut hung, true) {
            tally.violated("it does not come to an end: the disk is taken away");
            world.abort();
        }
        std::thread::sleep(INTERVAL);
    }
    peaks
}

/// Processes of the node: daemon and block server.
pub(super) fn processes(state: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let ours = words.iter().any(|word| word == state);
        if ours && words.iter().any(|word| word == "daemon" || word == "block-server") {
            found.push(pid);
        }
    }
    found
}

fn resident_bytes(pid: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Our own threads that wait for a disk: reads that are not answered.
fn sleeping() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let waits = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D')))
    };
    tasks.filter(waits).map(|task| task.file_name().to_string_lossy().into_owned()).collect()
}
